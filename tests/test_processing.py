"""The processor: one image token for every visual token, any picture, and a sentence for every mistake."""

import base64
import contextlib
import inspect
import io
import json
import os
import re
import struct
import threading
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import IMAGE, np_pixels, picture, tiny_model, tiny_processor, tiny_tokenizer
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from ms_resampler import MSResamplerProcessor, images_ms_resampler, processing_ms_resampler
from ms_resampler.images_ms_resampler import open_picture, to_rgb

SIDE = {"height": 24, "width": 24}
IMAGE_PROCESSORS = {
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SIDE),
    "siglip": lambda: SiglipImageProcessorPil(size=SIDE),
    "siglip2": lambda: Siglip2ImageProcessorPil(patch_size=4, max_num_patches=36),
    "convnext": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 24}),
    "dinov2": lambda: BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIDE),
    "vit": lambda: ViTImageProcessorPil(size=SIDE),
    "vit, sides of a range": lambda: ViTImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 40}),
    "large convnext": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "efficientnet": lambda: EfficientNetImageProcessorPil(size=SIDE),
    "mobilenet": lambda: MobileNetV2ImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE),
}
SIZES = [(30, 40), (24, 24), (40, 30), (1, 1), (7, 13), (100, 60), (333, 200)]


@pytest.fixture
def processor():
    return tiny_processor()


@pytest.fixture(params=["clip", "siglip", "siglip2", "convnext", "dinov2", "vit"])
def any_processor(request):
    image_processor = IMAGE_PROCESSORS[request.param]()
    return MSResamplerProcessor(image_processor, tiny_tokenizer(), patch_size=4, visual_tokens=9)


def image_tokens(inputs) -> list[int]:
    return [list(row).count(IMAGE) for row in inputs["input_ids"]]


def pixel_values(processor, source) -> torch.Tensor:
    return processor(images=[source], text="<image>", return_tensors="pt")["pixel_values"]


def upright(source):
    return open_picture(source, max_pixels=100_000_000)


def as_file(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# Placeholders and budgets


def test_a_placeholder_becomes_one_token_for_every_visual_token(processor):
    one, two = picture(0), picture(1)
    a, b, c = tiny_tokenizer()("abc")["input_ids"]
    assert processor(images=[one], text="a<image>b")["input_ids"] == [[a, *[IMAGE] * 4, b]]
    inputs = processor(images=[one, two], text=["<image>a<image>"], visual_tokens=[1, (1, 2)])
    assert inputs["input_ids"] == [[IMAGE, a, IMAGE, IMAGE]]
    assert processor(text=["abc"])["input_ids"] == [[a, b, c]]


def test_images_keep_their_order_over_prompts(processor):
    images = [picture(n) for n in range(3)]
    each = torch.cat([pixel_values(processor, image) for image in images])
    flat = processor(images=images, text=["<image>", "<image>a<image>"], return_tensors="pt")
    nested = processor(images=[[images[0]], images[1:]], text=["<image>", "<image>a<image>"], return_tensors="pt")
    assert torch.equal(flat["pixel_values"], each)
    assert torch.equal(nested["pixel_values"], each)
    assert torch.equal(flat["input_ids"], nested["input_ids"])


@pytest.mark.parametrize(
    ("budget", "grids"),
    [
        (9, [(3, 3), (3, 3)]),
        ((2, 3), [(2, 3), (2, 3)]),
        ([1, (3, 2)], [(1, 1), (3, 2)]),
        ([[1, 2], 4], [(1, 2), (2, 2)]),
        ([None, 9], [(2, 2), (3, 3)]),
    ],
)
def test_budgets_at_call_time(processor, budget, grids):
    inputs = processor(
        images=[picture(0), picture(1)], text=["<image>one", "two<image>"], visual_tokens=budget, return_tensors="pt"
    )
    assert [tuple(grid) for grid in inputs["token_grids"].tolist()] == grids
    assert image_tokens(inputs) == [rows * columns for rows, columns in grids]
    with torch.no_grad():
        assert torch.isfinite(tiny_model()(**inputs).logits).all()


@pytest.mark.parametrize("budget", [4, 9, (2, 3), [1, 6]])
def test_a_budget_that_is_changed_later_changes_text_and_grids(processor, budget):
    processor.visual_tokens = budget
    inputs = processor(images=[picture()], text="<image>", return_tensors="pt")
    assert (
        set(inputs) == {"input_ids", "attention_mask", "pixel_values", "token_grids"} <= {*processor.model_input_names}
    )
    assert image_tokens(inputs) == inputs["token_grids"].prod(-1).tolist()
    with torch.no_grad():
        assert torch.isfinite(tiny_model()(**inputs).logits).all()


def test_a_processor_without_a_budget_asks_for_one_token_a_patch():
    inputs = tiny_processor(visual_tokens=None)(images=[picture()], text="<image>", return_tensors="pt")
    assert inputs["token_grids"].tolist() == [[6, 6]]
    with torch.no_grad():
        assert torch.isfinite(tiny_model()(**inputs).logits).all()


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (37, "A budget of 37 visual tokens is impossible for 6 x 6 = 36 patches"),
        ((7, 6), "A budget of 42 visual tokens is impossible for 6 x 6 = 36 patches"),
        (0, "A budget of 0 visual tokens is impossible"),
        ((0, 3), r"Visual tokens are a count or a grid \(rows, columns\) of two positive integers, got \(0, 3\)"),
        (31, "31 visual tokens cannot be laid out as a grid over 6 x 6 patches; use a count such as 28, 30, 32"),
        ([4, 4, 4], "Got 3 entries in `visual_tokens` for 1 images"),
    ],
)
def test_impossible_budgets(processor, budget, sentence):
    with pytest.raises(ValueError, match=sentence):
        processor(images=[picture()], text="<image>", visual_tokens=budget)


# Counts of images, prompts and placeholders


@pytest.mark.parametrize(
    ("images", "text", "sentence"),
    [
        (2, ["<image>"], "Found total 1 <image> tokens and 2 images"),
        (1, ["<image><image>"], "Found total 2 <image> tokens and 1 images"),
        (1, "no placeholder", "Found total 0 <image> tokens and 1 images"),
        (0, ["<image>"], "Found 1 <image> tokens in the text but no images were passed"),
    ],
)
def test_more_or_fewer_images_than_placeholders(processor, images, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        processor(images=[picture(n) for n in range(images)], text=text)


def test_nested_images_are_counted_prompt_by_prompt(processor):
    one, two, three = (picture(n) for n in range(3))
    inputs = processor(images=[[one, two], [three], []], text=["<image><image>", "<image>", "none"])
    assert image_tokens(inputs) == [8, 4, 0]
    assert image_tokens(processor(images=[[one, two]], text="<image><image>")) == [8]
    assert image_tokens(processor(images=((one,), (two,)), text=("<image>", "<image>"))) == [4, 4]
    for images, text, sentence in (
        ([[one, two], [three]], ["<image>", "<image><image>"], "Prompt 1 has 1 <image> placeholders, but 2 images"),
        ([[one], [two, three]], ["<image>", "<image>"], "Prompt 2 has 1 <image> placeholders, but 2 images"),
        ([[], [one]], ["<image>", "none"], "Prompt 1 has 1 <image> placeholders, but 0 images"),
        ([[one], [two]], ["<image><image>"], "Got 2 lists of images for 1 prompts"),
        ([one, [two]], ["<image>", "<image>"], "one flat list, or one list for each prompt, not a mixture"),
    ):
        with pytest.raises(ValueError, match=sentence):
            processor(images=images, text=text)


@pytest.mark.parametrize("images", [None, [], [[]], [[], []], (), np.zeros((0, 8, 8, 3))])
def test_nothing_is_the_same_in_every_form(processor, images):
    inputs = processor(images=images, text=["a", "bc"], videos=images, audio=images, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (2, 2)


def test_images_need_no_text(processor):
    assert set(processor(images=[picture()])) == {"pixel_values", "token_grids"}
    assert torch.equal(
        processor(images=picture(), return_tensors="pt")["pixel_values"], pixel_values(processor, picture())
    )


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "You need to provide at least one input"),
        ({"images": []}, "You need to provide at least one input"),
        ({"text": []}, "Give at least one prompt"),
        ({"images": [[picture()]], "text": [["a", "b"]]}, "`text` must be a string or list of strings"),
        ({"text": "a", "videos": [np.zeros((2, 8, 8, 3), dtype=np.uint8)]}, "Found 0 <video> placeholders for 1 clips"),
        ({"text": "a", "audio": np.zeros(10)}, "it takes no audio"),
        ({"text": "<image>", "images": [3]}, "a path, a URL, base64 or bytes, got int"),
        (
            {"text": "<image>long", "images": [picture()], "truncation": True, "max_length": 3},
            r"Mismatch in `image` token count .* ids=\[3\] and text=\[4\]",
        ),
    ],
)
def test_inputs_that_make_no_sense(processor, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        processor(**inputs)


MESSAGE = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]}]
ASK = {
    "call": lambda processor, **options: processor(images=[picture()], text="<image>", **options),
    "template": lambda processor, **options: processor.apply_chat_template(
        MESSAGE, tokenize=True, return_dict=True, **options
    ),
    "template, text only": lambda processor, **options: processor.apply_chat_template(MESSAGE, **options),
    "processor_kwargs": lambda processor, **options: processor.apply_chat_template(MESSAGE, processor_kwargs=options),
    "counts": lambda processor, **options: processor._get_num_multimodal_tokens([(24, 24)], **options),
}


@pytest.mark.parametrize("way", ASK)
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"visual_token": 9}, "`visual_token` is not an option of the processor; did you mean `visual_tokens`?"),
        ({"slices": 9}, "`slices` is not an option of the processor"),
        ({"num_crops": 4}, "`num_crops` is not an option"),
        (
            {"images_kwargs": {"do_rezise": False}},
            "`do_rezise` is not an option of the processor; did you mean `do_resi",
        ),
        (
            {"text_kwargs": {"max_lenght": 3}},
            "`max_lenght` is not an option of the processor; did you mean `max_length`",
        ),
        ({"images_kwargs": {"max_length": 3}}, "`max_length` is not an option"),
        ({"videos_kwargs": {"slices": 2}}, "`slices` is not an option"),
        ({"image_kwargs": {}}, "`image_kwargs` is not an option of the processor; did you mean `images_kwargs`?"),
    ],
    ids=str,
)
def test_unknown_options_are_refused_with_the_nearest_name(processor, way, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ASK[way](processor, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "longest", "truncation": None, "padding_side": "right", "return_token_type_ids": False},
        {"add_special_tokens": False, "return_mm_token_type_ids": True, "return_text_replacement_offsets": True},
        {"images_kwargs": {"visual_tokens": 4}, "text_kwargs": {"padding": True}, "videos_kwargs": {}},
        {"do_rescale": True, "resample": 2, "size": {"shortest_edge": 24}, "device": "cpu", "return_tensors": "np"},
        {"do_sample_frames": False, "num_frames": 2, "videos_kwargs": {"fps": 2}, "audio_kwargs": {}},  # of no videos
        {"common_kwargs": {"return_tensors": "pt"}, "sanitize_control_tokens": False},
    ],
    ids=str,
)
def test_the_options_of_transformers_are_known(processor, options):
    assert image_tokens(processor(images=[picture()], text="<image>", **options)) == [4]


def test_names_are_those_that_transformers_expects():
    """An option of calls is no argument of the class, and their table has the name of the class."""
    options = MSResamplerProcessor.valid_processor_kwargs
    assert options is processing_ms_resampler.MSResamplerProcessorKwargs
    named = {
        *options.__annotations__,
        *(name for group in options.__annotations__.values() for name in getattr(group, "__annotations__", ())),
    }
    assert {"visual_tokens", "padding_side", "images_kwargs"} < named
    assert not named & set(inspect.signature(MSResamplerProcessor).parameters)


def test_options_in_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for name, near in {"visual_token": "visual_tokens", "max_pixel": "max_pixels", "num_crops": None}.items():
        with pytest.raises(ValueError, match=f"`{name}` is not an option" + (f".* `{near}`" if near else "")):
            AutoProcessor.from_pretrained(tmp_path, **{name: 4})
    loaded = AutoProcessor.from_pretrained(
        tmp_path, trust_remote_code=True, use_fast=True, do_rescale=False, model_max_length=99, visual_tokens=9
    )
    assert (loaded.image_processor.do_rescale, loaded.tokenizer.model_max_length, loaded.visual_tokens) == (
        False,
        99,
        9,
    )


def test_batches_are_padded_on_the_left_unless_asked_otherwise(processor, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"
    MSResamplerProcessor(processor.image_processor, tokenizer, patch_size=4).save_pretrained(tmp_path)
    written = tmp_path / "tokenizer_config.json"
    assert json.loads(written.read_text())["padding_side"] == "left"
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    written.write_text(written.read_text().replace('"left"', '"right"'))  # a folder of earlier code
    for options, side in (({}, "left"), ({"padding_side": "right"}, "right")):
        loaded = AutoProcessor.from_pretrained(tmp_path, **options)
        assert loaded.tokenizer.padding_side == side
        mask = [[0, 1], [1, 1]] if side == "left" else [[1, 0], [1, 1]]
        assert loaded(text=["a", "bc"])["attention_mask"] == mask
    assert processor(text=["a", "bc"], padding_side="right")["attention_mask"] == [[1, 0], [1, 1]]


def test_a_tokenizer_without_the_image_token():
    with pytest.raises(ValueError, match="does not know the image token '<picture>': add it with"):
        tiny_processor(image_token="<picture>")


# Image processors and servers


def test_counts_are_those_of_every_image_processor(any_processor):
    for size in SIZES:
        inputs = any_processor(images=[picture(0, size)], text="<image>", return_tensors="pt")
        if "spatial_shapes" in inputs:
            (rows, columns), mask = inputs["spatial_shapes"][0].tolist(), inputs["pixel_attention_mask"][0]
            assert mask.tolist() == [1] * (rows * columns) + [0] * (36 - rows * columns)
            assert inputs["pixel_values"].shape == (1, 36, 4 * 4 * 3)
        else:
            assert inputs["pixel_values"].shape == (1, 3, 24, 24)
        assert image_tokens(inputs) == [9]
        whole = any_processor(images=[picture(0, size)], text="<image>", visual_tokens=(1, 2), return_tensors="pt")
        assert whole["token_grids"].tolist() == [[1, 2]]


sides = st.integers(1, 700)


@settings(max_examples=300)
@given(
    kind=st.sampled_from(sorted(IMAGE_PROCESSORS)),
    size=st.tuples(sides, sides),
    budget=st.sampled_from([None, 1, 4, (1, 2)]),
    options=st.sampled_from([{}, {}, {"do_center_crop": False}, {"size": {"height": 20, "width": 28}}]),
)
def test_counts_that_servers_ask_for_are_those_of_processing(kind, size, budget, options):
    """Of any size; options only for image processors that take them, and pictures that may be scaled whole."""
    assume(kind != "vit, sides of a range" or max(size) < 40 * min(size))  # it scales longer ones to no pixel at all
    if "convnext" in kind or kind == "siglip2" or max(size) > 50 * min(size):
        options = {}
    processor = MSResamplerProcessor(IMAGE_PROCESSORS[kind](), tiny_tokenizer(), patch_size=4, visual_tokens=None)
    try:
        inputs = processor(images=[picture(0, size)], text="<image>", visual_tokens=budget, **options)
        expected = image_tokens(inputs)
    except ValueError as error:  # SigLIP 2 has grids of patches on which a budget cannot be laid
        expected = str(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "new", lambda *_: pytest.fail("a blank picture"))
        try:
            counts = processor._get_num_multimodal_tokens(image_sizes=[size], visual_tokens=budget, **options)
            got = counts["num_image_tokens"]
            assert counts["num_image_patches"] == [1]
        except ValueError as error:
            got = str(error)
    assert got == expected


def test_counts_of_a_list_of_budgets_and_of_huge_pictures(any_processor):
    counts = any_processor._get_num_multimodal_tokens([(10_000, 10_000)] * 3, visual_tokens=[4, (1, 2), None])
    assert counts["num_image_tokens"] == [4, 2, 9]
    assert "num_image_tokens" not in any_processor._get_num_multimodal_tokens()


@pytest.mark.parametrize("budget", [None, 9, [1, (2, 3)]])
def test_what_vllm_asks_of_a_processor(any_processor, budget, tmp_path):
    """Its calls, as its backend for transformers' models makes them: placeholders alone, with pictures and offsets."""
    any_processor.save_pretrained(tmp_path)
    options = {} if budget is None else {"visual_tokens": budget}
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True, tokenizer=tiny_tokenizer(), **options)
    images = [picture(0, (31, 40)), picture(1, (50, 40))]
    inputs = processor(
        text=processor.image_token * 2, images=images, return_text_replacement_offsets=True,
        return_mm_token_type_ids=True, return_tensors="pt", **options,
    )  # fmt: skip
    (offsets,) = inputs.pop("text_replacement_offsets")
    counts = processor._get_num_multimodal_tokens(
        image_sizes=[(image.height, image.width) for image in images], **options
    )
    tokens = [processor.tokenizer.encode(entry["replacement"], add_special_tokens=False) for entry in offsets]
    assert tokens == [[IMAGE] * count for count in counts["num_image_tokens"]]
    assert [entry["type"] for entry in offsets] == ["image", "image"]
    assert inputs.pop("mm_token_type_ids").sum() == sum(counts["num_image_tokens"])
    fields = {name: value for name, value in inputs.items() if name not in processor.tokenizer.model_input_names}
    assert all(len(value) == sum(counts["num_image_patches"]) == 2 for value in fields.values())
    assert inputs["token_grids"].prod(-1).tolist() == counts["num_image_tokens"]


def test_one_token_a_patch_follows_the_proportions_of_siglip_2():
    processor = tiny_processor("siglip2_vision_model", visual_tokens=None)
    sizes = [(24, 24), (12, 48), (48, 12)]
    inputs = processor(images=[picture(0, size) for size in sizes], text="<image>" * 3, return_tensors="pt")
    assert inputs["token_grids"].tolist() == inputs["spatial_shapes"].tolist() == [[6, 6], [3, 12], [12, 3]]
    assert processor._get_num_multimodal_tokens(sizes).num_image_tokens == [36, 36, 36]


def test_token_types_mark_the_images(processor):
    assert processor.image_token_ids == [IMAGE]
    inputs = processor(images=[[picture()], []], text=["a<image>b", "c"], return_mm_token_type_ids=True)
    assert inputs["mm_token_type_ids"] == [[0, 1, 1, 1, 1, 0], [0] * 6]
    assert [[int(token == IMAGE) for token in row] for row in inputs["input_ids"]] == inputs["mm_token_type_ids"]


def test_save_and_load(any_processor, tmp_path):
    any_processor.visual_tokens, any_processor.max_pixels = [2, 3], 12345
    any_processor.chat_template = "{{ messages[0]['content'] }}"
    any_processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MSResamplerProcessor
    assert loaded.to_dict() == any_processor.to_dict()
    assert loaded.chat_template == (tmp_path / "chat_template.jinja").read_text() == any_processor.chat_template
    assert not (tmp_path / "preprocessor_config.json").exists()
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["auto_map"] == {"AutoProcessor": "processing_ms_resampler.MSResamplerProcessor"}
    assert {name: written[name] for name in ("patch_size", "visual_tokens", "image_token", "max_pixels")} == {
        "patch_size": 4, "visual_tokens": [2, 3], "image_token": "<image>", "max_pixels": 12345,
    }  # fmt: skip
    assert "chat_template" not in written
    before, after = (
        each(images=[picture()], text="<image>What?", return_tensors="pt") for each in (any_processor, loaded)
    )
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert AutoProcessor.from_pretrained(tmp_path, visual_tokens=4).visual_tokens == 4


# Where images come from


class Server(BaseHTTPRequestHandler):
    """Pictures, a page, a missing file, a broken answer, and one that never comes."""

    def do_GET(self):
        if self.path == "/slow":
            self.server.closing.wait(30)
            return
        if self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader has gone
                while not self.server.closing.is_set():
                    self.wfile.write(bytes(2**16))
            return
        kind, body = {
            "/picture": ("image/png", as_file(picture(5))),
            "/page": ("text/html", b"<!doctype html><title>Not a picture</title>"),
            "/short": ("image/png", as_file(picture(5))),
        }.get(self.path, ("text/plain", b"nothing here"))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture")
        else:
            self.send_response(404 if kind == "text/plain" else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + 100 * (self.path == "/short")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.closing = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        yield f"http://127.0.0.1:{server.server_port}"
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def sources(tmp_path, server, monkeypatch):
    """The same picture in every form in which it can be given."""
    monkeypatch.chdir(tmp_path)
    data = as_file(picture(5))
    Path("picture.png").write_bytes(data)
    encoded = base64.b64encode(data).decode()
    return {
        "PIL": picture(5),
        "open file": Image.open(io.BytesIO(data)),
        "path": str(tmp_path / "picture.png"),
        "relative path": "picture.png",
        "Path": Path("picture.png"),
        "URL": f"{server}/picture",
        "moved URL": f"{server}/moved",
        "base64": encoded,
        "base64 in lines": base64.encodebytes(data).decode(),
        "data URL": f"data:image/png;base64,{encoded}",
        "bytes": data,
        "bytearray": bytearray(data),
        "array": np.asarray(picture(5)),
        "channels first": np.asarray(picture(5)).transpose(2, 0, 1),
        "tensor": torch.tensor(np.asarray(picture(5))),
    }


def test_pictures_come_from_anywhere(processor, sources):
    expected = pixel_values(processor, picture(5))
    for name, source in sources.items():
        assert torch.equal(pixel_values(processor, source), expected), name


def test_chat_messages_bring_pictures_from_anywhere(processor, sources):
    content = [{"type": "image", "image": sources[name]} for name in ("PIL", "bytes", "relative path", "Path", "array")]
    content += [{"type": "image", "path": sources["path"]}, {"type": "image", "url": sources["URL"]}]
    content += [{"type": "image", "url": sources["data URL"]}, {"type": "image", "base64": sources["base64"]}]
    content += [{"type": "image_url", "image_url": {"url": sources["data URL"]}}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}],
        tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"visual_tokens": (1, 2)},
    )  # fmt: skip
    expected = pixel_values(processor, picture(5))
    assert torch.equal(inputs["pixel_values"], expected.expand(len(content), -1, -1, -1))
    assert image_tokens(inputs) == [2 * len(content)]


@pytest.mark.parametrize(
    ("limit", "value", "sentence"),
    [("DOWNLOAD_BYTES", 10**6, "has more than 1,000,000 bytes"), ("DOWNLOAD_SECONDS", -1, "did not arrive within")],
)
def test_a_download_without_end_is_given_up(processor, server, monkeypatch, limit, value, sentence):
    monkeypatch.setattr(images_ms_resampler, limit, value)
    with pytest.raises(ValueError, match=f"'{server}/endless' could not be read as an image: it {sentence}"):
        processor(images=[f"{server}/endless"], text="<image>")


def test_a_grey_array_and_one_with_alpha_are_pictures(processor):
    values = np.asarray(picture(5))
    grey = pixel_values(processor, values[..., 0])
    assert torch.equal(grey, pixel_values(processor, values[..., :1].repeat(3, -1)))
    opaque = np.concatenate([values, np.full_like(values[..., :1], 255)], axis=-1)
    assert torch.equal(pixel_values(processor, opaque), pixel_values(processor, values))
    clear = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    assert torch.equal(pixel_values(processor, clear), pixel_values(processor, np.full_like(values, 255)))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{server}/missing", "'http://.*/missing' could not be read as an image: HTTP Error 404: Not Found"),
        ("{server}/page", "'http://.*/page' is not an image that can be read; use PNG or JPEG"),
        ("{server}/short", "could not be read as an image: .*IncompleteRead"),
        ("{server}/slow", "'http://.*/slow' could not be read as an image: timed out"),
        ("http://127.0.0.1:1/refused", "could not be read as an image: .*[Rr]efused"),
        ("http://127.0.0.1:1/with spaces", "could not be read as an image: URL can't contain control characters"),
        ("missing.png", "There is no image file at 'missing.png'"),
        ("größer", "There is no image file at 'größer'"),
        ("text.png", "'text.png' is not an image that can be read; use PNG or JPEG"),
        ("empty.png", "'empty.png' is not an image that can be read"),
        ("half.png", "'half.png' could not be read as an image: .*truncated"),
        ("wrong.ppm", "'wrong.ppm' could not be read as an image: "),
        (".", "'.' could not be read as an image: .*directory"),
        (b"no picture", "The given bytes is not an image that can be read"),
        ("data:image/png;base64,AAAA", "'data:image/png;base64,AAAA' is not an image that can be read"),
    ],
)
def test_what_is_no_picture_gets_one_sentence(processor, tmp_path, monkeypatch, server, source, sentence):
    monkeypatch.chdir(tmp_path)
    if "slow" in str(source):
        monkeypatch.setattr(images_ms_resampler, "URL_TIMEOUT_SECONDS", 0.3)
    Path("text.png").write_text("not a picture")
    Path("empty.png").touch()
    Path("half.png").write_bytes(as_file(picture())[:500])
    Path("wrong.ppm").write_bytes(b"P3\n2 1\n255\n0 0 0 0 0 x\n")
    source = source.format(server=server) if isinstance(source, str) else source
    with pytest.raises(ValueError, match=sentence) as caught:
        processor(images=[source], text="<image>")
    assert type(caught.value) is ValueError
    content = [{"type": "image", "image": source}]
    with pytest.raises(ValueError, match=sentence):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


# The pixel limit


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "sentence"),
    [
        (12_000, 10_000, "has 12000 x 10000 = 120,000,000 pixels, more than the limit of 100,000,000; scale it down"),
        (60_000, 60_000, r"too large: Image size \(3600000000 pixels\) exceeds limit"),
    ],
)
def test_too_many_pixels_are_refused_from_the_header(processor, tmp_path, monkeypatch, width, height, sentence):
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for source in (str(tmp_path / "bomb.png"), tmp_path / "bomb.png", png_of(width, height)):
        tracemalloc.start()
        with pytest.raises(ValueError, match=sentence):
            processor(images=[source], text="<image>")
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_the_limit_is_a_field_and_exact(tmp_path):
    processor = tiny_processor(max_pixels=1200)
    for source in (picture(0, (30, 40)), as_file(picture(0, (30, 40)))):
        pixel_values(processor, source)
    for source, name in (
        (picture(0, (30, 41)), "The given Image"), (as_file(picture(0, (41, 30))), "The given bytes"),
        (np.asarray(picture(0, (30, 41))), "The given Image"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} has .* = 1,230 pixels, more than the limit of 1,200"):
            processor(images=[source], text="<image>")


def test_pictures_between_two_limits_come_without_a_warning(processor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert torch.equal(pixel_values(processor, as_file(picture())), pixel_values(processor, picture()))
    assert pixel_values(processor, as_file(picture(0, (10, 190)))).shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="too large: Image size"):
        processor(images=[as_file(picture(0, (50, 50)))], text="<image>")


# Modes, orientation and proportions

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = RAMP[..., None].repeat(3, -1)
DARK = Image.fromarray((RAMP // 2).astype(np.uint16))
ONE_BIT = Image.fromarray(RAMP > 127)
BLUE_IS_CLEAR = Image.new("P", (2, 1))
BLUE_IS_CLEAR.putpalette([255, 0, 0, 0, 0, 255])
BLUE_IS_CLEAR.putpixel((1, 0), 1)
MODES = {
    "grey": (Image.fromarray(RAMP), GREY),
    "16 bits": (Image.fromarray(RAMP.astype(np.uint16) * 257), GREY),
    "16 bits, nearly black": (DARK, np.zeros_like(GREY)),
    "32 bits": (Image.fromarray(RAMP.astype(np.int32) * 257), GREY),
    "32 bits, small values": (Image.fromarray(RAMP.astype(np.int32)), GREY),
    "float to 1": (Image.fromarray(RAMP.astype(np.float32) / 255), GREY),
    "float to 255": (Image.fromarray(RAMP.astype(np.float32)), GREY),
    "float with a hole": (Image.fromarray(np.where(RAMP == 0, np.nan, RAMP / 255).astype(np.float32)), GREY),
    "1 bit": (ONE_BIT, np.where(GREY > 127, 255, 0)),
    "palette": (Image.fromarray(GREY).quantize(256), GREY),
    "alpha": (Image.fromarray(np.dstack([GREY * 0, RAMP])), 255 - GREY),
    "grey with alpha": (Image.merge("LA", [Image.new("L", (16, 16)), Image.fromarray(RAMP)]), 255 - GREY),
    "CMYK": (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), np.full((2, 2, 3), [255, 0, 0])),
    "YCbCr": (Image.fromarray(GREY).convert("YCbCr"), GREY),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image, expected = MODES[mode]
    result = to_rgb(image)
    assert result.mode == "RGB"
    assert np.abs(np.asarray(result).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("16 bits", {"form": "PNG"}, GREY),
        ("16 bits", {"form": "TIFF"}, GREY),
        ("float to 1", {"form": "TIFF"}, GREY),
        ("1 bit", {"form": "PNG"}, MODES["1 bit"][1]),
        ("palette", {"form": "GIF"}, GREY),
        ("grey", {"form": "PNG", "transparency": 0}, np.where(GREY == 0, 255, GREY)),
        ("alpha", {"form": "WEBP", "lossless": True, "exact": True}, MODES["alpha"][1]),
        ("CMYK", {"form": "JPEG"}, MODES["CMYK"][1]),
        ("CMYK", {"form": "TIFF"}, MODES["CMYK"][1]),
    ],
    ids=str,
)
def test_every_mode_survives_its_file(processor, name, options, expected):
    opened = upright(as_file(MODES[name][0], **options))
    assert np.abs(np.asarray(opened).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_clear_palette_entry_is_white(processor, transparency):
    data = as_file(BLUE_IS_CLEAR, transparency=transparency)
    assert np.asarray(upright(data)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


# How a scene is stored under an EXIF orientation: where its row 0 and column 0 lie (the EXIF standard's table).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("options", [{"form": "PNG"}, {"form": "WEBP", "lossless": True}, {"form": "TIFF"}], ids=str)
def test_pictures_are_turned_upright(processor, orientation, options):
    expected = np.asarray(picture(2, (20, 30)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](expected)))
    data = as_file(stored, exif=exif, **options)
    assert np.array_equal(upright(data), expected)
    assert np.array_equal(upright(Image.open(io.BytesIO(data))), expected)


@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0garbage!", b"Exif\0\0MM\0*", b"Exif\0\0"])
def test_damaged_exif_data_do_not_spoil_a_picture(processor, exif):
    assert np.array_equal(upright(as_file(picture(), exif=exif)), picture())


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 200)])
def test_extreme_proportions(any_processor, size):
    image = picture(0, size)
    inputs = any_processor(images=[image], text="<image>", visual_tokens=(1, 1), return_tensors="pt")
    assert torch.isfinite(inputs["pixel_values"]).all()
    assert any_processor._get_num_multimodal_tokens([size], visual_tokens=(1, 1)).num_image_tokens == [1]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (24, 24), (31, 77)])
def test_the_files_of_extreme_pictures_open(processor, size):
    for form in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(upright(as_file(picture(0, size), form)), picture(0, size))


def test_a_long_picture_is_not_scaled_whole(processor):
    """A picture of 1 x 5000 scaled to a short side of 24 would have 24 x 120,000 pixels."""
    tracemalloc.start()
    pixel_values(processor, picture(0, (1, 5000)))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["clip", "dinov2", "convnext"])
@pytest.mark.parametrize("size", [(2, 100), (100, 2), (3, 99), (48, 480), (24, 241)])
def test_cropping_invisible_ends_changes_no_pixel(kind, size):
    plain, image = IMAGE_PROCESSORS[kind](), picture(0, size)
    ours = pixel_values(MSResamplerProcessor(plain, tiny_tokenizer(), patch_size=4, visual_tokens=4), image)
    theirs = plain([image], return_tensors="pt")["pixel_values"]
    assert (ours - theirs).abs().max() < 0.05  # three of 256 levels: where the scaled length is not a whole number


@pytest.mark.parametrize("size", [(30, 41), (1, 5000), (3, 50), (4, 4), (5, 200), (200, 6), (24, 241)])
def test_an_array_is_the_picture_that_it_holds(processor, size):
    expected = pixel_values(processor, picture(0, size))
    array = np.asarray(picture(0, size))
    assert torch.equal(pixel_values(processor, array), expected)
    reversed_channels = np.ascontiguousarray(array[..., ::-1])
    assert torch.equal(pixel_values(processor, reversed_channels[..., ::-1]), expected)


def test_arrays_go_on_as_torch_takes_them(processor):
    """torchvision's image processors begin with `torch.from_numpy`."""
    array = np.array(picture(0, (30, 40)))
    assert upright(array) is array
    locked = array.copy()
    locked.flags.writeable = False
    for odd in (locked, array[..., ::-1], array[::-1], np.moveaxis(array, 2, 0)[::-1] / np.float32(255)):
        opened = upright(odd)
        assert torch.from_numpy(opened).is_contiguous()
        assert opened.flags.writeable
        np.testing.assert_array_equal(opened, odd)


def test_nothing_is_cropped_where_the_caller_changes_the_size(processor):
    image = picture(0, (24, 240))
    inputs = processor(images=[image], do_center_crop=False, visual_tokens=(1, 10), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 24, 240)
    mean, std = (np.array(processor.image_processor.to_dict()[name]) for name in ("image_mean", "image_std"))
    expected = (np_pixels(image) / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(inputs["pixel_values"][0], expected, atol=1e-5)


def test_files_are_closed(processor, tmp_path):
    for form in ("GIF", "TIFF", "PNG"):
        (tmp_path / form).write_bytes(as_file(picture(), form))
        pixel_values(processor, tmp_path / form)
    (tmp_path / "bomb").write_bytes(png_of(12_000, 10_000))
    with pytest.raises(ValueError, match="more than the limit"):
        processor(images=[tmp_path / "bomb"], text="<image>")
    open_files = {os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")} if Path("/proc").exists() else ()
    assert not [name for name in open_files if name.startswith(str(tmp_path))]
