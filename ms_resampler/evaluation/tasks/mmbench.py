"""MMBench and MMBench-CN (arXiv 2307.06281), dev: multiple choice, to be right in every rotation of the options."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..aggregation import Aggregation, Counts, Sums, groups_of
from ..metrics import mmbench_letter
from ..protocol import LETTER, LLAVA, Judge, Task
from ..samples import Columns, Outcome, Problem, Sample, Scored, lettered, stored_picture
from ..sources import HubData, Record, is_blank, one_of, read_tsv

ROTATION = 1_000_000  # the k-th rotation of question i has the index i + k * 1,000,000
FILES = {
    "en": ("mmbench_dev_20230712.tsv", "mmbench_dev_en_*.tsv", "MMBench_DEV_EN*.tsv"),
    "cn": ("mmbench_dev_cn_*.tsv", "MMBench_DEV_CN*.tsv"),
}


def records_of(language: str) -> Callable[[Path, str], Iterator[Record | Problem]]:
    """A reader for a language's table, which adds rotations if the table has none."""

    def records(folder: Path, split: str) -> Iterator[Record | Problem]:
        names = [name.replace("dev", split).replace("DEV", split.upper()) for name in FILES[language]]
        path = one_of(folder, *names)
        rows = []
        for number, row in enumerate(read_tsv(path), start=2):
            if (row.get("index") or "0").isdecimal():
                rows.append(row)
            else:
                yield Problem(f"line {number}", "unusable record", f"The index is {row['index']!r}, not a number.")
        pictures = {row.get("index"): row.get("image") for row in rows}
        has_rotations = any(int(row["index"]) >= ROTATION for row in rows if row.get("index"))
        for row in rows:
            cell, index = row.get("image") or "", row.get("index") or "0"
            # A short cell is the index of the row that holds the picture.
            if len(cell) < 64 and cell in pictures:
                cell, index = pictures[cell] or "", cell
            picture = stored_picture(f"{path} {int(index) % ROTATION}", cell)
            record = row | {"image": picture}
            yield from [record] if has_rotations else rotations(record)

    return records


def rotations(record: Record) -> Iterator[Record | Problem]:
    """A question with its options in every rotation, and the answer's letter with them; a wrong letter is a problem."""
    letters = [letter for letter in "ABCD" if not is_blank(record.get(letter))]
    answer = record.get("answer")
    if not is_blank(answer) and answer not in letters:
        why = f"The answer is {answer!r}, and the options are {', '.join(letters)}."
        yield Problem(str(record["index"]), "unusable record", why)
        return
    for shift in range(len(letters)):
        turned = {letter: record[letters[(i + shift) % len(letters)]] for i, letter in enumerate(letters)}
        index = int(record["index"]) + shift * ROTATION
        place = "" if is_blank(answer) else letters[(letters.index(str(answer)) - shift) % len(letters)]
        yield {**record, **turned, "index": index, "answer": place}


def build(record: Columns) -> Sample:
    """A row; its truth is a letter and the options, its group the question that it is a rotation of."""
    index = int(record["index"])
    options = {}
    for letter in "ABCD":
        if is_blank(record[letter]):
            break
        options[letter] = str(record[letter])
    answer, hint = record.get("answer"), record.get("hint")
    if not is_blank(answer) and answer not in options:
        raise ValueError(f"The answer is {answer!r}, and the options are {', '.join(options)}.")
    question = record["question"]
    return Sample(
        id=str(index),
        fields={
            "hint": "" if is_blank(hint) else f"{hint}\n",
            "question": question,
            "options": lettered(options.values()),
        },
        pictures=(record["image"],),
        truth=None if is_blank(answer) else {"letter": answer, "options": options},
        group=str(index % ROTATION),
        meta={
            "category": record.get("category"),
            "l2": record.get("l2-category", record.get("L2-category")),
            "row": {name: record.get(name) for name in ("question", *"ABCD", "answer", "split")},
        },
    )


def score(sample: Sample, reply: str) -> Outcome:
    """Whether the option that can be found in the reply without a judge is right."""
    letter = mmbench_letter(reply, sample.truth["options"])
    return Outcome(float(letter == sample.truth["letter"]), letter)


def judged(sample: Sample, reply: str, judge: Judge) -> Outcome:
    """Whether the option that the judge finds in the reply is right."""
    said = judge(
        task="mmbench",
        question=sample.fields["question"],
        truth=sample.truth["letter"],
        options=sample.truth["options"],
        reply=reply,
    )
    letter = mmbench_letter(said, sample.truth["options"])
    return Outcome(float(letter == sample.truth["letter"]), letter)


def tally(scored: Sequence[Scored]) -> Iterable[tuple[str, Counts]]:
    """Counts of questions, those right in every rotation, and those right without rotation; also by category."""
    for rows in groups_of(scored):
        hit = float(all(item.outcome.score == 1 for item in rows))
        first = min(rows, key=lambda item: int(item.sample.id))
        counts = {"n": 1.0, "hit": hit, "as given": first.outcome.score}
        for column in ("category", "l2"):
            if isinstance(label := first.sample.meta[column], str):
                counts |= {f"n|{label}": 1.0, f"hit|{label}": hit}
        yield first.sample.unit, counts


def finish(sums: Sums) -> dict[str, np.ndarray]:
    """Circular accuracy, the accuracy without rotations, and circular accuracy by category."""
    labels = [name.partition("|")[2] for name in sums if name.startswith("n|")]
    parts = {label: 100 * sums[f"hit|{label}"] / sums[f"n|{label}"] for label in labels}
    circular, plain = (100 * sums[name] / sums["n"] for name in ("hit", "as given"))
    return {"circular accuracy": circular, "accuracy without rotations": plain} | parts


def export_rows(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The table of the evaluation server."""
    return [{"index": int(item.sample.id), **item.sample.meta["row"], "prediction": item.reply} for item in scored]


def task(language: str, name: str, title: str, instruction: str) -> Task:
    """MMBench in one of its languages."""
    return Task(
        name=name,
        title=title,
        hub=HubData("lmms-lab/MMBench", {"dev": "dev", "test": "test"}, config=language),
        split="dev",
        published_split="dev",
        prompt="{hint}{question}\n{options}\n" + instruction,
        prompt_source=LLAVA,
        records=records_of(language),
        build=build,
        score=score,
        judge=judged,
        aggregation=Aggregation(tally, finish, "circular accuracy"),
        picture_key=lambda row: str(int(row["index"]) % ROTATION),
        export=lambda scored: (f"{name}_submission.xlsx", export_rows(scored)),
    )


ENGLISH = task("en", "mmbench", "MMB", LETTER.rpartition("\n")[2])
CHINESE = task("cn", "mmbench_cn", "MMB-CN", "请直接回答选项字母。")
