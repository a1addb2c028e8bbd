"""A checkpoint's model card, from its configuration, its weights and the record of its training."""

import json
import re
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from jinja2 import StrictUndefined, Template
from yaml import YAMLError

from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import PROJECTOR, PROJECTOR_PREFIXES, RECORD, write_whole
from ..projectors_ms_resampler import PROJECTORS
from .staging import tensor_elements, tensor_files

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
JINJA: dict[str, Any] = {
    "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True
}  # fmt: skip
MADE_HERE = "<!-- Made by `ms-resampler card`"
PAPER = "https://arxiv.org/abs/2606.31383"
PEERS = {
    "LLaVA-1.5": "2310.03744", "InternVL 1.5": "2404.16821", "Honeybee": "2312.06742", "MobileVLM": "2312.16886",
    "MobileVLM V2": "2402.03766", "TokenPacker": "2407.02392", "Delta-LLaVA": "2512.18910", "MQT": "2405.19315",
    "LLaVA-Mini": "2501.03895", "SAEP": "2410.10319", "Qwen-VL": "2308.12966", "Flamingo": "2204.14198",
    "Idefics2": "2405.02246", "BLIP-2": "2301.12597",
}  # fmt: skip
CLEARLY = 25  # percentage points above the blind model from which a family counts as learned
PARTS: dict[str, str | tuple[str, ...]] = {
    "vision_tower": "model.vision_tower.", "projector": PROJECTOR_PREFIXES, "language_model": ""
}  # fmt: skip
# Metadata fields that are generated; the publisher's other fields are kept.
MADE_FIELDS = ("library_name", "pipeline_tag", "model-index")
TAGS = ["custom_code", "ms_resampler"]


def write_card(folder: Path, title: str | None = None, **metadata: Any) -> None:
    """Writes the folder's README.md, or updates it and keeps what its publisher has added.

    Raises ValueError if there is a README.md that was not made by this function.
    """
    path = folder / "README.md"
    if path.exists() and not is_made_here(path):
        raise ValueError(f"{path} was not made by `ms-resampler card` and would be overwritten: move it away first.")
    write_whole(path, render_card(folder, title, **metadata))


def is_made_here(path: Path) -> bool:
    """Whether a README.md was made by this module."""
    return MADE_HERE in path.read_text(encoding="utf-8")


def check_card(folder: Path) -> None:
    """Raises ValueError, naming the first difference, unless the card matches the folder's results."""
    path = folder / "README.md"
    if not path.is_file():
        raise ValueError(f"{folder} has no README.md: make it with `ms-resampler card {folder}`.")
    if not is_made_here(path):
        raise ValueError(f"{path} was not made by `ms-resampler card`, so its numbers cannot be checked.")
    lines = zip_longest(path.read_text(encoding="utf-8").splitlines(), render_card(folder).splitlines(), fillvalue="")
    for number, (is_, should) in enumerate(lines, start=1):
        if is_ != should:
            raise ValueError(
                f"{path}, line {number}, says {is_.strip()!r}, where the results say {should.strip()!r}: make it "
                f"again with `ms-resampler card {folder}`."
            )


def render_card(folder: Path, title: str | None = None, *, repo: str | None = None, **metadata: Any) -> str:
    """The text of a checkpoint's card; title, metadata and notes of an existing card are kept."""
    text = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    record = read_json(folder / RECORD)
    config = MSResamplerConfig.from_pretrained(folder)
    name = repo.rsplit("/", 1)[-1] if repo else f"MS-Resampler {folder.resolve().name}"
    title = title or first_group(r"^# (.+)$", text) or name
    fields = kept_metadata(folder / "README.md") | metadata
    if "scores" in record:
        fields = {"license": "apache-2.0", "language": "en"} | fields
    fields.setdefault("license", "unknown")
    bases = as_list(fields.get("base_model"))
    return Template(TEMPLATE.read_text(encoding="utf-8"), **JINJA).render(
        metadata=metadata_yaml(title, fields, record),
        title=title,
        repo=repo or first_group(r'^repo = "(.+)"$', text) or "path/of/this/folder",
        base_models=bases,
        projector_of=bases[0] if bases and (folder / PROJECTOR).is_file() else None,
        paper=PAPER,
        peers=PEERS,
        notes=first_group(r"<!-- notes -->\n(.*)\n<!-- /notes -->", text, re.DOTALL) or "",
        curves=(folder / "curves.png").is_file(),
        **facts_of_model(folder, config),
        **facts_of_training(record),
    )


def facts_of_model(folder: Path, config: Any) -> dict[str, Any]:
    """The card's fields from the configuration and the weights."""
    projector, counts = config.projector_config, parameter_counts(folder)
    grid = config.native_patch_grid
    budget, peer = projector.visual_tokens, PROJECTORS.get(projector.projector_type)
    return {
        "projector": projector,
        "tower": config.vision_config.model_type,
        "language_model": config.text_config.model_type,
        "millions": lambda part: f"{counts[part] / 1e6:.1f}",
        "patches": f"{grid[0] * grid[1]} patches",
        "tokens": budget if isinstance(budget, int) else budget[0] * budget[1],
        "peer": str(peer.__doc__).partition("\n")[0] if peer else "",
    }


def parameter_counts(folder: Path) -> dict[str, int]:
    """Parameters of tower, projector, language model and all, counted in the weights."""
    counts = dict.fromkeys(PARTS, 0)
    for name, file in tensor_files(folder).items():
        part = next(part for part, prefix in PARTS.items() if name.startswith(prefix))
        counts[part] += tensor_elements(file, name)
    return counts | {"all": sum(counts.values())}


def facts_of_training(record: dict[str, Any]) -> dict[str, Any]:
    """The card's fields from the training record, if there is one."""
    versions = [f"{name} {version}" for name, version in record.get("versions", {}).items()]
    return {
        "stages": [stage_row(stage) for stage in [*record.get("stages", []), *recipe_stage(record)]],
        "versions": ", ".join(versions),
        "scenes": scene_results(record) if "scores" in record else None,
    }


def recipe_stage(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The run of a recipe as a stage: its record has one recipe, and learning rates by part of the model."""
    if "recipe" not in record:
        return []
    rates = ", ".join(f"{part} {rate:g}" for part, rate in record["recipe"].get("rates", {}).items() if rate)
    run = {"steps": record.get("steps"), "seconds": record.get("last_session_seconds"), "learning_rate": rates}
    return [record["recipe"] | run | {"data_sha256": record.get("data", {}).get("sha256", "")}]


def stage_row(stage: dict[str, Any]) -> list[str]:
    """A stage of the training as the cells of a table."""
    numbers = [stage.get(name) for name in ("steps", "batch_size", "learning_rate", "seed")]
    cells = [f"{number:,}" if isinstance(number, int | float) else str(number or "") for number in numbers]
    hours = f"{stage['seconds'] / 3600:.2f}" if stage.get("seconds") else ""
    return [stage["name"], *cells, hours, stage.get("data_sha256", "")[:12]]


def scene_results(record: dict[str, Any]) -> dict[str, Any]:
    """The results on the scenes that this project draws, in words and as a table."""
    rows = list(zip(record["scores"], record["blind_scores"], strict=True))
    gains = {row["family"]: 100 * (row["mean"] - guess["mean"]) for row, guess in rows}
    weakest = sorted(record["scores"], key=lambda row: row["mean"])[:3]
    return record["vocabulary"] | {
        "clearly": CLEARLY,
        "learned": ", ".join(family for family, gain in gains.items() if gain >= CLEARLY) or "none",
        "not_learned": ", ".join(family for family, gain in gains.items() if gain < CLEARLY) or "none",
        "weakest": ", ".join(f"{row['family']} ({row['mean']:.0%})" for row in weakest),
        "table": results_table(record),
        "budgets": plain_table("visual tokens", "visual_tokens", record.get("budget_scores", [])),
        "wordings": plain_table("what is asked", "family", record.get("wording_scores", [])),
        "start": record.get("start", {}).get("sha256"),
        "known": record.get("known_inputs", {}).get("measured", []),
    }


def plain_table(title: str, field: str, rows: list[dict[str, Any]]) -> str:
    """Accuracy of rows that a field of theirs names, in percent; empty without rows."""
    lines = [f"| {title} | questions | accuracy | 95% interval |", "|---|---|---|---|"]
    for row in rows:
        cells = f"{row[field]} | {row['questions']} | {row['mean']:.1%} | {row['low']:.1%} to {row['high']:.1%}"
        lines.append(f"| {cells} |")
    return "\n".join(lines) if rows else ""


def results_table(record: dict[str, Any]) -> str:
    """Accuracy by family beside the model that sees no image, in percent."""
    scores, blind = record["scores"], record["blind_scores"]
    lines = [
        "| family | look | questions | accuracy | 95% interval | blind | above blind |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, guess in zip(scores, blind, strict=True):
        lines.append(
            f"| {row['family']} | {row['group']} | {row['questions']} | {row['mean']:.1%} | {row['low']:.1%} to "
            f"{row['high']:.1%} | {guess['mean']:.1%} | {100 * (row['mean'] - guess['mean']):+.1f} |"
        )
    mean, guess_mean = (fmean(row["mean"] for row in rows) for rows in (scores, blind))
    lines.append(
        f"| **mean of families** | | | **{mean:.1%}** | | {guess_mean:.1%} | {100 * (mean - guess_mean):+.1f} |"
    )
    return "\n".join(lines)


def metadata_yaml(title: str, fields: dict[str, Any], record: dict[str, Any]) -> str:
    """The front matter: the publisher's fields and the generated ones, such as the results."""
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="ms_resampler_scenes",
            dataset_name="MS-Resampler scenes, held out",
            dataset_config=row["family"],
            dataset_split="test",
            metric_type="f1" if row["family"] == "describe" else "accuracy",
            metric_value=round(row["mean"], 4),
        )
        for row in record.get("scores", [])
    ]
    tags = [*TAGS, *(tag for tag in as_list(fields.get("tags")) if tag not in TAGS)]
    made = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": tags}
    results_of = {"model_name": title, "eval_results": results} if results else {}
    return ModelCardData(**{**fields, **made, **results_of}).to_yaml(line_break="\n")


def kept_metadata(path: Path) -> dict[str, Any]:
    """The card fields set by the publisher."""
    return {field: value for field, value in read_metadata(path).items() if field not in MADE_FIELDS}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata fields of any card; empty if there is no card. Raises ValueError if they are not YAML."""
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path.name} is damaged: its metadata, between two lines of ---, are no YAML ({reason})."
        ) from error


def add_card(staged: Path, folder: Path, repo: str, projector_of: str | None = None) -> Path:
    """Makes the card of a staged folder, unless `folder` has one that was not made here.

    Raises ValueError if the card of `folder` does not match its results, or lacks metadata that the Hub needs.
    """
    card = staged / "README.md"
    if not card.is_file() or is_made_here(card):
        if card.is_file():
            check_card(folder)
        metadata = {"base_model": projector_of, "base_model_relation": "adapter"} if projector_of else {}
        card.write_text(render_card(staged, repo=repo, **metadata), encoding="utf-8")
    found = read_metadata(card)
    wanted = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    missing = [f"{field}: {value}" for field, value in wanted.items() if found.get(field) != value]
    missing += [] if found.get("license") else ["license: ..."]
    if missing:
        raise ValueError(f"Nothing was sent. {card.name} lacks in its metadata: {', '.join(missing)}.")
    return staged


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's value; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def first_group(pattern: str, text: str, flags: int = re.MULTILINE) -> str | None:
    """The first group of a pattern's first match."""
    found = re.search(pattern, text, flags)
    return found[1] if found else None


def as_list(value: str | list[str] | None) -> list[str]:
    """One, several or none, as a list."""
    return [value] if isinstance(value, str) else list(value or [])
