"""What a checkpoint of each layout becomes: our configuration, tables of names, and the processor."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    GenerationConfig,
    LlavaConfig,
    PretrainedConfig,
)

from ..assembly import ROWS, Components, choose_template, load_tokenizer, make_config, tower_config_of
from ..configuration_ms_resampler import MSResamplerConfig
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..processing_ms_resampler import MSResamplerProcessor
from ..projectors_ms_resampler import PROJECTORS, rename
from .tables import LANGUAGE_MODEL, LLAVA, OURS, PROJECTOR_PREFIX, TOWER, Table, original_table
from .upcycling import upcycled_fields, upcycling
from .weights import Weight, list_weights

# The original repositories' names of their language models, and transformers'.
ORIGINAL_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "mobilevlm": "llama",
}
# Projectors of original checkpoints, and the fields that their weights tell; heads are as published.
ORIGINAL_PROJECTORS: dict[str, Callable[[dict[str, Weight]], dict[str, Any]]] = {
    "mlp": lambda found: {},
    "ldp_v2": lambda found: {},
    "token_packer": lambda found: {"hidden_size": found["q_proj_1.weight"].shape[0], "num_attention_heads": 8},
    "mqt": lambda found: {
        "hidden_size": found["query"].shape[1],
        "num_attention_heads": max(found["query"].shape[1] // 64, 1),
        "query_grid": [math.isqrt(found["query"].shape[0])] * 2,
    },
}
TOKEN_PACKER_LAYERS = [12, 16, 22, 23]  # written into its code, whatever its config.json says
Transforms = dict[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert: what it becomes, and where each weight comes from.

    `transforms` change a weight on its way, by our name; `new` are weights that no source has; `carried` says whether
    the source's projector goes along, and `begins` whether what is missing of the projector starts anew.
    """

    layout: str
    config: Any  # MSResamplerConfig, its parts built
    parts: list[tuple[list[Weight], Table]]
    processor: MSResamplerProcessor
    generation: GenerationConfig
    carried: bool = True
    begins: bool = False
    transforms: Transforms = field(default_factory=dict)
    new: dict[str, Tensor] = field(default_factory=dict)


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises ValueError if it is missing or damaged."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no checkpoint: it has no config.json.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: it is no JSON ({error}).") from error
    return config


def open_source(folder: Path, projector: dict[str, Any], tower: str | None, llm: str | None) -> Source:
    """Recognises a checkpoint's layout and reads what it is, all but the weights.

    Raises ValueError, with what was found, if it is none of those known.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind == "ms_resampler":
        return open_ours(folder, projector)
    if kind == "llava" and "vision_config" in config:
        return open_llava(folder, projector)
    if kind in ORIGINAL_MODELS and "mm_vision_tower" in config:
        return open_original(folder, config, projector, tower, llm)
    keys = [weight.key for weight in list_weights(folder)]
    raise ValueError(
        f"{folder} is of no layout known here (transformers' LLaVA; the original LLaVA's, TokenPacker's, MobileVLM's; "
        f'ours): its model_type is "{kind}", and its {len(keys)} weights begin with '
        f"{', '.join(sorted({key.split('.')[0] for key in keys})[:6])}."
    )


def open_llava(folder: Path, projector: dict[str, Any]) -> Source:
    """transformers' LLaVA: tower, language model and, if the projector stays an MLP, that too."""
    llava: Any = LlavaConfig.from_pretrained(folder)
    if llava.vision_feature_select_strategy != "default":
        raise ValueError(
            f'{folder} reads the tower with vision_feature_select_strategy="{llava.vision_feature_select_strategy}": '
            'only "default", without the class token, can be converted.'
        )
    if llava.projector_hidden_act != "gelu" or not llava.multimodal_projector_bias:
        raise ValueError(f"{folder} has a projector other than LLaVA's (Linear, GELU, Linear, with biases).")
    tokenizer = load_tokenizer(str(folder))
    token = tokenizer.convert_ids_to_tokens(llava.image_token_id)
    fields, carried, begins = projector_start("mlp", projector)
    components = Components("", "", fields, llava.vision_feature_layer, token)
    config = make_config(components, llava.vision_config, llava.text_config, llava.image_token_id)
    config.dtype = llava.dtype
    return Source(
        "transformers' LLaVA",
        config,
        [(list_weights(folder), LLAVA)],
        make_processor(folder, tokenizer, config, token, llava_template(folder)),
        generation_of(folder, config),
        carried=carried,
        begins=begins,
    )


def projector_start(old: str, asked: dict[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """The fields of the projector that is asked for in an old one's place, and Source's `carried` and `begins`.

    LLaVA's MLP goes along to what can start as the MLP of the mean of each cell, unless that is not wanted.
    """
    new = asked.get("projector_type", old)
    fields = asked | {"projector_type": new}
    if old == "mlp" and new in ("ms_resampler", "resampler"):
        fields = {"pooled_mlp": True} | fields
    same = new == old or (old, new) == ("mlp", "avg_pool")
    return fields, same or (old == "mlp" and bool(fields.get("pooled_mlp"))), not same


def llava_template(folder: Path) -> str | None:
    """The chat template of a processor, which is in a file of its own."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    return None


def open_original(
    folder: Path, about: dict[str, Any], projector: dict[str, Any], tower: str | None, llm: str | None
) -> Source:
    """An original repository's checkpoint: whole, or a projector alone beside the language model `llm`."""
    tower = tower or about["mm_vision_tower"]
    if not Path(tower).is_dir():
        raise ValueError(f"The vision tower {tower} is none of the checkpoint's files: give its folder with --tower.")
    weights = list_weights(folder)
    found = {weight.key.removeprefix(PROJECTOR_PREFIX): weight for weight in weights if PROJECTOR_PREFIX in weight.key}
    whole = any(weight.key.startswith("model.layers.") for weight in weights)
    if not whole and llm is None:
        raise ValueError(f"{folder} holds a projector alone: give its language model's folder with --llm.")
    base = folder if whole else Path(str(llm))
    tokenizer = load_tokenizer(str(base))
    text = original_text_config(about if whole else read_config(base))
    rows = text.vocab_size
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    token_id = tokenizer.get_vocab()["<image>"]
    if token_id >= rows:
        text.vocab_size = -(-(token_id + 1) // ROWS) * ROWS
    vision = tower_config_of(tower)
    own, names = original_projector(found, vision, text)
    kind, layers = own["projector_type"], about.get("mm_vision_select_layer", -2)
    if kind == "token_packer" and isinstance(layers, int):
        layers = TOKEN_PACKER_LAYERS
    fields, carried, begins = projector_start(kind, projector)
    fields = own | fields if fields["projector_type"] == kind else fields
    components = Components(tower, str(base), fields, layers)
    config = make_config(components, vision, text, token_id)
    template, _ = choose_template(tokenizer, components)
    tokenizer.chat_template = None
    return Source(
        "the original LLaVA's",
        config,
        [
            (weights, original_table(names)),
            *([] if whole else [(list_weights(base), LANGUAGE_MODEL)]),
            *([] if any("vision_tower" in weight.key for weight in weights) else [(list_weights(Path(tower)), TOWER)]),
        ],
        make_processor(Path(tower), tokenizer, config, "<image>", template),
        generation_of(base, config),
        carried=carried,
        begins=begins,
        transforms=grown_embeddings(text.vocab_size) if text.vocab_size > rows else {},
    )


def original_text_config(about: dict[str, Any]) -> PretrainedConfig:
    """The language model of an original repository's config.json, in transformers' words."""
    kind = ORIGINAL_MODELS.get(about["model_type"], about["model_type"])
    multimodal = ("mm_", "image_", "tune_", "freeze_", "use_mm", "vision_", "auto_map", "architectures", "model_type")
    fields = {name: value for name, value in about.items() if not name.startswith(multimodal)}
    return AutoConfig.for_model(kind, **fields)


def original_projector(
    found: dict[str, Weight], vision: PretrainedConfig, text: PretrainedConfig
) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the projector whose weights these are, by their names, and our names with theirs.

    Raises ValueError if they are none's.
    """
    for kind, sizes in ORIGINAL_PROJECTORS.items():
        with suppress(KeyError):  # a name that another projector has not
            fields = {"projector_type": kind, **sizes(found)}
            config = make_config(Components("", "", fields, -2), vision, text, image_token_id=0)
            with torch.device("meta"):
                projector: Any = PROJECTORS[kind](config)
            names = rename(projector.state_dict(), projector.original_names)
            if set(names.values()) == set(found):
                return fields, names
    raise ValueError(
        f"The projector is none of {', '.join(ORIGINAL_PROJECTORS)}: it has the weights {', '.join(sorted(found)[:8])}."
    )


def grown_embeddings(rows: int) -> Transforms:
    """Tables of words with rows for new tokens, which start as the mean of the others."""

    def grow(table: Tensor) -> Tensor:
        mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
        return torch.cat([table, mean.expand(rows - len(table), -1)])

    return {"model.language_model.embed_tokens.weight": grow, "lm_head.weight": grow}


def open_ours(folder: Path, projector: dict[str, Any]) -> Source:
    """Ours; with a single scope it may become several."""
    config: Any = MSResamplerConfig.from_pretrained(folder)
    weights, old = list_weights(folder), config.projector_config
    processor = MSResamplerProcessor.from_pretrained(folder)
    generation = generation_of(folder, config)
    fields, carried, begins = projector_start(old.projector_type, projector)
    wanted = fields["projector_type"]
    transforms: Transforms = {}
    new: dict[str, Tensor] = {}
    if (old.projector_type, wanted) == ("resampler", "ms_resampler"):
        config = with_projector(config, upcycled_fields(old, projector))
        transforms, new = upcycling(old, config.projector_config)
        carried, begins = True, False
    elif wanted != old.projector_type:
        config = with_projector(config, fields)
    elif projector.keys() - {"projector_type"}:
        raise ValueError(f"{folder} has a {wanted} projector already: there is nothing to convert.")
    processor.visual_tokens = config.projector_config.visual_tokens
    return Source("ours", config, [(weights, OURS)], processor, generation, carried, begins, transforms, new)


def with_projector(config: Any, fields: dict[str, Any]) -> Any:
    """A configuration with another projector."""
    components = Components("", "", fields, config.vision_feature_layer)
    return make_config(components, config.vision_config, config.text_config, config.image_token_id)


def make_processor(folder: Path, tokenizer: Any, config: Any, token: str, template: str | None) -> MSResamplerProcessor:
    """Our processor around the source's tokenizer and image processor."""
    return MSResamplerProcessor(
        AutoImageProcessor.from_pretrained(folder),
        tokenizer,
        patch_size=config.patch_size,
        visual_tokens=config.projector_config.visual_tokens,
        image_token=token,
        chat_template=template,
    )


def generation_of(folder: Path, config: Any) -> GenerationConfig:
    """The source's settings for generation, which never write an image."""
    if (folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(folder)
    else:
        settings = GenerationConfig.from_model_config(config.text_config)
    settings.suppress_tokens = [config.image_token_id]
    return settings


def empty_model(config: MSResamplerConfig) -> Any:
    """The model's shapes, without memory."""
    with torch.device("meta"):
        return MSResamplerForConditionalGeneration(config)
