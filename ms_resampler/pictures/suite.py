"""Builds the suite: a folder for the evaluator for each test split, and one in LLaVA's format for training."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from ..evaluation.samples import Columns
from ..evaluation.suite import build, suite_task
from ..folders import whole_folder
from ..progress import progress
from .packages import DEBIAN, PACKAGES
from .sources import SPLITS, Shelf, Split
from .tasks import TASKS, Asked, draw_sheet

PACKAGE_FOLDER = Path.home() / ".cache" / "ms-resampler" / "packages"
ONLY_IN = {"scenes": ("train", "test")}  # splits of tasks that do not have all


def build_pictures(
    out: Path,
    tasks: Sequence[str] | None = None,
    *,
    questions: int = 300,
    train_questions: int = 3000,
    seed: int = 0,
    packages: Path | None = None,
) -> dict[str, Any]:
    """Builds the suite in a new folder, and returns the content of its suite.json.

    tasks: by default all that can be drawn here; `pages` needs packages of Debian. questions and train_questions: per
    task, in each test split and for training. packages: the folder of the packages, laid out like `node_modules`; by
    default in ~/.cache. The same arguments and versions give the same files.

    Raises ValueError if a task is unknown, if `out` exists, or if a package is not the pinned one; OSError if one
    cannot be fetched.
    """
    if unknown := [task for task in tasks or () if task not in TASKS]:
        raise ValueError(f"There is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}.")
    if questions < 1 or train_questions < 0:
        raise ValueError("At least 1 question a task is needed, and at least 0 for training.")
    shelf = Shelf(packages or PACKAGE_FOLDER)
    if tasks is None:
        tasks = tuple(task for task in TASKS if task != "pages" or shelf.pages is not None)
    with whole_folder(out) as partial:
        counts: dict[str, dict[str, Any]] = defaultdict(dict)
        records: list[dict[str, Any]] = []
        for split in SPLITS.values():
            wanted = train_questions if split.name == "train" else questions
            for task in tasks:
                if wanted and split.name in ONLY_IN.get(task, SPLITS):
                    lines = list(draw_lines(partial / split.name, task, shelf, split, seed, wanted))
                    counts[split.name][task] = described(lines)
                    if split.name == "train":
                        records += llava_records(lines, partial / split.name)
                    else:
                        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                        (partial / split.name / f"{task}.jsonl").write_text(text, encoding="utf-8")
        if records:
            text = json.dumps(records, indent=1, ensure_ascii=False)
            (partial / "train" / "train.json").write_text(text, encoding="utf-8")
        known = PACKAGES | DEBIAN
        used = {name: {"version": known[name].version, "licence": known[name].licence} for name in sorted(shelf.used)}
        left_out = [task for task in TASKS if task not in tasks]
        said = {"seed": seed, "splits": dict(counts), "left_out": left_out, "packages": used}
        (partial / "suite.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
        contact_sheet(partial, tasks).save(partial / "contact_sheet.png")
    return said


def draw_lines(folder: Path, task: str, shelf: Shelf, split: Split, seed: int, wanted: int) -> Iterator[dict[str, Any]]:
    """The evaluator's lines for a task's questions; writes their pictures below `folder`."""
    (folder / "pictures" / task).mkdir(parents=True)
    done = 0
    with progress(total=wanted, desc=f"{split.name}: {task}", unit="question") as bar:
        for index in count():
            sheet = draw_sheet(task, shelf, split, seed, index)
            name = f"pictures/{task}/{index:06}.jpg"
            sheet.image.save(folder / name, quality=92, subsampling=0)
            for asked in sheet.questions[: wanted - done]:
                yield line_of(f"{split.name}-{task}-{done}", name, asked, sheet.meta)
                done += 1
                bar.update()
            if done == wanted:
                return


def line_of(number: str, image: str, asked: Asked, meta: dict[str, Any]) -> dict[str, Any]:
    """A question as a line for the evaluator."""
    line: dict[str, Any] = {
        "id": number,
        "image": image,
        "question": asked.question,
        "answer": asked.answer,
        "kind": asked.kind,
        "meta": {"asks": asked.asks, **meta},
    }
    if asked.options is not None:
        line["options"] = asked.options
    if asked.tolerance:
        line["tolerance"] = asked.tolerance
    return line


def llava_records(lines: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """LLaVA's conversations with the evaluator's prompts, one per question, since answers may be related."""
    template = suite_task(folder / "train.jsonl").prompt
    records = []
    for line in lines:
        prompt = template.format_map(build(Columns({**line, "folder": folder})).fields)
        answer = line["answer"][0] if isinstance(line["answer"], list) else line["answer"]
        turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
        records.append({"id": line["id"], "image": line["image"], "conversations": turns})
    return records


def described(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a task's questions and pictures, and how evenly the pictures are filled."""
    return {
        "questions": len(lines),
        "pictures": len({line["image"] for line in lines}),
        "kinds": dict(sorted(Counter(line["kind"] for line in lines).items())),
        "detail": dict(sorted(Counter(line["meta"]["detail"] for line in lines).items())),
    }


def contact_sheet(folder: Path, tasks: Sequence[str], side: int = 150) -> Image.Image:
    """An overview: the first pictures of every task (rows) in every split (two columns each)."""
    head, left = 22, 90
    splits = [name for name in SPLITS if (folder / name).is_dir()]
    sheet = Image.new("RGB", (left + 2 * side * len(splits), head + side * len(tasks)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, split in enumerate(splits):
        draw.text((left + 2 * side * column + side, head / 2), split, fill="black", anchor="mm", font_size=14)
        for row, task in enumerate(tasks):
            draw.text((6, head + side * row + side / 2), task, fill="black", anchor="lm", font_size=14)
            for number, path in enumerate(sorted((folder / split / "pictures" / task).glob("*.jpg"))[:2]):
                with Image.open(path) as picture:
                    small = ImageOps.pad(picture, (side - 4, side - 4), Image.Resampling.LANCZOS, color="white")
                sheet.paste(small, (left + side * (2 * column + number) + 2, head + side * row + 2))
    return sheet
