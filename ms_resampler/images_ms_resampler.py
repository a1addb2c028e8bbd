"""Opens pictures of any source, upright and in RGB."""

import base64
import contextlib
import http.client
import io
import math
import os
import struct
import time
import urllib.error
import urllib.request
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

URL_TIMEOUT_SECONDS = 20  # without receiving a byte
DOWNLOAD_SECONDS = 120
DOWNLOAD_BYTES = 2**26


def open_picture(source: Any, max_pixels: int) -> Any:
    """Opens a file, URL, base64, bytes, array or PIL image as an upright RGB image.

    8-bit arrays of shape (height, width) or (height, width, 3 or 4) are converted; other arrays and tensors, and RGB
    arrays whose channel axis is unambiguous, are passed to the image processor unchanged.
    Raises ValueError if it is not an image, is damaged, or has more than `max_pixels`.
    """
    if isinstance(source, np.ndarray):  # torch does not accept negative strides, and warns of read-only arrays
        source = np.require(source, requirements=["C_CONTIGUOUS", "WRITEABLE"])
    if is_rgb_array(source) and math.prod(source.shape[:2]) <= max_pixels:
        return source
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] in ((), (3,), (4,)):
        source = Image.fromarray(source)
    if isinstance(source, np.ndarray) or hasattr(source, "detach"):
        return source
    if not isinstance(source, (Image.Image, str, os.PathLike, bytes, bytearray)):
        kind = type(source).__name__
        raise ValueError(f"An image is a PIL image, an array, a path, a URL, base64 or bytes, got {kind}.")
    try:
        width, height, image = _read(source, max_pixels)
    except UnidentifiedImageError as error:
        raise ValueError(f"{describe(source)} is not an image that can be read; use PNG or JPEG.") from error
    except FileNotFoundError as error:
        raise ValueError(f"There is no image file at {describe(source)}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{describe(source)} is too large: {error}") from error
    except Exception as error:  # PIL raises errors of many types for damaged bytes
        why = str(error) or type(error).__name__
        raise ValueError(f"{describe(source)} could not be read as an image: {why}.") from error
    if image is None:
        raise ValueError(
            f"{describe(source)} has {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{max_pixels:,}; scale it down first."
        )
    return image


def _read(source: Any, max_pixels: int) -> tuple[int, int, Image.Image | None]:
    """Width, height and, unless it is too large, the picture."""
    file = None if isinstance(source, Image.Image) else file_of(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides instead
        with contextlib.nullcontext(source) if file is None else Image.open(file) as image:
            if math.prod(image.size) > max_pixels:
                return *image.size, None
            image.load()
            with contextlib.suppress(SyntaxError, ValueError, struct.error):  # damaged EXIF data are ignored
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies in any case
                    image = ImageOps.exif_transpose(image)
            return *image.size, to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a PIL image to RGB: transparency becomes white, 16-bit and float greys are scaled to 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535 if image.mode not in ("I", "F") or grey.max() > 255 else 255  # 32-bit values: unknown range
        top = 1 if image.mode == "F" and grey.max() <= 1 else top
        image = Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def is_rgb_array(image: Any) -> bool:
    """Whether an array is (height, width, 3) in 8 bits, and no other axis could be mistaken for the channels."""
    is_bytes = isinstance(image, np.ndarray) and image.dtype == np.uint8
    return is_bytes and image.shape[2:] == (3,) and min(image.shape[:2]) > 4


def file_of(source: str | os.PathLike | bytes | bytearray) -> Any:
    """A source that PIL can open: a path, or the bytes of a URL or base64 string."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        return _download(source)
    if isinstance(source, os.PathLike) or os.path.exists(source):
        return source
    try:
        return io.BytesIO(base64.b64decode("".join(source.rpartition("base64,")[2].split()), validate=True))
    except ValueError:
        raise FileNotFoundError(source) from None


def _download(url: str) -> io.BytesIO:
    """Downloads a URL. Raises OSError or HTTPException, and ValueError for too many bytes or a time-out."""
    request = urllib.request.Request(url, headers={"User-Agent": "ms-resampler"})  # many sites refuse urllib's default
    end, data = time.monotonic() + DOWNLOAD_SECONDS, bytearray()
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as answer:
            while chunk := answer.read1(2**16):
                data += chunk
                if len(data) > DOWNLOAD_BYTES:
                    raise ValueError(f"it has more than {DOWNLOAD_BYTES:,} bytes; download it, and give its path")
                if time.monotonic() > end:
                    raise ValueError(f"it did not arrive within {DOWNLOAD_SECONDS} seconds")
            if answer.length:
                raise http.client.IncompleteRead(bytes(data), answer.length)
            return io.BytesIO(data)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def describe(source: Any) -> str:
    """How errors name an image: by its path, URL or text, or by its type."""
    if isinstance(source, (str, os.PathLike)):
        return repr(str(source)[:80])
    return f"The given {type(source).__name__}"
