"""Videos in the processor: opened, sampled, written into prompts and laid out under an exact budget."""

import io
import json
import random
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch.testing import assert_close
from transformers.video_utils import VideoMetadata

from ms_resampler.answers import ask
from ms_resampler.videos_ms_resampler import MOST_FRAMES, Sampling, clip_grid, clips_in, of_steps, open_clip
from ms_resampler_cli.main import main

FORMS = pytest.mark.parametrize("form", ["frames", "scopes"])


def frames(count: int, seed: int = 0, size=(30, 40)):
    return [tiny.picture(seed + number, size) for number in range(count)]


def array(count: int, size=(30, 40)) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames(count, size=size)])


def processor(form: str = "frames", **changes):
    return tiny.tiny_processor(**{"visual_tokens": 24, "video_form": form} | changes)


def prompt(processor_, inputs, row: int = 0) -> str:
    """What the model reads, with # for image tokens, without padding."""
    kept = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    return processor_.tokenizer.decode(kept).replace("<image>", "#")


def shown(text: str) -> str:
    return re.sub("#+", lambda run: f"[{len(run[0])}]", text)


def processed(processor_, videos, text="<video>", **options):
    return processor_(videos=videos, text=text, return_tensors="pt", **options)


def test_frames_are_images_that_share_the_budget_and_have_their_times():
    processor_ = processor()
    inputs = processed(processor_, [frames(6)], "See <video>!", video_metadata={"fps": 2})
    assert shown(prompt(processor_, inputs)) == "See " + "\n".join(f"{n / 2:.1f}s[4]" for n in range(6)) + "!"
    images = processor_(images=frames(6), text="<image>" * 6, visual_tokens=4, return_tensors="pt")
    for name in ("pixel_values", "token_grids"):
        assert_close(inputs[name], images[name], rtol=0, atol=0)
    assert set(inputs) == set(images)


def test_steps_of_scopes_have_the_mean_time_of_their_frames():
    processor_ = processor("scopes")
    inputs = processed(processor_, [frames(6)], "See <video>!", video_metadata={"fps": 2})
    assert inputs["clips"].tolist() == [[6, 3]]
    assert inputs["token_grids"].tolist() == [[2, 4]]
    assert shown(prompt(processor_, inputs)) == "See 0.2s[8]\n1.2s[8]\n2.2s[8]!"
    assert of_steps([0.0, 1.0, 2.0], 2) == [0.5, 1.5]  # steps overlap as cells do


@FORMS
def test_frames_without_known_times_have_no_stamps(form):
    processor_ = processor(form)
    text = shown(prompt(processor_, processed(processor_, [frames(4)])))
    assert text == ("[6]\n[6]\n[6]\n[6]" if form == "frames" else "[12]\n[12]")


@FORMS
@pytest.mark.parametrize("budget", [17, 24, 36, 97, "auto", None])
def test_budgets_are_exact_for_clips_of_any_length(form, budget):
    processor_ = processor(form, auto_tokens=(20, 90))
    processor_.visual_tokens, draw = budget, random.Random(str(budget))
    for _ in range(4):
        count, size = draw.randint(1, 12), (draw.randint(20, 60), draw.randint(20, 60))
        if budget == 97 and (form == "scopes" or count < 4):
            continue
        if budget == 17 and (form == "scopes" or count == 1):
            continue
        inputs = processed(processor_, [frames(count, size=size)])
        found = int((inputs["input_ids"] == tiny.IMAGE).sum())
        if budget is None:
            assert found == count * 36
        elif budget == "auto":
            assert abs(found - min(max(count * 9, 20), 90)) <= 4
        else:
            assert found == budget


@pytest.mark.parametrize(
    ("count", "frames_", "patches", "expected"),
    [
        (144, 16, (24, 24), (4, (6, 6))),
        (144, 1, (24, 24), (1, (12, 12))),
        (144, 8, (24, 24), (3, (6, 8))),
        (8, 64, (6, 6), (8, (1, 1))),
        (7, 9, (6, 6), (7, (1, 1))),
        (72, 2, (6, 6), (2, (6, 6))),
    ],
)
def test_time_is_reduced_as_height_and_width_are(count, frames_, patches, expected):
    assert clip_grid(count, frames_, patches, (1, 1)) == expected


def test_a_grid_of_steps_is_laid_out_as_given():
    inputs = processed(processor("scopes"), [frames(5)], visual_tokens=(3, 2, 4))
    assert (inputs["clips"].tolist(), inputs["token_grids"].tolist()) == ([[5, 3]], [[2, 4]])
    inputs = processed(processor(), [frames(3)], visual_tokens=(3, 2, 4))
    assert inputs["token_grids"].tolist() == [[2, 4]] * 3
    # the grid of images that a model has by default is a number of tokens for a clip
    inputs = processed(processor("scopes", visual_tokens=(4, 6)), [frames(6)])
    assert (inputs["clips"].tolist(), inputs["token_grids"].tolist()) == ([[6, 3]], [[2, 4]])


@FORMS
def test_a_total_is_shared_by_images_and_clips_of_each_prompt(form):
    processor_, image = processor(form), tiny.picture(9)
    inputs = processor_(
        images=[[image], []], videos=[frames(4), frames(5)], text=["<video> or <image>", "<video>"],
        visual_tokens_total=40, return_tensors="pt",
    )  # fmt: skip
    tokens = (inputs["input_ids"] == tiny.IMAGE).sum(-1)
    assert tokens.tolist() == [40, 40]
    one = prompt(processor_, inputs).split(" or ")
    assert [part.count("#") for part in one] == [20, 20]


@FORMS
def test_lists_of_budgets_go_by_the_order_of_the_prompt(form):
    inputs = processor(form)(
        images=[tiny.picture()], videos=[frames(3)], text="<image><video>", visual_tokens=[4, 12], return_tensors="pt"
    )
    assert inputs["token_grids"].prod(-1).tolist() == (
        [4, 4, 4, 4] if form == "frames" else [4, 12 // inputs["clips"][1, 1]]
    )


def test_every_form_of_frames_is_the_same_clip():
    processor_, expected = processor(), processed(processor(), [frames(3)])
    for same in (array(3), array(3).transpose(0, 3, 1, 2), torch.tensor(array(3)), list(array(3)), tuple(frames(3))):
        for videos in (same, [same], [[same]]) if not isinstance(same, (list, tuple)) else ([same], [[same]]):
            assert_close(dict(processed(processor_, videos)), dict(expected), rtol=0, atol=0)
    assert len(clips_in(np.stack([array(2), array(2)]))) == 2


def test_clips_need_no_text():
    inputs = processor("scopes")(images=[tiny.picture()], videos=[frames(4)], return_tensors="pt")
    assert inputs["clips"].tolist() == [[1, 1], [4, 2]]
    assert len(inputs["pixel_values"]) == 5


# Sampling


def test_frames_are_taken_evenly():
    assert Sampling(4).choose(10, None) == [0, 2, 5, 7]
    assert Sampling(8).choose(3, None) == [0, 1, 2]
    assert Sampling(fps=2).choose(30, 10.0) == [0, 5, 10, 15, 20, 25]
    assert len(Sampling(fps=50).choose(1000, 10.0)) == MOST_FRAMES
    assert Sampling(3, whole=True).choose(5, None) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"num_frames": 3}, {"fps": 1}, {"videos_kwargs": {"num_frames": 3}}])
def test_sampled_frames_keep_their_times(options):
    processor_ = processor()
    metadata = VideoMetadata(total_num_frames=60, fps=20, frames_indices=list(range(0, 60, 10)))  # two a second
    inputs = processed(processor_, [frames(6)], video_metadata=[metadata], **options)
    if "fps" in options:  # of the clip's own 20
        assert len(inputs["pixel_values"]) == 1
    else:
        assert shown(prompt(processor_, inputs)) == "0.0s[8]\n1.0s[8]\n2.0s[8]"


# Files


def write(path, count: int = 20, rate: int = 10, size=(48, 64)):
    """A video whose frames are of one grey each, darker with time."""
    av = pytest.importorskip("av")
    with av.open(path, "w", format=None if isinstance(path, str) else "mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(rate))
        stream.height, stream.width = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for number in range(count):
            pixels = np.full((*size, 3), 240 - 10 * number, dtype=np.uint8)
            pixels[:8] = 255  # light above
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_files_are_read_by_pyav(name, tmp_path):
    write(str(tmp_path / name))
    for source in (tmp_path / name, str(tmp_path / name), (tmp_path / name).read_bytes()):
        clip = open_clip(source, None, Sampling(4), 10**6)
        assert clip.times == pytest.approx([0, 0.5, 1, 1.5], abs=0.01)
        for frame, number in zip(clip.frames, (0, 5, 10, 15), strict=True):
            assert frame.shape == (48, 64, 3)
            assert frame[20:].mean() == pytest.approx(240 - 10 * number, abs=4)
    assert len(open_clip(tmp_path / name, None, Sampling(), 10**6).frames) == 16
    assert len(open_clip(tmp_path / name, None, Sampling(fps=5), 10**6).frames) == 10


def test_a_file_that_was_filmed_on_its_side_is_upright(tmp_path):
    file = io.BytesIO()
    write(file, 3)
    numbers = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]  # a quarter clockwise
    plain = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000]
    matrices = [b"".join(n.to_bytes(4, "big", signed=True) for n in matrix) for matrix in (plain, numbers)]
    before, header, after = file.getvalue().partition(b"tkhd")
    assert matrices[0] in after
    clip = open_clip(before + header + after.replace(*matrices, 1), None, Sampling(1), 10**6)
    assert clip.frames[0].shape == (64, 48, 3)
    assert clip.frames[0][:, -6:].mean() > 250  # what was above is at the right
    assert clip.frames[0][:, :20].mean() < 245


@FORMS
def test_a_chat_with_a_file_is_answered(form, tmp_path):
    write(str(tmp_path / "clip.mp4"))
    model = tiny.tiny_model(projector={"video_form": form})
    answer = ask(
        "What?", tiny.picture(), model, processor(form), video=tmp_path / "clip.mp4", num_frames=6, scopes=True
    )
    assert answer.visual_tokens == [24, 24]
    assert all(sum(weights.values()) == pytest.approx(1) for weights in answer.scope_weights)


@pytest.mark.slow
def test_the_command_asks_about_a_file(tmp_path, capsys):
    file = str(tmp_path / "clip.mp4")
    write(file)
    tiny.tiny_model().save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    arguments = ["chat", "What?", "--video", file, "--num-frames", "6", "--model", str(tmp_path / "model")]
    assert main([*arguments, "--max-new-tokens", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    answer = ask("What?", model=str(tmp_path / "model"), video=file, num_frames=6, max_new_tokens=4)
    assert (told["answer"], told["visual_tokens"]) == (answer.text, 24)
    assert [(image["file"], image["visual_tokens"]) for image in told["images"]] == [(file, 24)]


# Chats


@FORMS
def test_clips_in_messages_stand_where_templates_put_images(form):
    processor_ = processor(form)
    parts = [
        {"type": "image", "image": tiny.picture()},
        "What is <video>, <image> and ",
        {"type": "video", "video": frames(4)},
    ]
    chat = [{"role": "user", "content": parts}]
    text = processor_.apply_chat_template(chat)
    plain = text.replace("\ufdd0", "")
    assert plain == "<|im_start|>user\n<image>\n<video>\nWhat is <video>, <image> and <|im_end|>"
    told = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor_.apply_chat_template(chat, **told)
    again = processor_(images=[tiny.picture()], videos=[frames(4)], text=text, return_tensors="pt")
    assert_close(dict(inputs), dict(again), rtol=0, atol=0)
    assert (inputs["input_ids"] == tiny.IMAGE).sum() == 48
    assert prompt(processor_, inputs).endswith("What is <video>, # and <|im_end|>")
    fewer = processor_.apply_chat_template([chat, chat], processor_kwargs={"num_frames": 2}, padding=True, **told)
    assert len(fewer["pixel_values"]) == 6


# What is wrong


@FORMS
@pytest.mark.parametrize(
    ("videos", "options", "sentence"),
    [
        ([[*frames(1), tiny.picture(size=(8, 9))]], {}, "The frames of a clip have one size, got 9 x 8, 40 x 30"),
        ([np.zeros((2, 8, 8, 5))], {}, r"a video file, got an array \(2, 8, 8, 5\)"),
        ([3], {}, "A clip is a list of frames, an array of four axes or a file, got int"),
        ([frames(3)], {"visual_tokens": (2, 2, 2, 2)}, "are a count or"),
        ([frames(3)], {"visual_tokens": (4, 2, 2)}, r"got \(4, 2, 2\)"),
        ([frames(3)], {"visual_tokens": 0}, "are a count or .*got 0"),
        ([frames(3)], {"visual_tokens": "many"}, "are a count or .*got 'many'"),
        ([frames(3)], {"visual_tokens": 10_000}, "cannot be"),
        ([frames(3)], {"num_frames": 65}, "`num_frames` is a number of frames from 1 to 64, got 65"),
        ([frames(3)], {"num_frames": 0}, "from 1 to 64, got 0"),
        ([frames(3)], {"fps": -1}, "`fps` is a positive number of frames a second, got -1"),
        ([frames(3)], {"fps": 1}, "`fps` needs the frame rate of the clip itself"),
        ([frames(3)], {"fps": 1, "num_frames": 2}, "Give `num_frames` or `fps`, not both"),
        ([frames(3)], {"video_metadata": [{"fps": 1}] * 2}, "Got 2 entries in `video_metadata` for 1 clips"),
        ([frames(3)], {"video_metadata": {"rate": 1}}, "`video_metadata` has `rate`, which is not one of"),
        ([frames(3)], {"video_metadata": {"fps": 0}}, "is a positive number, got 0"),
        ([frames(3)], {"video_metadata": {"fps": 1, "frames_indices": [0]}}, "are 1, and the clip has 3 frames"),
        ([np.zeros((65, 8, 8, 3), dtype=np.uint8)], {}, "A clip has at most 64 frames, got 65: use `num_frames`"),
        ([frames(3), frames(2)], {}, "Found 1 <video> placeholders for 2 clips; write one for each"),
        ([frames(3)], {"images": [tiny.picture()]}, "Found 0 <image> placeholders for 1 images"),
        (None, {}, "Found 1 <video> placeholders in the text, but no videos were given"),
        ([frames(3)], {"videos_kwargs": {"do_resize": False}}, "`do_resize` is not an option"),
    ],
)
def test_what_is_wrong_is_a_sentence(form, videos, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        processed(processor(form), videos, **options)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("missing.mp4", "There is no video file at 'missing.mp4'"),
        (__file__, "could not be read as a video"),
        (b"no video", "The given bytes could not be read as a video"),
    ],
    ids=["missing", "text", "bytes"],
)
def test_a_file_that_is_no_video_is_a_sentence(file, sentence):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=sentence):
        processed(processor(), [file])


def test_a_video_of_too_many_pixels_is_refused(tmp_path):
    write(str(tmp_path / "clip.mp4"), 2)
    with pytest.raises(ValueError, match="its frames have more than the limit of 3,000 pixels; scale it down first"):
        processed(processor(max_pixels=3000), [tmp_path / "clip.mp4"])


def test_too_few_tokens_for_the_frames_is_a_sentence():
    with pytest.raises(
        ValueError, match="`visual_tokens` 4 is too small: the 6 frames of the clip need one token each"
    ):
        processed(processor(visual_tokens=4), [frames(6)])
    with pytest.raises(
        ValueError, match="7 visual tokens cannot be laid out over 3 frames of 6 x 6 patches; use a count such"
    ):
        processed(processor("scopes", visual_tokens=7), [frames(3)])


def test_a_clip_in_a_message_has_frames():
    for part, sentence in (
        ({"type": "video", "video": []}, "A clip has at least one frame, got none"),
        ({"type": "video"}, "a video file, got NoneType"),
        ({"type": "video", "video": "a.mp4", "url": "b.mp4"}, r"a part 'video' with 2 clips \(video, url\); give one"),
        ({"type": "video", "video": "a.mp4", "fps": 2}, "a part 'video' with `fps`, which is not understood"),
    ):
        with pytest.raises(ValueError, match=sentence):
            processor().apply_chat_template([{"role": "user", "content": [part]}], tokenize=True, return_dict=True)


def test_without_pyav_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    sentence = "Video files are read with PyAV: `pip install av`, or give the clip as frames"
    with pytest.raises(ValueError, match=sentence):
        processed(processor(), ["clip.mp4"])
