"""A checkpoint to convert, and what all layouts have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, GenerationConfig, PretrainedConfig

from ..assembly import ROWS
from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import model_or_embedded
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..processing_ms_resampler import MSResamplerProcessor
from ..projectors_ms_resampler import SCOPED_PROJECTORS
from .tables import Table
from .weights import Weight

Parts = list[tuple[list[Weight], Table]]
Transforms = dict[str, Callable[[Tensor], Tensor]]
SETTINGS = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")  # downloaded besides the weights


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert: the resulting configuration, and where each weight comes from.

    `transforms` change weights, by our name; `new` are weights that no source has; `carried` says whether the source's
    projector is kept, and `begins` whether missing projector weights are initialised. `joined` has the sources' names
    of weights that become part of another, with our name of that.
    """

    layout: str
    config: Any  # MSResamplerConfig with its parts
    parts: Parts
    processor: MSResamplerProcessor
    generation: GenerationConfig
    carried: bool = True
    begins: bool = False
    transforms: Transforms = field(default_factory=dict)
    new: dict[str, Tensor] = field(default_factory=dict)
    joined: dict[str, str] = field(default_factory=dict)


def projector_start(old: str, asked: dict[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """The fields of the requested projector, and Source's `carried` and `begins`.

    LLaVA's MLP is kept if the new projector can start as the MLP of each cell's mean, unless `pooled_mlp` is false.
    """
    new = asked.get("projector_type", old)
    fields = asked | {"projector_type": new}
    if old == "mlp" and new in SCOPED_PROJECTORS:
        fields = {"pooled_mlp": True} | fields
    same = new == old or (old, new) == ("mlp", "avg_pool")
    return fields, same or (old == "mlp" and bool(fields.get("pooled_mlp"))), not same


def local_folder(source: str | Path) -> Path:
    """A folder, or a Hub repository's downloaded weights and settings.

    Raises ValueError or OSError, with the name, if it is neither or cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if Path(source).exists():
        return Path(source)
    name = model_or_embedded(str(source))
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*SETTINGS, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=[*SETTINGS, "*.bin"])
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(f"{name} is not a folder, and cannot be downloaded: {' '.join(str(error).split())}") from error
    return folder


def add_image_token(tokenizer: Any, text: PretrainedConfig) -> tuple[int, Transforms]:
    """Adds `<image>` to the tokenizer; returns its id, and transforms that add its row to the embeddings if needed."""
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    token_id, rows = tokenizer.get_vocab()["<image>"], text.vocab_size
    if token_id < rows:
        return token_id, {}
    text.vocab_size = -(-(token_id + 1) // ROWS) * ROWS
    return token_id, grown_embeddings(text.vocab_size)


def grown_embeddings(rows: int) -> Transforms:
    """Embeddings with rows for new tokens, which start as the mean of the others."""

    def grow(table: Tensor) -> Tensor:
        mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
        return torch.cat([table, mean.expand(rows - len(table), -1)])

    return {"model.language_model.embed_tokens.weight": grow, "lm_head.weight": grow}


def make_processor(folder: Path, tokenizer: Any, config: Any, token: str, template: str | None) -> MSResamplerProcessor:
    """Our processor around the source's tokenizer and image processor."""
    return MSResamplerProcessor(
        AutoImageProcessor.from_pretrained(folder),
        tokenizer,
        patch_size=config.patch_size,
        visual_tokens=config.projector_config.visual_tokens,
        video_form=config.projector_config.video_form,
        image_token=token,
        chat_template=template,
    )


def generation_of(folder: Path, config: Any) -> GenerationConfig:
    """The source's generation settings, which ban the image token."""
    if (folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(folder)
    else:
        settings = GenerationConfig.from_model_config(config.text_config)
    settings.suppress_tokens = [config.image_token_id]
    return settings


def empty_model(config: MSResamplerConfig) -> Any:
    """The model without weights, for its shapes."""
    with torch.device("meta"):
        return MSResamplerForConditionalGeneration(config)
