"""Checkpoints of the original repositories of LLaVA, TokenPacker, Delta-LLaVA, MQT, LLaVA-Mini and MobileVLM."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from ..assembly import Components, choose_template, load_tokenizer, make_config, tower_config_of
from ..folders import read_config
from ..projectors_ms_resampler import PROJECTORS, rename
from .source import Source, add_image_token, generation_of, local_folder, make_processor, projector_start
from .tables import (
    BASE_PREFIX,
    COMPRESSOR_PREFIX,
    FUSION_PREFIX,
    LANGUAGE_MODEL,
    ORIGINAL,
    PROJECTOR_PREFIX,
    TOWER,
    with_projector_rows,
)
from .weights import Weight, list_weights

# The original repositories' model types of language models, and transformers'.
ORIGINAL_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mini_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "mobilevlm": "llama",
}
# Projectors of original checkpoints, and fields derived from their weights; heads are as published.
ORIGINAL_PROJECTORS: dict[str, Callable[[dict[str, Weight]], dict[str, Any]]] = {
    "mlp": lambda found: {},
    "ldp": lambda found: {},
    "ldp_v2": lambda found: {},
    "token_packer": lambda found: {"hidden_size": found["q_proj_1.weight"].shape[0], "num_attention_heads": 8},
    "delta_llava": lambda found: {
        "hidden_size": found["clip_attn.out_proj.weight"].shape[0],
        "num_attention_heads": 8,
    },
    "mqt": lambda found: {
        "hidden_size": found["query"].shape[1],
        "num_attention_heads": max(found["query"].shape[1] // 64, 1),
        "query_grid": [math.isqrt(found["query"].shape[0])] * 2,
    },
    "llava_mini": lambda found: {
        "hidden_size": found["compressor.query"].shape[1],
        "num_attention_heads": 8,
        "query_grid": [math.isqrt(found["compressor.query"].shape[0])] * 2,
        "visual_tokens": found["compressor.query"].shape[0],
    },
}
# Hard-coded in the originals, whatever their config.json says.
LAYERS = {"token_packer": [12, 16, 22, 23], "delta_llava": [12, 16, 22, 23]}


def open_original(
    folder: Path, about: dict[str, Any], projector: dict[str, Any], tower: str | None, llm: str | None
) -> Source:
    """An original repository's checkpoint: whole, or a projector alone beside the language model `llm`."""
    weights = list_weights(folder)
    mini = any(weight.key.startswith(COMPRESSOR_PREFIX) for weight in weights)
    prefix, parts = (BASE_PREFIX if mini else PROJECTOR_PREFIX), (PROJECTOR_PREFIX, COMPRESSOR_PREFIX)
    found = {weight.key.removeprefix(prefix): weight for weight in weights if weight.key.startswith(parts)}
    whole = any(weight.key.startswith("model.layers.") for weight in weights)
    if not whole and llm is None:
        raise ValueError(f"{folder} holds a projector alone: name its language model with --llm.")
    base = folder if whole else local_folder(str(llm))
    place = local_folder(tower or about["mm_vision_tower"])
    tokenizer = load_tokenizer(str(base))
    text = original_text_config(about if whole else read_config(base))
    token_id, transforms = add_image_token(tokenizer, text)
    vision = tower_config_of(str(place))
    own, names = original_projector(found, vision, text)
    if mini:
        fusion = {weight.key.split(".")[2] for weight in weights if weight.key.startswith(FUSION_PREFIX)}
        own["fusion_layers"] = len(fusion)
    kind, layers = own["projector_type"], about.get("mm_vision_select_layer", -2)
    if isinstance(layers, int):
        layers = LAYERS.get(kind, layers)
    fields, carried, begins = projector_start(kind, projector)
    fields = own | fields if fields["projector_type"] == kind else fields
    components = Components(str(place), str(base), fields, layers)
    config = make_config(components, vision, text, token_id)
    template, _ = choose_template(tokenizer, components)
    tokenizer.chat_template = None
    return Source(
        "the original LLaVA's",
        config,
        [
            (weights, with_projector_rows(ORIGINAL, prefix, names)),
            *([] if whole else [(list_weights(base), LANGUAGE_MODEL)]),
            *([] if any("vision_tower" in weight.key for weight in weights) else [(list_weights(place), TOWER)]),
        ],
        make_processor(place, tokenizer, config, "<image>", template),
        generation_of(base, config),
        carried=carried,
        begins=begins,
        transforms=transforms,
    )


def original_text_config(about: dict[str, Any]) -> PretrainedConfig:
    """transformers' configuration of the language model in an original config.json."""
    kind = ORIGINAL_MODELS.get(about["model_type"], about["model_type"])
    multimodal = (
        "mm_",
        "image_",
        "compressor_",
        "prefusion_",
        "tune_",
        "freeze_",
        "use_mm",
        "vision_",
        "auto_map",
        "architectures",
        "model_type",
    )
    fields = {name: value for name, value in about.items() if not name.startswith(multimodal)}
    return AutoConfig.for_model(kind, **fields)


def original_projector(
    found: dict[str, Weight], vision: PretrainedConfig, text: PretrainedConfig
) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the projector with weights of these names, and our names with theirs.

    Raises ValueError if no projector matches.
    """
    for kind, sizes in ORIGINAL_PROJECTORS.items():
        with suppress(KeyError):  # a name that only this projector has
            fields = {"projector_type": kind, **sizes(found)}
            names = original_names(fields, vision, text)
            if set(names.values()) == set(found):
                return fields, names
    raise ValueError(
        f"The projector is none of {', '.join(ORIGINAL_PROJECTORS)}: it has the weights {', '.join(sorted(found)[:8])}."
    )


def original_names(fields: dict[str, Any], vision: PretrainedConfig, text: PretrainedConfig) -> dict[str, str]:
    """The weights of a projector with these fields: our names, and the original's."""
    config = make_config(Components("", "", fields, -2), vision, text, image_token_id=0)
    with torch.device("meta"):
        projector: Any = PROJECTORS[fields["projector_type"]](config)
    return rename(projector.state_dict(), projector.original_names)
