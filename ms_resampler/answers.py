"""`ask`: answers a question about pictures or a video with a model."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import TextStreamer

from .folders import our_model
from .modeling_ms_resampler import MSResamplerForConditionalGeneration
from .processing_ms_resampler import MSResamplerProcessor

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Answer:
    """An answer, and how the model read the pictures, with one entry per picture, and at last one for the video.

    visual_tokens: M of each picture. scope_weights: the mean fusion weight of each scope over the picture's visual
    tokens, by scope name; None unless requested. milliseconds: time to the complete answer, without loading the model.
    """

    text: str
    visual_tokens: list[int]
    scope_weights: list[dict[str, float]] | None
    milliseconds: float


class PieceStreamer(TextStreamer):
    """Passes the pieces of an answer to a function as they are generated."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def load(
    model: str | Path | None = None, revision: str | None = None
) -> tuple[MSResamplerForConditionalGeneration, MSResamplerProcessor]:
    """Loads model and processor with this package's code, on the GPU if there is one, else with packed weights.

    `model` is a folder or a Hub repository; None is the embedded checkpoint. Raises ValueError if it is another
    type of model, OSError if it cannot be loaded.
    """
    name = our_model(model, revision)
    try:
        processor = MSResamplerProcessor.from_pretrained(name, revision=revision)
        loaded: Any = MSResamplerForConditionalGeneration.from_pretrained(name, revision=revision, dtype="auto")
    except SafetensorError as error:
        raise OSError(f"The weights of {name} are damaged or not complete ({error}): copy them again.") from error
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu").pack_weights(), processor


@torch.inference_mode()
def ask(
    question: str,
    pictures: Picture | Sequence[Picture] = (),
    model: str | Path | MSResamplerForConditionalGeneration | None = None,
    processor: MSResamplerProcessor | None = None,
    *,
    revision: str | None = None,
    visual_tokens: int | str | tuple[int, int] | None = None,
    visual_tokens_total: int | None = None,
    tiles: int | tuple[int, int] | None = None,
    video: str | Path | Sequence[Picture] | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    reducer: Mapping[str, Any] | None = None,
    max_new_tokens: int = 256,
    scopes: bool = False,
    on_text: Callable[[str], object] | None = None,
) -> Answer:
    """Answers a question about pictures by greedy decoding.

    A picture is a file, a URL or a PIL image. `model` is what `load` takes, or a loaded model given with its
    processor. `visual_tokens` is a count, a grid or "auto" for each picture, and `visual_tokens_total` a count for all
    together; `tiles` cuts pictures, see MSResamplerProcessor. None is the model's default. `video` is a file or a list
    of frames, of which `num_frames`, or `fps` a second, are read. `reducer` reduces tokens, such as
    {"reducer_type": "divprune", "keep": 64}; a loaded model keeps it. `scopes=True` adds the fusion weights, if
    the projector has scopes. `on_text` receives the answer piece by piece.

    Raises ValueError if a picture or a budget cannot be used, OSError if the model cannot be loaded.
    """
    pictures = [pictures] if isinstance(pictures, Picture) else list(pictures)
    if not question.strip():
        raise ValueError("The question is empty.")
    if max_new_tokens < 1:
        raise ValueError("The length limit, max_new_tokens, must be at least 1.")
    content: list[dict[str, Any]] = [{"type": "image", "image": checked(picture)} for picture in pictures]
    if video is not None:
        content.append({"type": "video", "video": video})
    if model is None or isinstance(model, str | Path):
        model, processor = load(model, revision)
    if processor is None:
        raise ValueError("A loaded model needs its processor, too: ask(question, pictures, model, processor).")
    if reducer is not None:
        model.set_reducer(**reducer)
    options: dict[str, Any] = {
        "visual_tokens": visual_tokens,
        "visual_tokens_total": visual_tokens_total,
        "tiles": tiles,
    }
    options |= {"num_frames": num_frames, "fps": fps}
    started = time.perf_counter()
    projector: Any = model.config.projector_config
    scopes = scopes and len(content) > 0 and projector.num_scopes > 0
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={name: value for name, value in options.items() if value is not None},
    ).to(model.device, model.dtype)
    if content:
        pixels = {key: inputs.pop(key) for key in list(inputs) if key not in processor.tokenizer.model_input_names}
        images: Any = model.get_image_features(**pixels, output_scopes=scopes, return_dict=True)
        inputs["mm_encoder_outputs"] = {"image": images}
    streamer = on_text and PieceStreamer(processor.tokenizer, on_text)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    weights = None
    if scopes:
        weights = scope_means(projector.scope_names, with_video(images.scope_weights, len(pictures)))
    read = []
    if content:
        read = [y_TM.shape[-1] for y_TM in with_video([y_MT.mT for y_MT in images.pooler_output], len(pictures))]
    return Answer(text, read, weights, 1000 * (time.perf_counter() - started))


def with_video(values: Sequence[Tensor], pictures: int) -> list[Tensor]:
    """Values (..., M) of pictures and then of a video, whose frames may have been read as images."""
    frames = values[pictures:]
    return [*values[:pictures], *([torch.cat(list(frames), dim=-1)] if frames else [])]


def checked(picture: Picture) -> Picture:
    """Returns the picture. Raises ValueError if it is a file that does not exist."""
    if isinstance(picture, Image.Image) or str(picture).startswith(("http://", "https://")):
        return picture
    if not Path(picture).is_file():
        raise ValueError(f"There is no picture file {str(picture)!r}.")
    return Path(picture)


def scope_means(names: list[str], weights: list[Tensor]) -> list[dict[str, float]]:
    """Mean fusion weights by scope, from the weights (S, M) of every image."""
    return [dict(zip(names, weights_SM.float().mean(dim=-1).tolist(), strict=True)) for weights_SM in weights]
