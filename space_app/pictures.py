"""Visitors' pictures: checked by their headers, then opened small, upright and in RGB; the error that refuses one."""

from pathlib import Path

import gradio as gr
from PIL import Image, ImageOps
from pillow_heif import register_heif_opener

register_heif_opener()

MAX_FILE_MEGABYTES = 20
MAX_PIXELS = 40_000_000
MAX_PICTURES = 4
KEPT_PIXELS = 2**20  # of a picture: several times what a tower sees
TOO_MANY = f"Please add at most {MAX_PICTURES} pictures to a question; these are {{}}."
TOO_LARGE = f"The file is larger than {MAX_FILE_MEGABYTES} MB; please choose a smaller one."
TOO_MANY_PIXELS = f"The picture has more than {MAX_PIXELS // 10**6} million pixels; please scale it down."
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")


class Refusal(gr.Error):
    """One sentence for the person who asked: what is wrong with the question or the picture.

    A gradio.Error, which Gradio shows unchanged and ZeroGPU passes on from its worker process.
    """

    def __init__(self, message: str, title: str = "Not yet"):
        super().__init__(message, title=title, print_exception=False)


def check_count(paths: list[str], has_earlier_picture: bool = False) -> None:
    """Raises Refusal unless there are pictures to ask about, and not too many."""
    if len(paths) > MAX_PICTURES:
        raise Refusal(TOO_MANY.format(len(paths)))
    if not paths and not has_earlier_picture:
        raise Refusal("Please add a picture first: drop one here, or pick a scene.")


def open_picture(path: str | Path) -> Image.Image:
    """An upright RGB picture of at most KEPT_PIXELS. Raises Refusal if it cannot be used.

    The header is checked before the picture is decoded, and a JPEG is decoded at a fraction of its size.
    """
    try:
        if Path(path).stat().st_size > MAX_FILE_MEGABYTES * 2**20:
            raise Refusal(TOO_LARGE)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Refusal(TOO_MANY_PIXELS)
            return over_white(ImageOps.exif_transpose(reduced(image)))
    except Refusal:  # a ValueError, as all of Gradio's errors are
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refusal(TOO_MANY_PIXELS) from error
    except FileNotFoundError as error:
        raise Refusal(
            "The picture is no longer here, as uploads are deleted after a while; please add it again."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise Refusal("This file cannot be read as a picture; please use a PNG, JPEG or WebP file.") from error


def reduced(image: Image.Image) -> Image.Image:
    """The picture with at most KEPT_PIXELS and the same proportions."""
    width, height = image.size
    scale = (KEPT_PIXELS / (width * height)) ** 0.5
    if scale >= 1:
        return image
    if image.mode not in ("L", "RGB", "RGBA", "CMYK"):  # palettes, for one, cannot be averaged
        image = over_white(image)
    image.thumbnail([max(1, int(side * scale)) for side in image.size], Image.Resampling.LANCZOS, reducing_gap=3)
    return image


def over_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
