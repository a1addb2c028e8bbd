"""The MS-Resampler processor: images and text to model inputs, one image token for every visual token.

"<image>What is this?" and a budget of 4  ->  "<image><image><image><image>What is this?"
"""

import base64
import binascii
import io
import os
import urllib.request
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_ms_resampler import AUTO_MAP, token_grid

URL_TIMEOUT_SECONDS = 20


class MSResamplerImagesKwargs(ImagesKwargs, total=False):
    """Image options at call time: `visual_tokens` is a count, a (rows, columns) tuple, or a list with one of
    these an image.
    """

    visual_tokens: int | tuple[int, int] | list


class MSResamplerProcessingKwargs(ProcessingKwargs, total=False):
    """Options at call time."""

    images_kwargs: MSResamplerImagesKwargs


class MSResamplerProcessor(ProcessorMixin):
    """An image processor and a tokenizer, and the budget of visual tokens that joins them.

    Fields:
        patch_size: side of a patch in pixels, the model's `config.patch_size`.
        visual_tokens: the default budget: a count, [rows, columns], or None for one token a patch.
        image_token: the placeholder in the text.
        max_pixels: images with more are refused before they are decoded.

    Raises ValueError if the tokenizer does not know the image token.
    """

    valid_processor_kwargs = MSResamplerProcessingKwargs
    text_kwargs = {"padding": True}

    # Not keyword-only: transformers finds out what to save and load from the positional names.
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=14,
        visual_tokens=144,
        image_token="<image>",
        max_pixels=100_000_000,
        chat_template=None,
    ):
        self.patch_size = patch_size
        self.visual_tokens = visual_tokens
        self.image_token = image_token
        self.max_pixels = max_pixels
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        self.image_token_id = tokenizer.get_vocab().get(image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"The tokenizer does not know the image token {image_token!r}: add it with tokenizer.add_tokens("
                f"[{image_token!r}], special_tokens=True), then resize the model's embeddings."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs: Any):
        """Opens every image (file, URL, base64, bytes, array, PIL) upright and in RGB, keeping any nesting."""
        images = None if images is None else _map_nested(images, self._open)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs: Any) -> None:
        """Raises ValueError, with both counts, if placeholders and images differ, per prompt if images are nested."""
        if videos is not None or audio is not None:
            raise ValueError("MS-Resampler reads images and text; it takes no videos and no audio.")
        nested = isinstance(images, (list, tuple)) and images and isinstance(images[0], (list, tuple))
        if text is not None and nested:
            if len(images) != len(text):
                raise ValueError(f"Got {len(images)} lists of images for {len(text)} prompts; give one list a prompt.")
            for number, (prompt, group) in enumerate(zip(text, images, strict=True), start=1):
                if prompt.count(self.image_token) != len(group):
                    raise ValueError(
                        f"Prompt {number} has {prompt.count(self.image_token)} {self.image_token} placeholders, "
                        f"but {len(group)} images were given for it."
                    )
        super().validate_inputs(images=images, text=text, **kwargs)

    def _process_images(self, images, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        budgets = kwargs.pop("visual_tokens", None)
        images = [self._without_invisible_margins(image) for image in make_flat_list_of_images(images)]
        inputs = self.image_processor(images, **kwargs)
        grids = self._token_grids(inputs, budgets)
        if budgets is not None:
            inputs["token_grids"] = np.array(grids)
        return inputs, [self.image_token * (rows * columns) for rows, columns in grids]

    def _token_grids(self, image_inputs: BatchFeature, budgets: Any) -> list[tuple[int, int]]:
        """The token grid of every image: its patch grid, as the image processor made it, and its budget."""
        if "spatial_shapes" in image_inputs:
            patch_grids = [tuple(int(n) for n in shape) for shape in image_inputs["spatial_shapes"]]
        else:
            sizes = [image.shape[-2:] for image in image_inputs["pixel_values"]]
            patch_grids = [(height // self.patch_size, width // self.patch_size) for height, width in sizes]
        budgets = budgets if isinstance(budgets, list) else [budgets] * len(patch_grids)
        if len(budgets) != len(patch_grids):
            raise ValueError(
                f"Got {len(budgets)} entries in `visual_tokens` for {len(patch_grids)} images; give one an image, "
                "or a single count or (rows, columns) tuple for all."
            )
        budgets = [self.visual_tokens if budget is None else budget for budget in budgets]
        return [token_grid(budget, patches) for budget, patches in zip(budgets, patch_grids, strict=True)]

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """Visual tokens of images of (height, width) pixels, found by processing blank ones (asked for by vLLM)."""
        if image_sizes is None:
            return MultiModalData()
        budgets = kwargs.pop("visual_tokens", None)
        blanks = [self._without_invisible_margins(Image.new("RGB", (width, height))) for height, width in image_sizes]
        grids = [self._token_grids(self.image_processor([blank], **kwargs), budgets)[0] for blank in blanks]
        return MultiModalData(
            num_image_tokens=[rows * columns for rows, columns in grids], num_image_patches=[1] * len(grids)
        )

    def _without_invisible_margins(self, image: Image.Image) -> Image.Image:
        """Crops what a centre crop would drop anyway, or scaling a 1 x 5000 image by its short side takes gigabytes."""
        size = getattr(self.image_processor, "size", None) or {}
        cropped = getattr(self.image_processor, "do_center_crop", False) and "shortest_edge" in size
        width, height = image.size
        keep_width, keep_height = (min(side, 4 * min(width, height)) for side in (width, height))
        if not cropped or (keep_width, keep_height) == (width, height):
            return image
        left, top = (width - keep_width) // 2, (height - keep_height) // 2
        return image.crop((left, top, left + keep_width, top + keep_height))

    def _open(self, source: Any) -> Image.Image:
        """An RGB image, upright. Raises ValueError if it is no image, damaged, or larger than `max_pixels`."""
        if isinstance(source, np.ndarray) or hasattr(source, "detach"):
            return source  # arrays and tensors are decoded already: the image processor takes them as they are
        try:
            image = source if isinstance(source, Image.Image) else Image.open(_bytes_of(source))
            self._check_pixels(image)
            image.load()
        except UnidentifiedImageError as error:
            raise ValueError(f"{_describe(source)} is not an image that can be read; use PNG or JPEG.") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{_describe(source)} is too large: {error}.") from error
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{_describe(source)} could not be read as an image: {error}.") from error
        return to_rgb(ImageOps.exif_transpose(image))

    def _check_pixels(self, image: Image.Image) -> None:
        width, height = image.size
        if width * height > self.max_pixels:
            raise ValueError(
                f"The image has {width} x {height} = {width * height:,} pixels, more than the limit of "
                f"{self.max_pixels:,}; scale it down first."
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: transparency over white, 16-bit and float greys scaled to 8 bits."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        grey = np.asarray(image, dtype=np.float32)
        top = 1.0 if image.mode == "F" and grey.max() <= 1 else 65535.0 if grey.max() > 255 else 255.0
        image = Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _map_nested(items: Any, function) -> Any:
    return [_map_nested(item, function) for item in items] if isinstance(items, (list, tuple)) else function(items)


def _bytes_of(source: Any) -> Any:
    """What PIL can open: a file's path, or the bytes behind a URL or a base64 string."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=URL_TIMEOUT_SECONDS) as answer:
            return io.BytesIO(answer.read())
    if isinstance(source, os.PathLike) or (isinstance(source, str) and os.path.exists(source)):
        return source
    if not isinstance(source, str):
        raise ValueError(f"An image is a PIL image, an array, a path, a URL, base64 or bytes, got {type(source)}.")
    try:
        return io.BytesIO(base64.b64decode(source.split(",")[-1], validate=True))
    except (binascii.Error, ValueError):
        raise ValueError(f"There is no image file at {_describe(source)}.") from None


def _describe(source: Any) -> str:
    name = source if isinstance(source, (str, os.PathLike)) else type(source).__name__
    return repr(str(name)[:80])


MSResamplerProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["MSResamplerProcessor"]
