"""Honeybee's checkpoints with a C- or a D-Abstractor: tower, projector and language model in one."""

import math
from pathlib import Path
from typing import Any

from transformers import AutoConfig, CLIPImageProcessorPil, CLIPVisionConfig

from ..assembly import Components, choose_template, load_tokenizer, make_config
from ..processing_ms_resampler import MSResamplerProcessor
from .from_original import original_names
from .source import Source, Transforms, add_image_token, generation_of, local_folder, projector_start
from .tables import ABSTRACTOR_PREFIX, HONEYBEE, with_projector_rows
from .weights import Weight, list_weights

# The published abstractors, each with the values of fields that ours cannot vary, which are also the defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "c-abs": {"mlp_depth": 2, "num_eos_tokens": 0, "prenorm": False, "pos_emb": True},
    "d-abs": {"num_eos_tokens": 0, "pos_emb": True, "pooled_v_target": "query", "num_feature_levels": 1}
    | {"decoder_n_points": 4, "activation_function": "relu"},
}


def open_honeybee(folder: Path, about: dict[str, Any], projector: dict[str, Any], llm: str | None) -> Source:
    """Honeybee's model; its tokenizer is the language model's, which the folder may lack.

    Raises ValueError if the projector is not an abstractor, or the tokenizer is missing.
    """
    if llm is None and not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer: name its language model with --llm.")
    own, layer = abstractor_fields(folder, about)
    weights, tokenizer = list_weights(folder), load_tokenizer(str(local_folder(llm or folder)))
    vision, told = CLIPVisionConfig.from_dict(about["vision_config"]), dict(about["text_config"])
    text = AutoConfig.for_model(told.pop("model_type"), **told)
    token_id, transforms = add_image_token(tokenizer, text)
    fields, carried, begins = projector_start(own["projector_type"], projector)
    components = Components("", str(folder), own | fields if carried else fields, layer, chat_template="honeybee")
    config: Any = make_config(components, vision, text, token_id)
    template, _ = choose_template(tokenizer, components)
    tokenizer.chat_template = None
    return Source(
        "Honeybee's",
        config,
        [(weights, with_projector_rows(HONEYBEE, ABSTRACTOR_PREFIX, original_names(own, vision, text)))],
        MSResamplerProcessor(
            image_processor(about["vision_config"]),
            tokenizer,
            patch_size=config.patch_size,
            visual_tokens=config.projector_config.visual_tokens,
            chat_template=template,
        ),
        generation_of(folder, config),
        carried=carried,
        begins=begins,
        transforms=transforms | positions_of_patches(weights, config),
    )


def abstractor_fields(folder: Path, about: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The fields of a checkpoint's projector, and the tower layer that it reads.

    Raises ValueError if it is not an abstractor as published.
    """
    told = about.get("visual_projector_config") or about["projector_config"]
    kind = told.get("projector_type", "c-abs")
    published = PUBLISHED.get(kind, {"projector_type": "c-abs"})
    other = {name: told[name] for name, value in published.items() if told.get(name, value) != value}
    if other:
        raise ValueError(f"{folder} has a projector other than Honeybee's published abstractors: {other}.")
    side = math.isqrt(about.get("num_query_tokens") or told["num_query_tokens"])
    grid = {"visual_tokens": [side, side], "query_grid": [side, side]}
    if kind == "c-abs":
        sizes = {"hidden_size": told["hidden_size"], "num_hidden_layers": told["depth"], "num_attention_heads": 1}
        return {"projector_type": "c_abstractor", **sizes, **grid}, told["feature_layer_index"]
    sizes = {
        "hidden_size": told["d_model"],
        "num_hidden_layers": told["decoder_layers"],
        "num_attention_heads": told.get("decoder_attention_heads", 8),
        "intermediate_size": told.get("decoder_ffn_dim", 1024),
    }
    return {"projector_type": "d_abstractor", **sizes, **grid}, told["feature_layer_index"]


def image_processor(about: dict[str, Any]) -> CLIPImageProcessorPil:
    """Resizes pictures of any shape to squares, as Honeybee's code does."""
    side = {"height": about["image_size"], "width": about["image_size"]}
    moments = {name: about[name] for name in ("image_mean", "image_std") if name in about}
    return CLIPImageProcessorPil(size=side, do_center_crop=False, **moments)


def positions_of_patches(weights: list[Weight], config: Any) -> Transforms:
    """A transform that drops the class token's position, which early checkpoints have, from the projector's table."""
    patches = math.prod(config.native_patch_grid)
    table = next((weight for weight in weights if weight.key == f"{ABSTRACTOR_PREFIX}pos_emb"), None)
    if table is None or table.shape[1] == patches:
        return {}
    return {"model.projector.position": lambda positions_1NC: positions_1NC[0, -patches:]}
