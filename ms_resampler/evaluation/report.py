"""Runs side by side, with published rows: one table as text, Markdown or a card's model-index, and one figure."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .aggregation import mean_of_scores
from .metrics import plain_number
from .published import PublishedRow, comparable_rows, published_rows
from .run import SUMMARY, read_scored
from .statistics import Difference, compare, holm
from .tasks import TASKS


@dataclass(frozen=True)
class Run:
    """A folder that `evaluate` has written."""

    folder: Path
    summary: dict[str, Any]

    @property
    def tasks(self) -> dict[str, Any]:
        """The tasks' parts of the summary, by name."""
        return self.summary["tasks"]

    @property
    def name(self) -> str:
        """Its name in tables: that of the folder."""
        return self.folder.resolve().name + (" (blind)" if self.summary["settings"]["blind"] else "")

    def mean_of(self, field: str) -> float | None:
        """The mean over the tasks that have it, weighted by their questions: visual tokens, seconds."""
        known = [(task[field], task["answered"]) for task in self.tasks.values() if task.get(field) is not None]
        total = sum(count for _, count in known)
        return sum(value * count for value, count in known) / total if total else None

    def mean_score(self) -> float | None:
        """The mean of the tasks' headline numbers, each in percent of its largest value."""
        values = [100 * task["value"] / task["scale"] for task in self.tasks.values() if task["value"] is not None]
        return sum(values) / len(values) if values else None


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs by their folders. Raises ValueError if one has no summary."""
    runs = []
    for folder in folders:
        if not (folder / SUMMARY).is_file():
            raise ValueError(f"{folder} has no {SUMMARY}: it is not the folder of a finished evaluation.")
        runs.append(Run(folder, json.loads((folder / SUMMARY).read_text(encoding="utf-8"))))
    return runs


def has_failed_tasks(folders: Sequence[Path]) -> bool:
    """Whether a task of a run has no value because its data could not be read."""
    return any("error" in part for run in open_runs(folders) for part in run.tasks.values())


# Tables ------------------------------------------------------------------------------------------------------------


def report(folders: Sequence[Path], *, markdown: bool = False, published: bool = True) -> str:
    """The table of runs and comparable published rows, paired differences from the first run, and all remarks."""
    runs = open_runs(folders)
    names = list(dict.fromkeys(name for run in runs for name in run.tasks))
    titles = {name: next(run.tasks[name]["title"] for run in runs if name in run.tasks) for name in names}
    rows = comparable_rows(runs[0].mean_of("visual_tokens_per_picture")) if published else []
    rows = [row for row in rows if any(row.numbers.get(title) for title in titles.values())]
    parts = [table([["", "tokens", *titles.values(), "s/question"], *run_lines(runs, names)] + [
        [row.method, row.tokens, *(row.numbers.get(title, "") for title in titles.values()), ""] for row in rows
    ], markdown)]  # fmt: skip
    if len(runs) > 1:
        parts += [paired_table(runs[0], run, markdown) for run in runs[1:]]
    parts += [notes(runs, rows)]
    return "\n\n".join(filter(None, parts))


def run_lines(runs: Sequence[Run], names: Sequence[str]) -> list[list[str]]:
    """The runs' rows: numbers with half the width of their intervals, an asterisk where there is a remark; and what
    always saying the most common answer is worth, for suites.
    """
    lines = []
    for run in runs:
        tokens, seconds = run.mean_of("visual_tokens_per_picture"), run.mean_of("seconds_per_question")
        cells = [cell(run.tasks.get(name)) for name in names]
        lines.append([run.name, number(tokens, "g"), *cells, number(seconds, ".3f")])
    guesses = [
        next(filter(None, (run.tasks.get(name, {}).get("numbers", {}).get("guess") for run in runs)), None)
        for name in names
    ]
    if any(guesses):
        lines.append(["most common answer", "", *(number(guess, ".1f") for guess in guesses), ""])
    return lines


def cell(task: dict[str, Any] | None) -> str:
    """A task's number in a table."""
    if task is None:
        return ""
    if task["value"] is None:
        return "failed" if "error" in task else "not scored"
    low, high = task["interval"]
    digits = ".1f" if task["scale"] <= 100 else ".0f"
    width = "" if low is None or high is None else f" ±{(high - low) / 2:{digits}}"
    return f"{task['value']:{digits}}{width}{'' if is_plain(task) else '*'}"


def is_plain(task: dict[str, Any]) -> bool:
    """Whether a number has no asterisk: no remark, and at least nine in ten replies were understood."""
    return not task["remarks"] and task["not_parsed"] <= task["answered"] / 10


def number(value: float | None, digits: str) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:{digits}}"


def table(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Rows, starting with the header, as a table."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = [[padded(text, width) for text, width in zip(row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * max(3, width) for width in widths]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def display_width(text: str) -> int:
    """Columns in a terminal: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def padded(text: str, width: int) -> str:
    """A text with spaces after it."""
    return text + " " * (width - display_width(text))


def differences(first: Run, second: Run) -> dict[str, Difference]:
    """How much better the second run is, by task that both have scored, with p-values corrected by Holm's method."""
    found = {}
    for name, part in first.tasks.items():
        other = second.tasks.get(name)
        if part["value"] is None or other is None or other["value"] is None:
            continue
        aggregation = TASKS[name].aggregation if name in TASKS else mean_of_scores()
        before, after = (read_scored(run.folder / f"{name}.jsonl") for run in (first, second))
        found[name] = compare(aggregation, before, after)
    corrected = holm([difference.p for difference in found.values()])
    return {
        name: Difference(d.value, d.low, d.high, p, d.samples)
        for (name, d), p in zip(found.items(), corrected, strict=True)
    }


def paired_table(first: Run, second: Run, markdown: bool) -> str:
    """Paired differences of two runs."""
    rows = [[f"{second.name} - {first.name}", "difference", "95% interval", "p (Holm)", "samples"]]
    for name, d in differences(first, second).items():
        interval = f"{d.low:+.1f} to {d.high:+.1f}"
        rows.append([first.tasks[name]["title"], f"{d.value:+.1f}", interval, f"{d.p:.4f}", str(d.samples)])
    return table(rows, markdown) if len(rows) > 1 else ""


def notes(runs: Sequence[Run], rows: Sequence[PublishedRow]) -> str:
    """Notes: what the numbers are, every remark and problem, and the sources of published rows."""
    lines = [
        "± is half of the 95% interval of a bootstrap over pictures. MME-P is the perception sum (of 2000). "
        "A number with an asterisk should not be compared, for the reasons given here."
    ]
    for run in runs:
        for name, part in run.tasks.items():
            said = [part["error"]] if "error" in part else part["remarks"]
            lines += [f"{run.name}, {name}: {sentence}" for sentence in said]
            for kind, found in part.get("problems", {}).items():
                lines.append(f"{run.name}, {name}: {found['count']} x {kind}, such as {found['examples'][0]}")
            if part.get("not_parsed"):
                lines.append(
                    f"{run.name}, {name}: {part['not_parsed']} of {part['answered']} replies were not understood."
                )
    sources = dict.fromkeys(row.source for row in rows)
    return "\n".join(lines + ([f"Published: {'; '.join(sources)}."] if sources else []))


def model_index(folder: Path, model_name: str) -> str:
    """The results of a run as a model card's metadata (YAML), without numbers that have an asterisk in tables."""
    from huggingface_hub import EvalResult, ModelCardData

    (run,) = open_runs([folder])
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=part["source"]["place"],
            dataset_name=part["title"],
            dataset_config=part["source"].get("config"),
            dataset_split=part["source"]["split"],
            dataset_revision=part["source"].get("revision"),
            metric_type=part["headline"],
            metric_value=part["value"],
        )
        for part in run.tasks.values()
        if part["value"] is not None and is_plain(part)
    ]
    if not results:
        raise ValueError(f"{folder} has only results with an asterisk, which a card must not have.")
    return ModelCardData(model_name=model_name, eval_results=results).to_yaml()


# Figure ------------------------------------------------------------------------------------------------------------


def figure(folders: Sequence[Path], path: Path) -> None:
    """Plots the mean score of each run against visual tokens, and against the measured time of a question.

    Published rows that have all of the runs' tasks are in the first panel, in grey.
    """
    from matplotlib.figure import Figure

    runs = open_runs(folders)
    drawing = Figure(figsize=(9, 4), layout="constrained")
    axes = drawing.subplots(1, 2, sharey=True)
    fields = {"visual_tokens_per_picture": "visual tokens a picture", "seconds_per_question": "seconds a question"}
    published = published_points(runs)
    if published:
        budgets, scores, _ = zip(*published, strict=True)
        axes[0].plot(budgets, scores, "o", color="lightgrey", markersize=4, label="published")
        axes[0].legend()
    for ax, (field, label) in zip(axes, fields.items(), strict=True):
        for run in runs:
            x, y = run.mean_of(field), run.mean_score()
            if x is not None and y is not None:
                ax.plot(x, y, "o", color="C0")
                ax.annotate(run.name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        ax.set_xlabel(label)
        ax.margins(0.2)
        ax.grid(alpha=0.3)
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("mean score over tasks, in % of the largest")
    drawing.savefig(path, dpi=150)


def published_points(runs: Sequence[Run]) -> list[tuple[float, float, str]]:
    """Budget, mean score and name of the published rows that print a number for every task that the runs scored."""
    scales = {part["title"]: part["scale"] for run in runs for part in run.tasks.values() if part["value"] is not None}
    points = []
    for row in published_rows():
        numbers = {title: plain_number(row.numbers.get(title, "")) for title in scales}
        scores = [100 * number / scales[title] for title, number in numbers.items() if number is not None]
        if scores and len(scores) == len(scales):
            points.append((float(row.budget), sum(scores) / len(scores), row.method))
    return points
