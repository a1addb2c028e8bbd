"""The MS-Resampler processor: images and text to model inputs, one image token for every visual token.

"<image>What is this?" and a budget of 4  ->  "<image><image><image><image>What is this?"
"""

import base64
import contextlib
import http.client
import io
import math
import os
import struct
import urllib.error
import urllib.request
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_ms_resampler import AUTO_MAP, token_grid

URL_TIMEOUT_SECONDS = 20


class MSResamplerImagesKwargs(ImagesKwargs, total=False):
    """Image options at call time: `visual_tokens` is a count, a (rows, columns) tuple, or a list with one of
    these an image.
    """

    visual_tokens: int | tuple[int, int] | list[int | tuple[int, int] | list[int] | None] | None


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
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
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

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs: Any):
        """Opens every image (file, URL, base64, bytes, array, PIL) upright and in RGB, keeping any nesting."""
        images = None if _is_empty(images) else _map_nested(images, self._open)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs: Any) -> None:
        """Raises ValueError, with both counts, if placeholders and images differ, per prompt if images are nested."""
        if videos is not None or audio is not None:
            raise ValueError("MS-Resampler reads images and text; it takes no videos and no audio.")
        if text == []:
            raise ValueError("Give at least one prompt, or leave `text` out.")
        groups = [isinstance(item, list) for item in images] if isinstance(images, list) else []
        if any(groups) and not all(groups):
            raise ValueError("Images are one flat list, or one list a prompt, not a mixture of the two.")
        if any(groups) and text is not None and all(isinstance(prompt, str) for prompt in text):
            self._check_groups(images, text)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _check_groups(self, groups: list[list], text: list[str]) -> None:
        if len(groups) != len(text):
            raise ValueError(f"Got {len(groups)} lists of images for {len(text)} prompts; give one list a prompt.")
        for number, (prompt, group) in enumerate(zip(text, groups, strict=True), start=1):
            if prompt.count(self.image_token) != len(group):
                raise ValueError(
                    f"Prompt {number} has {prompt.count(self.image_token)} {self.image_token} placeholders, "
                    f"but {len(group)} images were given for it."
                )

    def _process_images(self, images, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        budgets = kwargs.pop("visual_tokens", None)
        inputs = self._look(make_flat_list_of_images(images), **kwargs)
        grids = self._token_grids(budgets, self._patch_grids(inputs))
        if budgets is not None or self.visual_tokens is None:
            inputs["token_grids"] = np.array(grids)
        return inputs, [self.image_token * (rows * columns) for rows, columns in grids]

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """Visual tokens of images of (height, width) pixels, found by processing blank ones (asked for by vLLM)."""
        if image_sizes is None:
            return MultiModalData()
        budgets = kwargs.pop("visual_tokens", None)
        blanks = (Image.new("RGB", (width, height)) for height, width in image_sizes)
        patch_grids = [self._patch_grids(self._look([blank], **kwargs))[0] for blank in blanks]
        return MultiModalData(
            num_image_tokens=[rows * columns for rows, columns in self._token_grids(budgets, patch_grids)],
            num_image_patches=[1] * len(patch_grids),
        )

    def _look(self, images: list, **kwargs: Any) -> BatchFeature:
        """What the image processor makes of the images."""
        changed = {"size", "crop_size", "do_resize", "do_center_crop"} & set(kwargs)
        reach = None if changed else self._visible_reach()
        return self.image_processor([_crop_to_reach(image, reach) for image in images], **kwargs)

    def _visible_reach(self) -> int | None:
        """How long a picture may be, in units of its short side, before a centre crop drops its ends; None: any."""
        tool = self.image_processor
        edge = (getattr(tool, "size", None) or {}).get("shortest_edge")
        if not edge or not getattr(tool, "do_resize", True):
            return None
        if getattr(tool, "do_center_crop", False):
            return 4 * math.ceil(max(tool.crop_size["height"], tool.crop_size["width"]) / edge)
        return 4 if getattr(tool, "crop_pct", None) and edge < 384 else None  # ConvNeXt's crops small sizes only

    def _patch_grids(self, image_inputs: BatchFeature) -> list[tuple[int, int]]:
        """The patch grid of every image, as the image processor made it."""
        if "spatial_shapes" in image_inputs:
            return [(int(rows), int(columns)) for rows, columns in image_inputs["spatial_shapes"]]
        sizes = [image.shape[-2:] for image in image_inputs["pixel_values"]]
        return [(height // self.patch_size, width // self.patch_size) for height, width in sizes]

    def _token_grids(self, budgets: Any, patch_grids: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The token grid of every image: the budget asked for, or else the default, laid over its patches."""
        budgets = budgets if isinstance(budgets, list) else [budgets] * len(patch_grids)
        if len(budgets) != len(patch_grids):
            raise ValueError(
                f"Got {len(budgets)} entries in `visual_tokens` for {len(patch_grids)} images; give one an image, "
                "or a single count or (rows, columns) tuple for all."
            )
        budgets = [self.visual_tokens if budget is None else budget for budget in budgets]
        return [token_grid(budget, patches) for budget, patches in zip(budgets, patch_grids, strict=True)]

    def _open(self, source: Any) -> Any:
        """An RGB image, upright. Raises ValueError if it is no image, damaged, or larger than `max_pixels`.

        Arrays and tensors of other forms than (height, width) or (height, width, 3 or 4) in 8 bits are left to the
        image processor as they are; and so is what is RGB already, if no other axis could be taken for its channels.
        """
        if isinstance(source, np.ndarray):  # torch takes no negative strides, and warns of what it may not write to
            source = np.require(source, requirements=["C_CONTIGUOUS", "WRITEABLE"])
        if _is_rgb_array(source) and math.prod(source.shape[:2]) <= self.max_pixels:
            return source
        if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] in ((), (3,), (4,)):
            source = Image.fromarray(source)
        if isinstance(source, np.ndarray) or hasattr(source, "detach"):
            return source
        if not isinstance(source, (Image.Image, str, os.PathLike, bytes, bytearray)):
            kind = type(source).__name__
            raise ValueError(f"An image is a PIL image, an array, a path, a URL, base64 or bytes, got {kind}.")
        try:
            width, height, image = self._read(source)
        except UnidentifiedImageError as error:
            raise ValueError(f"{_describe(source)} is not an image that can be read; use PNG or JPEG.") from error
        except FileNotFoundError as error:
            raise ValueError(f"There is no image file at {_describe(source)}.") from error
        except Image.DecompressionBombError as error:
            raise ValueError(f"{_describe(source)} is too large: {error}") from error
        except (OSError, SyntaxError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"{_describe(source)} could not be read as an image: {error}.") from error
        if image is None:
            raise ValueError(
                f"{_describe(source)} has {width} x {height} = {width * height:,} pixels, more than the limit of "
                f"{self.max_pixels:,}; scale it down first."
            )
        return image

    def _read(self, source: Any) -> tuple[int, int, Image.Image | None]:
        """Width, height and, unless they are too much, the picture."""
        file = None if isinstance(source, Image.Image) else _file_of(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is `max_pixels` that decides
            with contextlib.nullcontext(source) if file is None else Image.open(file) as image:
                if math.prod(image.size) > self.max_pixels:
                    return *image.size, None
                image.load()
                with contextlib.suppress(SyntaxError, ValueError, struct.error):  # damaged EXIF data say nothing
                    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies in any case
                        image = ImageOps.exif_transpose(image)
                return *image.size, to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB, itself if it is that: transparency over white, 16-bit and float greys scaled to 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535 if image.mode not in ("I", "F") or grey.max() > 255 else 255  # 32 bits do not tell their range
        top = 1 if image.mode == "F" and grey.max() <= 1 else top
        image = Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_rgb_array(image: Any) -> bool:
    """Whether it is (height, width, 3) in 8 bits, and neither side is so short that it could be taken for channels."""
    is_bytes = isinstance(image, np.ndarray) and image.dtype == np.uint8
    return is_bytes and image.shape[2:] == (3,) and min(image.shape[:2]) > 4


def _crop_to_reach(image: Any, reach: int | None) -> Any:
    """Drops ends that a centre crop drops anyway: to scale 1 x 5000 pixels by the short side takes gigabytes."""
    if reach is None or not (isinstance(image, Image.Image) or _is_rgb_array(image)):
        return image
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    short = min(width, height)
    longest = reach * short + 8  # the resizing filter sees some pixels beyond an edge
    # Whole squares go, the same number at both ends: scaled, they are whole pixels, and the middle stays where it is.
    left, top = (max(0, side - longest) // 2 // short * short for side in (width, height))
    if (left, top) == (0, 0):
        return image
    cropped = np.asarray(image)[top : height - top, left : width - left]
    return Image.fromarray(cropped) if isinstance(image, Image.Image) else cropped


def _is_empty(images: Any) -> bool:
    return images is None or (isinstance(images, (list, tuple)) and all(_is_empty(item) for item in images))


def _map_nested(items: Any, function) -> Any:
    return [_map_nested(item, function) for item in items] if isinstance(items, (list, tuple)) else function(items)


def _file_of(source: str | os.PathLike | bytes | bytearray) -> Any:
    """What PIL can open: a file's path, or the bytes behind a URL or a base64 string."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _download(source)
    if isinstance(source, os.PathLike) or os.path.exists(source):
        return source
    try:
        return io.BytesIO(base64.b64decode("".join(source.rpartition("base64,")[2].split()), validate=True))
    except ValueError:
        raise FileNotFoundError(source) from None


def _download(url: str) -> io.BytesIO:
    request = urllib.request.Request(url, headers={"User-Agent": "ms-resampler"})  # many sites refuse urllib's own
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as answer:
            return io.BytesIO(answer.read())
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _describe(source: Any) -> str:
    """How an error names an image: by its path, URL or text, or by its kind."""
    if isinstance(source, (str, os.PathLike)):
        return repr(str(source)[:80])
    return f"The given {type(source).__name__}"


MSResamplerProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["MSResamplerProcessor"]
