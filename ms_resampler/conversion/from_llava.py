"""transformers' LLaVA, LLaVA-NeXT and LLaVA-OneVision as ours.

The two latter cut pictures into tiles, and put a learned `image_newline` after each row of patches. Here it is a word:
a token of the tokenizer, whose row of the embeddings it is, if the projector keeps every patch.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    SiglipImageProcessor,
)

from ..assembly import ROWS, Components, load_tokenizer, make_config
from ..folders import read_config
from ..processing_ms_resampler import MSResamplerProcessor
from ..tiles_ms_resampler import MOST_TILES
from ..towers_ms_resampler import read_tower
from .source import Source, Transforms, generation_of, grown_embeddings, make_processor, projector_start
from .tables import LLAVA
from .weights import list_weights

CONFIGS: dict[str, Any] = {"llava": LlavaConfig, "llava_next": LlavaNextConfig, "llava_onevision": LlavaOnevisionConfig}
NEWLINE = "<image_newline>"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
PREFIXES = {"default": 1, "full": 0}  # tokens before the patches that a way of selecting features fits


def open_llava(folder: Path, projector: dict[str, Any]) -> Source:
    """A LLaVA of transformers: tower, language model and, if it stays an MLP, the projector."""
    kind = read_config(folder)["model_type"]
    llava: Any = CONFIGS[kind].from_pretrained(folder)
    strategy = llava.vision_feature_select_strategy
    if PREFIXES[strategy] != read_tower(llava.vision_config).prefix_tokens:
        raise ValueError(
            f'{folder} reads the tower with vision_feature_select_strategy="{strategy}": only all patches, without the '
            "class token if there is one, can be converted."
        )
    if llava.projector_hidden_act != "gelu" or not llava.multimodal_projector_bias:
        raise ValueError(f"{folder} has a projector other than LLaVA's (Linear, GELU, Linear, with biases).")
    tokenizer = load_tokenizer(str(folder))
    token = tokenizer.convert_ids_to_tokens(llava.image_token_id)
    fields, carried, begins = projector_start("mlp", projector)
    components = Components("", "", fields, llava.vision_feature_layer, image_token=token)
    newline = kind != "llava" and fields["projector_type"] == "mlp"
    row, transforms = add_newline(folder, tokenizer, llava.text_config) if newline else (None, {})
    config = make_config(components, llava.vision_config, llava.text_config, llava.image_token_id)
    config.dtype = llava.dtype
    processor = make_processor(folder, tokenizer, config, token, llava_template(folder))
    generation = generation_of(folder, config)
    if kind != "llava":
        cut_like(processor, llava)
    if newline:
        processor.visual_tokens, processor.newline_token = None, NEWLINE
        generation.suppress_tokens = [config.image_token_id, tokenizer.get_vocab()[NEWLINE]]
    made = Source(
        f"transformers' {kind}" if kind != "llava" else "transformers' LLaVA",
        config,
        [(list_weights(folder), LLAVA)],
        processor,
        generation,
        carried=carried,
        begins=begins,
        transforms=transforms,
    )
    return made if row is None else replace(made, joined={row: EMBEDDINGS})


def add_newline(folder: Path, tokenizer: Any, text: PretrainedConfig) -> tuple[str, Transforms]:
    """Adds the newline to the tokenizer; returns the name of its weight, and the transforms that make it a row."""
    (weight,) = (weight for weight in list_weights(folder) if weight.key.rpartition(".")[2] == "image_newline")
    tokenizer.add_tokens([NEWLINE], special_tokens=True)
    place, rows = tokenizer.get_vocab()[NEWLINE], text.vocab_size
    if place >= rows:
        text.vocab_size = -(-(place + 1) // ROWS) * ROWS
    grow = grown_embeddings(text.vocab_size)

    def with_newline(table: Tensor) -> Tensor:
        rows = grow[EMBEDDINGS](table).clone()
        rows[place] = weight.read().to(rows.dtype)
        return rows

    return weight.key, grow | {EMBEDDINGS: with_newline}


def cut_like(processor: MSResamplerProcessor, llava: Any) -> None:
    """Makes a processor cut pictures into the tiles of LLaVA-NeXT or LLaVA-OneVision.

    Raises ValueError if these are not of the tower's size.
    """
    theirs, side = processor.image_processor, llava.vision_config.image_size
    if any(height % side or width % side for height, width in llava.image_grid_pinpoints):
        raise ValueError(f"`image_grid_pinpoints` {llava.image_grid_pinpoints} are no multiples of {side} pixels.")
    limit = getattr(llava, "vision_aspect_ratio", "").removeprefix("anyres_max_")
    most = min(int(limit) if limit.isdigit() else MOST_TILES, MOST_TILES)
    grids = [(height // side, width // side) for height, width in llava.image_grid_pinpoints]
    processor.tiles = [grid for grid in grids if grid[0] * grid[1] <= most]
    processor.image_processor = one_view(theirs, side)


def one_view(theirs: Any, side: int) -> Any:
    """The image processor of one view of (side, side) pixels with the values of another."""
    names = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
    values = {name: getattr(theirs, name) for name in names}
    square = {"height": side, "width": side}
    if theirs.do_center_crop:
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square, **values)
    return SiglipImageProcessor(size=square, **values)


def llava_template(folder: Path) -> str | None:
    """The chat template of a processor, from its separate file."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    return None
