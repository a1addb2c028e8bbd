"""Converts ours to another projector, or assembles a projector with its tower and language model."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..assembly import Components, make_config
from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import PROJECTOR_PREFIXES
from ..processing_ms_resampler import MSResamplerProcessor
from .source import Parts, Source, Transforms, generation_of, grown_embeddings, local_folder, projector_start
from .tables import LANGUAGE_MODEL, OURS, TOWER
from .upcycling import upcycled_fields, upcycling
from .weights import list_weights


def open_ours(folder: Path, projector: dict[str, Any], tower: str | None, llm: str | None) -> Source:
    """Our model, or a projector alone; a single scope may become several.

    Raises ValueError if there is nothing to do, or if tower or language model are missing.
    """
    config: Any = MSResamplerConfig.from_pretrained(folder)
    weights, old = list_weights(folder), config.projector_config
    processor = MSResamplerProcessor.from_pretrained(folder)
    generation = generation_of(folder, config)
    fields, carried, begins = projector_start(old.projector_type, projector)
    wanted = fields["projector_type"]
    parts: Parts = [(weights, OURS)]
    transforms: Transforms = {}
    new: dict[str, Tensor] = {}
    if all(weight.key.startswith(PROJECTOR_PREFIXES) for weight in weights):
        models, transforms = around_projector(folder, config, tower, llm)
        parts += models
    elif old.projector_type == "resampler" and wanted in ("ms_resampler", "ms_resampler_branches"):
        config = with_projector(config, upcycled_fields(old, projector))
        transforms, new = upcycling(old, config.projector_config)
        carried, begins = True, False
    elif wanted != old.projector_type:
        budget = {} if old.projector_type == "mlp" else {"visual_tokens": old.visual_tokens}
        config = with_projector(config, budget | fields)
    elif projector.keys() - {"projector_type"}:
        raise ValueError(f"{folder} has a {wanted} projector already: there is nothing to convert.")
    processor.visual_tokens = config.projector_config.visual_tokens
    return Source("ours", config, parts, processor, generation, carried, begins, transforms, new)


def around_projector(folder: Path, config: Any, tower: str | None, llm: str | None) -> tuple[Parts, Transforms]:
    """The weights of tower and language model for a projector alone, and the transforms that add rows for new tokens.

    Raises ValueError if the models are not given.
    """
    if tower is None or llm is None:
        raise ValueError(f"{folder} holds a projector alone: name the models it belongs to with --tower and --llm.")
    parts = [(list_weights(local_folder(llm)), LANGUAGE_MODEL), (list_weights(local_folder(tower)), TOWER)]
    rows = next((weight.shape[0] for weight in parts[0][0] if weight.key.endswith("embed_tokens.weight")), 0)
    wanted = config.text_config.vocab_size
    return parts, grown_embeddings(wanted) if rows < wanted else {}


def with_projector(config: Any, fields: dict[str, Any]) -> Any:
    """A configuration with another projector."""
    components = Components("", "", fields, config.vision_feature_layer, config.vision_prefix_tokens)
    made = make_config(components, config.vision_config, config.text_config, config.image_token_id)
    made.visual_words = config.visual_words
    return made
