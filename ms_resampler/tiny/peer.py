"""Trains another projector in the embedded checkpoint, to compare with.

Tower and language model stay frozen, so that only the projector has to be stored.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from .. import TINY
from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import PROJECTOR, RECORD, read_config
from ..hub_upload.card import results_table
from ..hub_upload.staging import write_projector
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..projectors_ms_resampler import PROJECTORS
from ..training.collate import ConversationCollator
from .curriculum import SceneConversations
from .evaluate import FamilyScore, evaluate_scenes
from .stages import Stage, check_numbers, evaluate_once, file_hash, run_stage, stage_of, training_record

# The MLP keeps every patch: it has no 36 tokens.
KINDS = ("resampler", *(kind for kind in PROJECTORS if kind != "mlp"))
SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "visual_tokens")


def tiny_peer(steps: int = 1000) -> Stage:
    """Trains a projector for the frozen, already trained language model."""
    return Stage(
        name="peer",
        dataset=lambda records: SceneConversations(records, drills=records // 4, turns=10),
        collator=lambda processor: ConversationCollator(processor, max_length=1024),
        steps=steps,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=min(50, steps),
        cooldown_steps=steps // 2,
    )


def train_tiny_projector(
    kind: str,
    out: str | Path | None = None,
    *,
    start: str | Path | None = None,
    steps: int | None = None,
    scenes: int = 400,
    seed: int = 0,
    embed: bool = False,
) -> Path:
    """Trains another projector in the embedded checkpoint, or resumes an interrupted run in `out`.

    The arguments are those of `train_tiny`, but `start` is a folder with an earlier projector of this kind, and `embed`
    copies the projector into this package. Returns the folder of the result, `out`/model. Raises ValueError if `kind`
    is not one of KINDS, or the earlier projector is of another.
    """
    if kind not in KINDS:
        raise ValueError(f"The projector cannot be {kind!r} here: choose one of {', '.join(KINDS)}.")
    check_numbers(steps=steps, scenes=scenes)
    out = Path(out or Path("runs") / f"tiny_{kind}")
    stage, target = stage_of(tiny_peer, steps, seed), out / "model"
    model = with_new_projector(kind, seed) if start is None else with_earlier_projector(kind, Path(start))
    processor = AutoProcessor.from_pretrained(TINY)
    run_stage(stage, model, processor, out / stage.name)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    scores = evaluate_once(out / "scores.json", FamilyScore, lambda: evaluate_scenes(model, processor, scenes=scenes))
    blind_scores = [FamilyScore(**row) for row in json.loads((Path(TINY) / RECORD).read_text())["blind_scores"]]
    record = training_record((stage,), model, out, scores, blind_scores)
    if start is not None:
        record["start"] = {"sha256": file_hash(Path(start) / PROJECTOR)}
    (target / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    print(results_table(record))
    if embed:
        embed_projector(target, Path(TINY).with_name(f"tiny_{kind}"))
    return target


def with_new_projector(kind: str, seed: int, form: dict[str, Any] | None = None) -> MSResamplerForConditionalGeneration:
    """The embedded checkpoint with a new random projector, the only part that is trained; `form` has its fields."""
    embedded = MSResamplerForConditionalGeneration.from_pretrained(TINY)
    projector, config = embedded.config.projector_config, embedded.config.to_dict()
    sizes = {name: getattr(projector, name) for name in SIZES}
    config["projector_config"] = form or sizes | {"projector_type": kind, "query_grid": projector.visual_tokens}
    torch.manual_seed(seed)
    model = MSResamplerForConditionalGeneration(MSResamplerConfig.from_dict(config))
    model.model.vision_tower, model.model.language_model = embedded.model.vision_tower, embedded.model.language_model
    model.tie_weights()
    model.requires_grad_(False)
    model.model.projector.requires_grad_(True)
    return model


def with_earlier_projector(kind: str, folder: Path) -> MSResamplerForConditionalGeneration:
    """The same with the projector in a folder. Raises ValueError if that is of another kind."""
    form = read_config(folder)["projector_config"]
    if form["projector_type"] != kind:
        raise ValueError(f"{folder} holds the projector {form['projector_type']}, and {kind} is trained here.")
    model = with_new_projector(kind, 0, form)
    weights = load_file(folder / PROJECTOR)
    model.model.projector.load_state_dict({name.removeprefix("model.projector."): w for name, w in weights.items()})
    return model


def embed_projector(folder: Path, target: Path) -> None:
    """Copies a folder's projector, configuration and record into this package."""
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    write_projector(folder, fresh / PROJECTOR)
    for name in ("config.json", RECORD):
        shutil.copyfile(folder / name, fresh / name)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
