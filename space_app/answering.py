"""From a picture and a question to visual tokens, scope maps and a streamed answer; nothing of Gradio here.

The model is loaded by the Auto classes of transformers, with the code that lies beside its weights: this is
what a stranger does with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

MAX_FILE_MEGABYTES = 20
MAX_PIXELS = 40_000_000
MAX_QUESTION_CHARACTERS = 500
MAX_NEW_TOKENS = 128
TOO_MANY_PIXELS = f"The picture has more than {MAX_PIXELS // 10**6} million pixels; please scale it down."
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class Refusal(ValueError):
    """One sentence for the person who asked: what is wrong with the question or the picture."""


class Stop(StoppingCriteria):
    """Ends a generation before its next token, once the event is set."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """True for every row of the batch when it is time to stop."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class ScopeMaps:
    """What the projector did with one picture: S scopes, M visual tokens in a grid, N patches in a grid.

    picture is what the model saw (cropped and scaled); weights (S, M) sum to one over the scopes, attentions
    (S, M, N) over the patches; grids are (rows, columns).
    """

    picture: Image.Image
    names: list[str]
    weights: np.ndarray
    attentions: np.ndarray
    token_grid: tuple[int, int]
    patch_grid: tuple[int, int]

    def overall(self, scope: int) -> np.ndarray:
        """Where a scope looked for all tokens, each weighted by its trust in that scope: (rows, columns)."""
        return (self.weights[scope] @ self.attentions[scope]).reshape(self.patch_grid)

    def of_token(self, scope: int, token: int) -> np.ndarray:
        """Where a scope looked for one token: (rows, columns)."""
        return self.attentions[scope, token].reshape(self.patch_grid)

    def most_decided_token(self) -> int:
        """The token that trusted one scope the most."""
        return int(self.weights.max(axis=0).argmax())


def load(model_id: str, revision: str | None = None) -> tuple[Any, Any]:
    """Model and processor of a folder or a Hub repository, on the GPU if there is one."""
    processor = AutoProcessor.from_pretrained(model_id, revision=revision, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(
        model_id, revision=revision, trust_remote_code=True, dtype="auto"
    )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def check_question(text: str | None) -> str:
    """The question, trimmed. Raises Refusal if it is empty or too long."""
    question = (text or "").strip()
    if not question:
        raise Refusal("Please type a question about the picture.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise Refusal(f"The question has {len(question)} characters; please ask in at most {MAX_QUESTION_CHARACTERS}.")
    return question


def check_files(paths: list[str], has_earlier_picture: bool) -> None:
    """Raises Refusal unless there is exactly one picture to ask about."""
    if len(paths) > 1:
        raise Refusal(f"Please add one picture at a time; these are {len(paths)}.")
    if not paths and not has_earlier_picture:
        raise Refusal("Please add a picture first: drop one here, or pick a scene.")


def open_picture(path: str | Path) -> Image.Image:
    """An upright RGB picture; its header is judged before it is decoded. Raises Refusal if it cannot be used."""
    try:
        if Path(path).stat().st_size > MAX_FILE_MEGABYTES * 2**20:
            raise Refusal(f"The file is larger than {MAX_FILE_MEGABYTES} MB; please choose a smaller one.")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Refusal(TOO_MANY_PIXELS)
            return over_white(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refusal(TOO_MANY_PIXELS) from error
    except (OSError, SyntaxError) as error:
        raise Refusal("This file cannot be read as a picture; please use a PNG, JPEG or WebP file.") from error


def over_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def prepare(processor: Any, model: Any, conversation: list[dict]) -> Any:
    """Model inputs of a conversation that has one picture."""
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs.to(model.device, model.dtype)


@torch.inference_mode()
def encode(model: Any, processor: Any, inputs: Any, picture: Image.Image) -> tuple[Any, ScopeMaps]:
    """The visual tokens of the picture, for `generate`, and the maps of how they came about.

    Takes the pixels out of `inputs`: the vision tower has run, and need not run again.
    """
    keys = ("pixel_values", "token_grids", "pixel_attention_mask", "spatial_shapes")
    pixels = {key: inputs.pop(key) for key in keys if key in inputs}
    features = model.get_image_features(**pixels, output_scopes=True, return_dict=True)
    maps = ScopeMaps(
        picture=seen_picture(processor.image_processor, pixels["pixel_values"], picture),
        names=list(model.config.projector_config.scope_names),
        weights=features.scope_weights[0].float().cpu().numpy(),
        attentions=features.scope_attentions[0].float().cpu().numpy(),
        token_grid=tuple(features.token_grids[0]),
        patch_grid=tuple(features.patch_grids[0]),
    )
    return features, maps


def look(model: Any, processor: Any, picture: Image.Image) -> ScopeMaps:
    """The maps of a picture alone: they do not depend on the question."""
    message = {"role": "user", "content": [{"type": "image", "image": picture}]}
    return encode(model, processor, prepare(processor, model, [message]), picture)[1]


def seen_picture(image_processor: Any, pixel_values: torch.Tensor, picture: Image.Image) -> Image.Image:
    """The picture as the model saw it, cropped and scaled, so that maps lie on it exactly.

    Towers that take patches instead of pixels (SigLIP 2) see the whole picture.
    """
    if pixel_values.ndim != 4:
        return picture
    pixels = pixel_values[0].float().cpu()
    if getattr(image_processor, "do_normalize", True):
        mean, std = (torch.tensor(x)[:, None, None] for x in (image_processor.image_mean, image_processor.image_std))
        pixels = pixels * std + mean
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def stream_answer(model: Any, processor: Any, inputs: Any, features: Any, max_new_tokens: int) -> Iterator[str]:
    """The answer as it grows. Closing this iterator stops the generation, which runs in a thread of its own."""
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = Event(), []

    def generate() -> None:
        try:
            model.generate(
                **inputs,
                mm_encoder_outputs={"image": features},
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([Stop(stop)]),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        except Exception as error:  # handed to the reader of the stream, below
            failures.append(error)
            streamer.end()

    Thread(target=generate, daemon=True).start()
    try:
        text = ""
        for piece in streamer:
            text += piece
            yield text.strip()
    finally:
        stop.set()
    if failures:
        raise failures[0]
