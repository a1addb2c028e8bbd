"""TextVQA (arXiv 1904.08920), val: questions about text in pictures. LLaVA-1.5's rows have OCR tokens in the prompt."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import evalai_normalise, textvqa_accuracy
from ..protocol import LLAVA, Task
from ..samples import Columns, Outcome, Problem, Sample, Scored
from ..sources import HubData, Record, one_of, picture_in, read_json


def records(folder: Path, split: str) -> Iterator[Record | Problem]:
    """The questions of TextVQA_0.5.1_*.json, with the tokens of TextVQA_Rosetta_OCR_v0.2_*.json."""
    tokens = read_json(one_of(folder, f"TextVQA_Rosetta_OCR_*_{split}.json"))["data"]
    tokens = {row["image_id"]: row["ocr_tokens"] for row in tokens}
    pictures = "test_images" if split == "test" else "train_images"
    for question in read_json(one_of(folder, f"TextVQA_0.5.1_{split}.json"))["data"]:
        name = question["image_id"]
        if name not in tokens:
            yield Problem(str(question["question_id"]), "unusable record", f"The picture {name} has no OCR tokens.")
            continue
        yield question | {"ocr_tokens": tokens[name], "image": picture_in(folder, f"{pictures}/{name}.jpg")}


def build(record: Columns) -> Sample:
    """A question; its truth is the list of the ten answers."""
    tokens = record["ocr_tokens"]
    answers = record.get("answers")
    return Sample(
        id=str(record["question_id"]),
        fields={
            "question": record["question"],
            "ocr": f"Reference OCR token: {', '.join(tokens)}\n" if tokens else "",
        },
        pictures=(record["image"],),
        truth=list(answers) if answers else None,
    )


def score(sample: Sample, reply: str) -> Outcome:
    """TextVQA's accuracy."""
    return Outcome(textvqa_accuracy(reply, sample.truth), evalai_normalise(reply) or None)


def export(scored: Sequence[Scored]) -> tuple[str, list]:
    """The result file of the evaluation server."""
    rows = [{"question_id": int(item.sample.id), "answer": evalai_normalise(item.reply)} for item in scored]
    return "textvqa_submission.json", rows


TASK = Task(
    name="textvqa",
    title="TextVQA",
    hub=HubData(
        "lmms-lab/textvqa",
        {"val": "validation", "test": "test"},
        revision="9c0699cd19768ac5ab97568f6b3cbac4c0062884",
    ),
    split="val",
    published_split="val",
    prompt="{question}\n{ocr}Answer the question using a single word or phrase.",
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores(),
    picture_key=lambda row: str(row["image_id"]),
    export=export,
)
