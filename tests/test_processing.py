"""The processor: one image token for every visual token, any picture, and a sentence for every mistake."""

import base64
import io
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE, picture, tiny_model, tiny_processor, tiny_tokenizer
from transformers import AutoProcessor, CLIPImageProcessorPil

from ms_resampler import MSResamplerProcessor
from ms_resampler.processing_ms_resampler import to_rgb


def count_images_tokens(inputs) -> list[int]:
    return [row.count(IMAGE) for row in inputs["input_ids"]]


def test_a_placeholder_becomes_one_token_for_every_visual_token():
    inputs = tiny_processor()(images=[picture()], text="a<image>b")
    plain = tiny_tokenizer()("ab")["input_ids"]
    assert inputs["input_ids"] == [[plain[0], *[IMAGE] * 4, plain[1]]]


@pytest.mark.parametrize(
    ("budget", "grids"),
    [(9, [(3, 3), (3, 3)]), ((2, 3), [(2, 3), (2, 3)]), ([1, (3, 2)], [(1, 1), (3, 2)]), ([None, 9], [(2, 2), (3, 3)])],
)
def test_budgets_at_call_time(budget, grids):
    processor, model = tiny_processor(), tiny_model()
    inputs = processor(
        images=[picture(0), picture(1)], text=["<image>one", "two<image>"], visual_tokens=budget, return_tensors="pt"
    )
    assert [tuple(grid) for grid in inputs["token_grids"].tolist()] == grids
    assert (inputs["input_ids"] == IMAGE).sum(-1).tolist() == [rows * columns for rows, columns in grids]
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_the_default_budget_adds_no_input():
    assert "token_grids" not in tiny_processor()(images=[picture()], text="<image>")


@pytest.mark.parametrize(
    ("images", "text", "sentence"),
    [
        (2, ["<image>"], "Found total 1 <image> tokens and 2 images"),
        (1, ["<image><image>"], "Found total 2 <image> tokens and 1 images"),
        (0, ["<image>"], "Found 1 <image> tokens in the text but no images were passed"),
    ],
)
def test_more_or_fewer_images_than_placeholders(images, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_processor()(images=[picture(n) for n in range(images)] or None, text=text)


def test_nested_images_are_counted_prompt_by_prompt():
    processor = tiny_processor()
    one, two, three = (picture(n) for n in range(3))
    inputs = processor(images=[[one, two], [three]], text=["<image><image>", "<image>"])
    assert count_images_tokens(inputs) == [8, 4]
    with pytest.raises(ValueError, match="Prompt 1 has 1 <image> placeholders, but 2 images were given"):
        processor(images=[[one, two], [three]], text=["<image>", "<image><image>"])
    with pytest.raises(ValueError, match="Got 2 lists of images for 1 prompts"):
        processor(images=[[one], [two]], text=["<image><image>"])


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (37, "A budget of 37 visual tokens is impossible for 6 x 6 = 36 patches"),
        (0, "A budget of 0 visual tokens is impossible"),
        (31, "31 visual tokens cannot be laid out as a grid over 6 x 6 patches; use a count such as 28, 30, 32"),
        ([4, 4, 4], "Got 3 entries in `visual_tokens` for 1 images"),
    ],
)
def test_impossible_budgets(budget, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_processor()(images=[picture()], text="<image>", visual_tokens=budget)


def test_a_tokenizer_without_the_image_token():
    with pytest.raises(
        ValueError, match=r"does not know the image token '<picture>': add it with tokenizer\.add_tokens"
    ):
        tiny_processor(image_token="<picture>")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(20_000, 6_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_from_the_header(tmp_path, width, height):
    (tmp_path / "bomb.png").write_bytes(png_header(width, height))
    with pytest.raises(ValueError, match=r"too large|more than the limit of 100,000,000"):
        tiny_processor()(images=[str(tmp_path / "bomb.png")], text="<image>")


def test_files_that_are_no_images(tmp_path):
    processor = tiny_processor()
    (tmp_path / "text.png").write_text("not a picture")
    picture().save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for source, sentence in (
        (str(tmp_path / "text.png"), "is not an image that can be read"),
        (str(tmp_path / "half.png"), "could not be read as an image"),
        (str(tmp_path / "missing.png"), "There is no image file at"),
        (b"also no picture", "is not an image that can be read"),
    ):
        with pytest.raises(ValueError, match=sentence):
            processor(images=[source], text="<image>")


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == "/picture.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(as_png(picture(5)) if found else b"nothing here")

    def log_message(self, *arguments):
        pass


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_pictures_come_from_anywhere(tmp_path, server):
    processor, original = tiny_processor(), picture(5)
    original.save(tmp_path / "picture.png")
    encoded = base64.b64encode(as_png(original)).decode()
    expected = processor(images=[original], text="<image>", return_tensors="pt")["pixel_values"]
    for source in (
        str(tmp_path / "picture.png"), tmp_path / "picture.png", f"{server}/picture.png",
        encoded, f"data:image/png;base64,{encoded}", as_png(original), np.asarray(original),
    ):  # fmt: skip
        assert torch.equal(processor(images=[source], text="<image>", return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match="could not be read as an image"):
        processor(images=[f"{server}/other.png"], text="<image>")


@pytest.mark.parametrize("key", ["image", "path", "base64", "url"])
def test_chat_messages_bring_their_pictures(tmp_path, server, key):
    processor, original = tiny_processor(), picture(5)
    original.save(tmp_path / "picture.png")
    value = {
        "image": original,
        "path": str(tmp_path / "picture.png"),
        "base64": base64.b64encode(as_png(original)).decode(),
        "url": f"{server}/picture.png",
    }[key]
    content = [{"type": "image", key: value}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor(images=[original], text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)


def with_alpha() -> Image.Image:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    return image


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P") if False else Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(RAMP), RAMP[..., None].repeat(3, -1)),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), RAMP[..., None].repeat(3, -1)),
        (Image.fromarray(RAMP.astype(np.float32) / 255), RAMP[..., None].repeat(3, -1)),
        (Image.fromarray(RAMP.astype(np.int32) * 257), RAMP[..., None].repeat(3, -1)),
        (with_alpha(), [[[255, 0, 0], [255, 255, 255]]]),
        (palette_with_transparency(), [[[255, 0, 0], [255, 255, 255]]]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [[[255, 0, 0]]]),
        (Image.new("LA", (1, 1), (10, 0)), [[[255, 255, 255]]]),
        (Image.new("1", (1, 1), 1), [[[255, 255, 255]]]),
    ],
    ids=["grey", "16-bit", "float", "32-bit", "alpha", "palette", "CMYK", "grey with alpha", "1-bit"],
)
def test_every_mode_becomes_rgb(image, expected):
    result = to_rgb(image)
    assert result.mode == "RGB"
    assert np.abs(np.asarray(result).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    upright = picture(2, (20, 30))
    turned = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    stored = upright
    for step in turned[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(tiny_processor()._open(str(tmp_path / "turned.png")), upright)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 200)])
def test_extreme_proportions(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    inputs = tiny_processor()(images=[image], text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)
    assert torch.isfinite(inputs["pixel_values"]).all()


def test_cropping_invisible_margins_changes_no_pixel():
    side = {"height": 24, "width": 24}
    plain = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=side)
    image = picture(0, (40, 400))
    ours = tiny_processor()(images=[image], text="<image>", return_tensors="pt")["pixel_values"]
    theirs = plain([image], return_tensors="pt")["pixel_values"]
    assert (ours - theirs).abs().max() < 0.05  # the crop moves the resampling grid by less than a pixel


def test_counts_that_servers_ask_for_are_those_of_processing():
    for tower in ("clip_vision_model", "siglip2_vision_model"):
        processor = tiny_processor(tower)
        sizes = [(30, 40), (100, 20), (24, 24), (7, 90)]
        counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
        real = [count_images_tokens(processor(images=[picture(0, size)], text="<image>"))[0] for size in sizes]
        assert counts == real
    kinds = processor(images=[picture()], text="a<image>b", return_mm_token_type_ids=True)["mm_token_type_ids"]
    assert kinds == [[0, 1, 1, 1, 1, 0]]


def test_save_and_load(tmp_path):
    processor = tiny_processor(visual_tokens=[2, 3], max_pixels=1234)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MSResamplerProcessor)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.visual_tokens, loaded.max_pixels, loaded.chat_template) == ([2, 3], 1234, processor.chat_template)
    assert (tmp_path / "chat_template.jinja").read_text() == processor.chat_template
    text = "<image>What?"
    assert loaded(images=[picture()], text=text)["input_ids"] == processor(images=[picture()], text=text)["input_ids"]


def test_video_and_audio_are_refused():
    with pytest.raises(ValueError, match="reads images and text; it takes no videos and no audio"):
        tiny_processor()(text="a", videos=[np.zeros((2, 8, 8, 3), dtype=np.uint8)])
