"""Evaluates a model: asks the tasks' questions, scores and summarises them in a folder that can be resumed."""

import hashlib
import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from ..folders import write_whole
from ..progress import progress
from .answering import Answerer, Budget, LocalModel, ServedModel
from .asking import Reply, ask, is_known, keep, kept_answers, plan, prompt_hash
from .exports import write_export
from .protocol import Judge, Task
from .samples import DataError, Outcome, Picture, Problem, Sample, Scored
from .sources import Loaded
from .statistics import interval, value_of
from .tasks import find_tasks

PROMPTS = "evaluation_prompts.json"
SETTINGS, SUMMARY = "settings.json", "summary.json"
EXAMPLES = 5  # examples of each kind of problem in the summary


Model = str | tuple[Any, Any] | Answerer


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Fields:
        data: a folder with a subfolder for each task, named as the task; a task without one is loaded from the Hub.
        splits: splits by task, if not the default.
        visual_tokens: the budget of a picture: a count, a grid or "auto"; None is the model's default.
        tiles: the tiles of a picture, at most a count or a grid, see MSResamplerProcessor; None is the model's default.
        reducer: `reducer_type`, `keep` and the settings of a visual token reducer; None is the model's own.
        limit: ask only this many samples of a task (whole groups); the result is marked as incomplete.
        blind: ask without the pictures, to measure guessing.
        judge: grades MM-Vet, and reads replies to MMBench that the rules cannot.
        revision: branch, tag or commit of the model's repository.
        url: an OpenAI-compatible address that serves the model, instead of loading it here.
    """

    data: Path | None = None
    splits: Mapping[str, str] | None = None
    visual_tokens: Budget | None = None
    tiles: int | tuple[int, int] | None = None
    reducer: Mapping[str, Any] | None = None
    batch_size: int = 16
    limit: int | None = None
    blind: bool = False
    judge: Judge | None = None
    revision: str | None = None
    url: str | None = None


def evaluate(model: Model, tasks: Sequence[str | Path], out: Path, options: Options | None = None) -> dict[str, Any]:
    """Evaluates a model and returns the summary, which is also written to `out` with a JSONL file for each task.

    model: a folder, a Hub repository, a model and its processor, or an Answerer. tasks: names, sets of them ("ten"),
    and paths of suites. Answers in `out` are not asked again. Under `accelerate launch`, the processes share the work.

    A task whose data cannot be read has no value, and the reason in the summary; the other tasks are not affected.
    Raises ValueError if a task is unknown, or if `out` holds a run with other settings.
    """
    import torch
    from accelerate import PartialState

    options = options or Options()
    chosen = find_tasks(tasks)
    # One process may finish hours before another.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    settings = run_settings(model, options)
    if state.is_main_process:
        (out / "answers").mkdir(parents=True, exist_ok=True)
        check_settings(out / SETTINGS, settings)
    prompts = settings["prompts"]
    answerer = the_answerer(model, options, state.device)
    summaries = {}
    for task in chosen:
        template = prompts.get(task.name, task.prompt)
        try:
            loaded = task.load((options.splits or {}).get(task.name), folder_of(task, options.data))
        except DataError as error:
            summaries[task.name] = failed(task, str(error))
            continue
        asked = limited(loaded.samples, options.limit)
        texts = [filled(template, sample) for sample in asked]
        shown = [() if options.blind else sample.pictures for sample in asked]
        ask_task(task, asked, texts, shown, answerer, out / "answers", options.batch_size, state)
        state.wait_for_everyone()
        if state.is_main_process:
            replies = kept_answers(out / "answers", task.name)
            summaries[task.name] = Result(task, loaded, asked, texts, replies, template).write(out, options)
        state.wait_for_everyone()
    summary = {"settings": settings, "tasks": merged_tasks(out / SUMMARY, summaries)}
    if state.is_main_process:
        write_whole(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False))
    return summary


def the_answerer(model: Model, options: Options, device: Any) -> Answerer:
    """Loads the model, or wraps the address that serves it."""
    if isinstance(model, tuple):
        return LocalModel(*model, options.visual_tokens, options.reducer, options.tiles)
    if not isinstance(model, str):
        return model
    if options.url is not None:
        if options.reducer is not None:
            raise ValueError("A served model has its own reducer: set it in its configuration, not with --reducer.")
        return ServedModel(options.url, model, options.visual_tokens, tiles=options.tiles)
    return LocalModel.load(model, options.revision, options.visual_tokens, device, options.reducer, options.tiles)


def folder_of(task: Task, data: Path | None) -> Path | None:
    """A task's folder in the folder of data, if there is one."""
    folder = data / task.name if data is not None else None
    return folder if folder is not None and folder.is_dir() else None


def limited(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first samples, and all that are scored together with them."""
    if limit is None:
        return samples
    groups = {sample.group or sample.id for sample in samples[:limit]}
    return [sample for sample in samples if (sample.group or sample.id) in groups]


def filled(template: str, sample: Sample) -> str:
    """A prompt. Raises ValueError if the template names a field that the task does not have."""
    try:
        return template.format_map(sample.fields)
    except (KeyError, IndexError, ValueError) as error:
        fields = ", ".join(f"{{{name}}}" for name in sample.fields)
        raise ValueError(f"The prompt {template!r} does not fit: its fields are {fields}.") from error


# Settings ----------------------------------------------------------------------------------------------------------


def run_settings(model: Model, options: Options) -> dict[str, Any]:
    """Everything besides the data that a run's answers depend on; a run resumes only with equal settings."""
    loaded = model if isinstance(model, str) and options.url is None else None
    local = loaded is not None and Path(loaded).is_dir()
    kind = type(model[0] if isinstance(model, tuple) else model).__name__
    return {
        "model": model if isinstance(model, str) else kind,
        "url": options.url,
        "revision": commit_of_model(loaded, options.revision) if loaded and not local else None,
        "sha256": hash_of_weights(Path(loaded)) if loaded and local else None,
        "visual_tokens": options.visual_tokens,
        "tiles": options.tiles,
        "reducer": options.reducer and dict(options.reducer),
        "blind": options.blind,
        "limit": options.limit,
        "prompts": own_prompts(loaded, options.revision) if loaded else {},
        "decoding": "greedy",
        "versions": {name: metadata.version(name) for name in ("ms-resampler", "torch", "transformers")},
        "python": platform.python_version(),
    }


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a new run. Raises ValueError if the folder holds a run with others."""
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{path.parent} holds a run with {name} = {before.get(name)!r}, but this one has {now[name]!r}: "
                "name another folder with --out."
            )
    write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False))


def own_prompts(model: str, revision: str | None) -> dict[str, str]:
    """A model's own prompts by task, from evaluation_prompts.json, if it has one."""
    from transformers.utils import cached_file

    path = cached_file(
        model,
        PROMPTS,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def hash_of_weights(folder: Path) -> str:
    """SHA-256 of a folder's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def commit_of_model(model: str, revision: str | None) -> str | None:
    """The commit of a Hub repository that will be loaded."""
    from transformers.utils import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(model, "config.json", revision=revision), None)


# Asking ------------------------------------------------------------------------------------------------------------


def ask_task(
    task: Task,
    samples: Sequence[Sample],
    texts: Sequence[str],
    shown: Sequence[Sequence[Picture]],
    answerer: Answerer,
    folder: Path,
    batch_size: int,
    state: Any,
) -> None:
    """Asks this process's share of the open questions, and stores every batch of answers."""
    known = kept_answers(folder, task.name)
    windows = plan(samples, texts, batch_size)[state.process_index :: state.num_processes]
    places = [place for window in windows for batch in window for place in batch]
    done = sum(is_known(known, samples[place], texts[place]) for place in places)
    path = folder / f"{task.name}.rank{state.process_index}.jsonl"
    with progress(
        total=len(places), initial=done, desc=task.title, unit="question", disable=not state.is_main_process
    ) as bar:
        for batch in ask(answerer, samples, texts, shown, windows, known, task.max_new_tokens):
            keep(path, [answer_row(samples[place], texts[place], reply) for place, reply in batch])
            bar.update(len(batch))


def answer_row(sample: Sample, text: str, reply: Reply) -> dict[str, Any]:
    """A line of the file of answers."""
    return {
        "id": sample.id,
        "prompt_hash": prompt_hash(text),
        "reply": reply.text,
        "problem": asdict(reply.problem) if reply.problem else None,
        "seconds": round(reply.seconds, 4),
        "visual_tokens": reply.visual_tokens,
    }


# Results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A task's samples with their outcomes."""

    task: Task
    loaded: Loaded
    asked: list[Sample]
    texts: list[str]
    replies: dict[tuple[str, str], Reply]
    template: str

    def write(self, out: Path, options: Options) -> dict[str, Any]:
        """Writes the task's JSONL and export; returns its part of the summary."""
        problems = list(self.loaded.problems)
        scored, rows, answered = [], [], []
        for sample, text in zip(self.asked, self.texts, strict=True):
            reply = self.replies.get((sample.id, prompt_hash(text)))
            if reply is None or reply.text is None:
                not_asked = Problem(sample.id, "not asked", "The run was cut short.")
                problems.append(reply.problem if reply and reply.problem else not_asked)
                continue
            outcome, problem = self.judged(sample, reply.text, options.judge)
            problems += [problem] if problem else []
            answered.append(Scored(sample, reply.text, outcome))
            if not math.isnan(outcome.score):
                scored.append(answered[-1])
            rows.append(sample_row(sample, text, reply, outcome))
        write_whole(out / f"{self.task.name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        if self.task.export and answered:
            write_export(out / "exports", *self.task.export(answered))
        return self.summary(complete_groups(scored, self.asked), rows, problems, options)

    def judged(self, sample: Sample, reply: str, judge: Judge | None) -> tuple[Outcome, Problem | None]:
        """The score of a reply, with the judge's help if needed; NaN if it cannot be scored."""
        if sample.truth is None:
            return Outcome(math.nan, None), None
        outcome = self.task.score(sample, reply)
        if outcome.parsed is not None or judge is None or self.task.judge is None:
            return outcome, None
        try:
            return self.task.judge(sample, reply, judge), None
        except (ValueError, IndexError, OSError) as error:
            return outcome, Problem(sample.id, "judge", f"The judge's answer cannot be used: {error}")

    def summary(
        self, scored: list[Scored], rows: list[dict[str, Any]], problems: list[Problem], options: Options
    ) -> dict[str, Any]:
        """The numbers of a task, and everything needed to interpret them."""
        task, split = self.task, self.loaded.source["split"]
        numbers = value_of(task.aggregation, scored) if scored else {}
        low, high = interval(task.aggregation, scored) if scored else (math.nan, math.nan)
        counted_rows = [row for row in rows if row["visual_tokens"]]
        pictures = sum(len(row["pictures"]) for row in counted_rows)
        return {
            "title": task.title,
            "headline": task.aggregation.headline,
            "scale": task.aggregation.scale,
            "value": known_number(numbers.get(task.aggregation.headline)),
            "interval": [known_number(low), known_number(high)],
            "numbers": {name: known_number(number) for name, number in numbers.items()},
            "samples": len(self.loaded.samples) + len(self.loaded.problems),
            "answered": len(rows),
            "scored": len(scored),
            "not_parsed": sum(row["parsed"] is None and row["score"] is not None for row in rows),
            "problems": counted(problems),
            "remarks": remarks(task, split, self.asked, scored, problems, rows, options),
            "source": dict(self.loaded.source),
            "samples_sha256": hash_of_samples(self.asked, self.texts),
            "prompt": self.template,
            "prompt_source": task.prompt_source if self.template == task.prompt else "the model's own",
            "max_new_tokens": task.max_new_tokens,
            "seconds_per_question": known_number(sum(row["seconds"] for row in rows) / len(rows)) if rows else None,
            "visual_tokens_per_picture": known_number(sum(row["visual_tokens"] for row in counted_rows) / pictures)
            if pictures
            else None,
        }


def remarks(
    task: Task,
    split: str,
    asked: Sequence[Sample],
    scored: Sequence[Scored],
    problems: Sequence[Problem],
    rows: Sequence[Mapping[str, Any]],
    options: Options,
) -> list[str]:
    """Reasons why a number is missing or cannot be compared with published ones, as sentences."""
    said = []
    if not scored and all(sample.truth is None for sample in asked):
        said.append("This split's answers are not public: submit the file in `exports`.")
    elif not scored and task.judge is not None:
        said.append("Needs a judge: --judge, or grade the file in `exports`.")
    if scored and task.published_split not in (None, split):
        said.append(f"Scored on {split}; published rows are of {task.published_split}.")
    if options.limit is not None:
        said.append(f"Only {len(asked)} samples were asked.")
    if problems:
        said.append(f"{len(problems)} samples have problems and are left out: see `problems`.")
    if scored and len(scored) < len(rows):
        said.append(
            f"{len(rows) - len(scored)} answered samples are not scored: they have no public answer or grade, or their "
            "groups are incomplete."
        )
    return said


def complete_groups(scored: Sequence[Scored], asked: Sequence[Sample]) -> list[Scored]:
    """Only samples whose whole group could be scored."""
    sizes = Counter(sample.group or sample.id for sample in asked)
    there = Counter(item.sample.group or item.sample.id for item in scored)
    return [
        item
        for item in scored
        if there[item.sample.group or item.sample.id] == sizes[item.sample.group or item.sample.id]
    ]


def sample_row(sample: Sample, text: str, reply: Reply, outcome: Outcome) -> dict[str, Any]:
    """A line of a task's JSONL."""
    return {
        "id": sample.id,
        "prompt": text,
        "pictures": [picture.key for picture in sample.pictures],
        "reply": reply.text,
        "parsed": outcome.parsed,
        "score": known_number(outcome.score),
        "truth": sample.truth,
        "group": sample.group,
        "meta": dict(sample.meta),
        "seconds": reply.seconds,
        "visual_tokens": reply.visual_tokens,
    }


def read_scored(path: Path) -> list[Scored]:
    """The scored samples of a task's JSONL, in whole groups."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    samples = [
        Sample(
            row["id"], {}, tuple(Picture(key, str) for key in row["pictures"]), row["truth"], row["group"], row["meta"]
        )
        for row in rows
    ]
    scored = [
        Scored(sample, row["reply"], Outcome(row["score"], row["parsed"]))
        for sample, row in zip(samples, rows, strict=True)
        if row["score"] is not None
    ]
    return complete_groups(scored, samples)


def counted(problems: Iterable[Problem]) -> dict[str, Any]:
    """Problems by kind: how many, and the first few by name."""
    kinds: dict[str, Any] = {}
    for problem in problems:
        kind = kinds.setdefault(problem.kind, {"count": 0, "examples": []})
        kind["count"] += 1
        if len(kind["examples"]) < EXAMPLES:
            kind["examples"].append(f"{problem.id}: {problem.message}")
    return kinds


def failed(task: Task, reason: str) -> dict[str, Any]:
    """The part of the summary of a task that could not be asked."""
    return {"title": task.title, "headline": task.aggregation.headline, "value": None, "error": reason}


def merged_tasks(path: Path, summaries: Mapping[str, Any]) -> dict[str, Any]:
    """Merges tasks into those of an earlier summary, so that a run can be extended by tasks."""
    before = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.is_file() else {}
    return before | dict(summaries)


def known_number(number: float | None) -> float | None:
    """A rounded number for JSON; None for NaN."""
    return None if number is None or math.isnan(number) else round(float(number), 6)


def hash_of_samples(samples: Sequence[Sample], texts: Sequence[str]) -> str:
    """A hash of questions and answers: equal if two runs asked the same."""
    digest = hashlib.sha256()
    for sample, text in zip(samples, texts, strict=True):
        digest.update(json.dumps([sample.id, text, sample.truth], ensure_ascii=False).encode())
    return digest.hexdigest()
