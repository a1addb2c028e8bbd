"""DocVQA (arXiv 2007.00398), validation: questions about scanned documents, by ANLS."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import anls
from ..protocol import SHORT, Task
from ..samples import Columns, Outcome, Sample, Scored
from ..sources import HubData, Record, one_of, picture_in, read_json, strings


def records(folder: Path, split: str) -> Iterator[Record]:
    """The questions of val_v1.0_withQT.json, whose pictures lie in `documents` or `spdocvqa_images`."""
    for record in read_json(one_of(folder, f"{split}_v1.0*.json", f"*/{split}_v1.0*.json"))["data"]:
        name = record["image"]
        yield record | {"image": picture_in(folder, name, f"spdocvqa_images/{Path(name).name}")}


def build(record: Columns) -> Sample:
    """A question with one or several right answers."""
    answers = record.get("answers")
    return Sample(
        id=str(record["questionId"]),
        fields={"question": record["question"]},
        pictures=(record["image"],),
        truth=strings(answers) if answers else None,
        meta={"kind": list(record.get("question_types") or [])},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """ANLS."""
    return Outcome(anls(reply, sample.truth), reply or None)


def export(scored: Sequence[Scored]) -> tuple[str, list]:
    """The result file of the evaluation server."""
    return "docvqa_submission.json", [{"questionId": int(item.sample.id), "answer": item.reply} for item in scored]


TASK = Task(
    name="docvqa",
    title="DocVQA",
    hub=HubData(
        "lmms-lab/DocVQA", {"val": "validation", "test": "test"}, "DocVQA", "539088ef8a8ada01ac8e2e6d4e372586748a265e"
    ),
    split="val",
    published_split="val",
    prompt=SHORT,
    prompt_source="lmms-eval, which has LLaVA-1.5's instruction for short answers",
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("kind", headline="ANLS"),
    picture_key=lambda row: f"{row['ucsf_document_id']} {row['ucsf_document_page_no']}",
    export=export,
)
