"""transformers' LLaVA as ours."""

import json
from pathlib import Path
from typing import Any

from transformers import LlavaConfig

from ..assembly import Components, load_tokenizer, make_config
from .source import Source, generation_of, make_processor, projector_start
from .tables import LLAVA
from .weights import list_weights


def open_llava(folder: Path, projector: dict[str, Any]) -> Source:
    """transformers' LLaVA: tower, language model and, if it stays an MLP, the projector."""
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
    components = Components("", "", fields, llava.vision_feature_layer, image_token=token)
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


def llava_template(folder: Path) -> str | None:
    """The chat template of a processor, from its separate file."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    return None
