"""Converts any source to a model folder of ours, strict about every weight."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..configuration_ms_resampler import token_grid
from ..folders import PROJECTOR_PREFIXES
from ..fusion_ms_resampler import PreFusion
from ..projectors_ms_resampler import build_projector
from .mapping import Plan, Row
from .source import Source, empty_model
from .tables import translate
from .weights import Output, Weight


def plan_ours(source: Source) -> Plan:
    """Maps every weight. Raises ValueError, with their names, if some do not fit or are missing."""
    token_grid(source.config.projector_config.visual_tokens, source.config.native_patch_grid)  # raises if impossible
    wanted = wanted_weights(source)
    outputs, rows, problems = {}, [], []
    for weight, target in pairs(source):
        place = wanted.get(target) if target else None
        if target is None or place is None:
            if target is not None and not may_be_left(source, target):
                problems.append(f"{weight.key} has no place")
            part_of = source.joined.get(weight.key, "")
            rows.append(Row(weight.key, part_of, weight.shape, "changed" if part_of else "unused"))
            continue
        output = output_of(source, weight, target, place)
        if output.shape != place:
            problems.append(f"{weight.key} is {list(weight.shape)} instead of {list(place)}")
        changed = target in source.transforms
        rows.append(Row(weight.key, target, place, "changed" if changed else "as it is"))
        outputs[target] = output
    fresh = new_weights(source, wanted.keys() - outputs.keys())
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - outputs.keys() - fresh.keys())]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"The weights do not fit {source.layout} layout: {'; '.join(problems[:5])}{more}.")
    dtype = next(iter(outputs.values())).dtype
    for name, value in fresh.items():
        outputs[name] = Output(name, tuple(value.shape), dtype, partial(torch.clone, value))
        rows.append(Row("", name, tuple(value.shape), "new"))
    note = "" if source.carried else "Nothing of the old projector fits the new one, which starts at random."
    return Plan(source.layout, rows, list(outputs.values()), partial(write_settings, source), note=note)


def wanted_weights(source: Source) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a saved model, without a tied head."""
    shapes = {name: tuple(value.shape) for name, value in empty_model(source.config).state_dict().items()}
    if source.config.text_config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def pairs(source: Source) -> list[tuple[Weight, str | None]]:
    """Every weight with our name for it, in the order of the files. Raises ValueError if a table does not know one."""
    found = []
    for weights, table in source.parts:
        for weight in weights:
            try:
                found.append((weight, translate(weight.key, table)))
            except KeyError as error:
                raise ValueError(f"{weight.file} holds {weight.key}, which {source.layout} layout lacks.") from error
    return [(weight, None if replaced(source, target) else target) for weight, target in found]


def replaced(source: Source, target: str | None) -> bool:
    """Whether a weight belongs to a projector that is replaced."""
    return target is not None and target.startswith(PROJECTOR_PREFIXES) and not source.carried


def may_be_left(source: Source, target: str) -> bool:
    """Whether a weight may be unused: a tied head, a tower's pooler, and the gate of a single scope."""
    tied = target == "lm_head.weight" and source.config.text_config.tie_word_embeddings
    return tied or ".vision_tower.pooler." in target or (bool(source.new) and ".gate" in target)


def output_of(source: Source, weight: Weight, target: str, place: tuple[int, ...]) -> Output:
    """A function that returns the weight to write: unchanged, reshaped as some originals need, or transformed."""
    change = source.transforms.get(target)
    if change is not None:
        return Output(target, place, weight.dtype, lambda: change(weight.read()))
    same = torch.Size(weight.shape).numel() == torch.Size(place).numel()
    shape = place if same and target.startswith("model.projector.") else weight.shape
    return Output(target, shape, weight.dtype, lambda: weight.read().reshape(shape))


def new_weights(source: Source, missing: set[str]) -> dict[str, Tensor]:
    """Initialised weights: those of a new projector, and those that upcycling adds."""
    state = source.new
    if source.begins:
        projector = build_projector(source.config)
        projector.apply(empty_model(source.config).model._init_weights)
        state = {f"model.projector.{name}": value for name, value in projector.state_dict().items()}
        if source.config.projector_config.fusion_layers:
            fusion = PreFusion(source.config).state_dict()
            state |= {f"model.fusion.{name}": value for name, value in fusion.items()}
    return {name: value for name, value in state.items() if name in missing}


def write_settings(source: Source, folder: Path) -> None:
    """Writes the configuration, the processor, the generation settings and the code."""
    model = empty_model(source.config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    source.generation.save_pretrained(folder)
    source.processor.save_pretrained(folder)
