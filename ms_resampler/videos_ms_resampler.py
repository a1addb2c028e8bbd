"""Clips: opened from frames, arrays and files, sampled in time, and laid out as tokens over time.

A clip is a list of frames (PIL images, arrays or files), an array (F, height, width, 3) or (F, 3, height, width), or a
video file, which PyAV decodes. `num_frames` frames, or `fps` a second, are taken evenly, at most MOST_FRAMES. Without
either, a file has at most FRAMES_OF_FILE, and frames are read whole.

Shapes are named as in clips_ms_resampler.py.
"""

import contextlib
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata

from .configuration_ms_resampler import nearest_grid, token_grid
from .images_ms_resampler import describe, file_of, open_picture
from .tiles_ms_resampler import Grid, budgets_for

MOST_FRAMES = 64
FRAMES_OF_FILE = 16
FILES = (str, os.PathLike, bytes, bytearray)


@dataclass
class Video:
    """A clip that is not opened yet, in the place of an image."""

    source: Any


@dataclass
class Clip:
    """A clip's frames, all of one size, and their times in seconds, if they are known."""

    frames: list[Any]
    times: list[float] | None


@dataclass
class Sampling:
    """Which frames are taken: `num_frames`, or `fps` a second; with `whole`, all."""

    num_frames: int | None = None
    fps: float | None = None
    whole: bool = False

    def choose(self, frames: int, rate: float | None) -> list[int]:
        """Numbers of the frames that are taken of so many, of which a second has `rate`."""
        count = frames
        if not self.whole and self.fps is not None:
            if not rate:
                raise ValueError(
                    "`fps` needs the frame rate of the clip itself: give `video_metadata`, such as {'fps': 30}, or use "
                    "`num_frames`."
                )
            count = min(max(1, int(frames / rate * self.fps)), MOST_FRAMES)
        elif not self.whole and self.num_frames is not None:
            count = self.num_frames
        count = min(count, frames)
        if count > MOST_FRAMES:
            raise ValueError(f"A clip has at most {MOST_FRAMES} frames, got {count}: use `num_frames` or `fps`.")
        return [number * frames // count for number in range(count)]


def read_sampling(options: Mapping[str, Any]) -> Sampling:
    """How the options of a call sample frames. Raises ValueError for what are no numbers of frames."""
    number, fps = options.get("num_frames"), options.get("fps")
    if number is not None and fps is not None:
        raise ValueError("Give `num_frames` or `fps`, not both.")
    if number is not None and not (isinstance(number, int) and 1 <= number <= MOST_FRAMES):
        raise ValueError(f"`num_frames` is a number of frames from 1 to {MOST_FRAMES}, got {number!r}.")
    if fps is not None and (not isinstance(fps, (int, float)) or isinstance(fps, bool) or not 0 < fps < math.inf):
        raise ValueError(f"`fps` is a positive number of frames a second, got {fps!r}.")
    return Sampling(number, fps, options.get("do_sample_frames") is False)


def clips_in(videos: Any) -> list[Any]:
    """The clips of nested lists, or of a batch of arrays (B, F, height, width, 3)."""
    if isinstance(videos, FILES) or getattr(videos, "ndim", 0) == 4:
        return [videos]
    if isinstance(videos, (list, tuple)) or getattr(videos, "ndim", 0) == 5:
        items = list(videos)
        frames = [isinstance(item, Image.Image) or getattr(item, "ndim", 0) in (2, 3) for item in items]
        return [items] if frames and all(frames) else [clip for item in items for clip in clips_in(item)]
    raise ValueError(f"A clip is a list of frames, an array of four axes or a file, got {type(videos).__name__}.")


def open_clip(source: Any, metadata: Any, sampling: Sampling, max_pixels: int) -> Clip:
    """Opens a clip and takes its frames. `metadata`, as transformers' VideoMetadata, tells `fps` of frames.

    Raises ValueError if it has no frames, frames of different sizes, or cannot be read.
    """
    if isinstance(source, FILES):
        sampling = sampling if sampling.fps or sampling.num_frames or sampling.whole else Sampling(FRAMES_OF_FILE)
        images, times = _read_file(source, sampling, max_pixels)
        return Clip([open_picture(image, max_pixels) for image in images], times)
    frames = _frames_of(source)
    rate, numbers = _timing(metadata, len(frames))
    chosen = sampling.choose(len(frames), rate)
    images = [open_picture(frames[number], max_pixels) for number in chosen]
    sizes = {image.size if isinstance(image, Image.Image) else image.shape[1::-1] for image in images}
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:3])
        raise ValueError(f"The frames of a clip have one size, got {shown}: resize them, or give them as images.")
    return Clip(images, [numbers[number] / rate for number in chosen] if rate else None)


def _frames_of(source: Any) -> list[Any]:
    """The frames of a list or an array. Raises ValueError if there are none."""
    if hasattr(source, "detach"):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray) and source.ndim == 4 and 3 in (source.shape[1], source.shape[3]):
        source = list(source if source.shape[3] == 3 else source.transpose(0, 2, 3, 1))
    if not isinstance(source, (list, tuple)):
        kind = f"an array {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
        raise ValueError(
            f"A clip is a list of frames, an array (frames, height, width, 3) or a video file, got {kind}."
        )
    if not source:
        raise ValueError("A clip has at least one frame, got none.")
    arrays = [frame.detach().cpu().numpy() if hasattr(frame, "detach") else frame for frame in source]
    return [a.transpose(1, 2, 0) if isinstance(a, np.ndarray) and a.shape[2:] and a.shape[2] > 4 else a for a in arrays]


def _timing(metadata: Any, frames: int) -> tuple[float | None, list[int]]:
    """The frame rate, if it is known, and the number that every frame has at that rate."""
    given = dict(metadata or {})
    known = [field.name for field in fields(VideoMetadata)]
    for name in given:
        if name not in known:
            raise ValueError(f"`video_metadata` has `{name}`, which is not one of {', '.join(known)}.")
    rate, numbers = given.get("fps"), given.get("frames_indices")
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"The `fps` of `video_metadata` is a positive number, got {rate!r}.")
    numbers = list(range(frames)) if numbers is None else [int(number) for number in numbers]
    if len(numbers) != frames:
        raise ValueError(f"`frames_indices` of `video_metadata` are {len(numbers)}, and the clip has {frames} frames.")
    return rate, numbers


def _read_file(source: Any, sampling: Sampling, max_pixels: int) -> tuple[list[np.ndarray], list[float]]:
    """Frames of a video file, upright, and their times in seconds. Raises ValueError if it cannot be read."""
    try:
        av = importlib.import_module("av")  # an import statement would demand it of all who load this code
    except ModuleNotFoundError as error:
        raise ValueError("Video files are read with PyAV: `pip install av`, or give the clip as frames.") from error
    with _in_a_sentence(source):
        container = av.open(file_of(source))
    with container:
        with _in_a_sentence(source):
            times, rate = _times_in(container, max_pixels)
        chosen = sampling.choose(len(times), rate)
        with _in_a_sentence(source):
            images = _decoded(container, chosen)
    return images, [times[number] for number in chosen[: len(images)]]


@contextlib.contextmanager
def _in_a_sentence(source: Any) -> Iterator[None]:
    """Errors of a file as a ValueError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"There is no video file at {describe(source)}.") from error
    except Exception as error:  # PyAV raises errors of many types for damaged files
        why = str(error) or type(error).__name__
        raise ValueError(f"{describe(source)} could not be read as a video: {why}.") from error


def _times_in(container: Any, max_pixels: int) -> tuple[list[float], float | None]:
    """The times of all frames in seconds, counted, because not every file tells their number, and the frame rate."""
    if not container.streams.video:
        raise ValueError("it has no pictures")
    stream = container.streams.video[0]
    if stream.width * stream.height > max_pixels:
        raise ValueError(f"its frames have more than the limit of {max_pixels:,} pixels; scale it down first")
    packets = [packet for packet in container.demux(stream) if packet.size]
    ticks = sorted(packet.dts or 0 if packet.pts is None else packet.pts for packet in packets)
    if not ticks:
        raise ValueError("it has no frames")
    times = [float((tick - ticks[0]) * stream.time_base) for tick in ticks]
    return times, (len(times) - 1) / times[-1] if times[-1] else stream.average_rate and float(stream.average_rate)


def _decoded(container: Any, chosen: list[int]) -> list[np.ndarray]:
    """The frames of some numbers (height, width, 3), upright."""
    container.seek(0)
    container.streams.video[0].thread_type = "AUTO"
    images = []
    for number, frame in enumerate(islice(container.decode(video=0), chosen[-1] + 1)):
        if number in chosen:
            turns = round(frame.rotation / 90)  # counterclockwise
            images.append(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)))
    if not images:
        raise ValueError("no frame can be decoded")
    return images


def clip_grid(budget: Any, frames: int, patches: Grid, bounds: Grid) -> tuple[int, Grid]:
    """The steps, and the token grid of each, in which a budget is laid out over the frames of a clip.

    `budget` is (steps, rows, columns), a count, "auto", or None for one token a patch. A count becomes the steps and
    the grid that reduce time most nearly as they reduce height and width:

        144 over 16 x (24, 24) -> 4, (6, 6)        144 over 1 x (24, 24) -> 1, (12, 12)

    Raises ValueError if there is no room for it.
    """
    if budget is None:
        return frames, patches
    if isinstance(budget, (list, tuple)):
        if len(budget) != 3 or not isinstance(budget[0], int) or not 1 <= budget[0] <= frames:
            raise ValueError(
                f"The visual tokens of a clip of {frames} frames are a count or (steps, rows, columns), with at most "
                f"{frames} steps, got {budget!r}."
            )
        return budget[0], token_grid(tuple(budget[1:]), patches)
    _check_count(budget)
    whole = frames * patches[0], patches[1]
    for count in budgets_for(budget, bounds, whole):
        if found := _nearest(count, frames, patches):
            return found
    if budget == "auto":
        raise ValueError(f"No number of visual tokens from {bounds[0]} to {bounds[1]} can be laid out over a clip.")
    most = frames * patches[0] * patches[1]
    counts = sorted(range(1, most + 1), key=lambda count: abs(count - budget))
    near = sorted(islice((count for count in counts if _nearest(count, frames, patches)), 3))
    raise ValueError(
        f"{budget} visual tokens cannot be laid out over {frames} frames of {patches[0]} x {patches[1]} patches; use a "
        f"count such as {', '.join(map(str, near))}, or give (steps, rows, columns)."
    )


def _check_count(budget: Any) -> None:
    """Raises ValueError unless it is "auto" or a positive number."""
    if budget != "auto" and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
        raise ValueError(f"The visual tokens of a clip are a count or (steps, rows, columns), got {budget!r}.")


def _nearest(count: int, frames: int, patches: Grid) -> tuple[int, Grid] | None:
    ways = []
    for steps in range(1, min(count, frames) + 1):
        if count % steps == 0 and (grid := nearest_grid(count // steps, patches)):
            along = math.log(math.prod(grid) / math.prod(patches)) / 2
            ways.append((round(abs(math.log(steps / frames) - along), 9), steps, grid))
    return min(ways)[1:] if ways else None


def share_of_frames(budget: Any, frames: int, patches: Grid, bounds: Grid, share: Callable[[int], list[int]]) -> list:
    """The budget of every frame that is read as an image: `share` divides a count among them.

    Raises ValueError if there is no room for it.
    """
    if budget is None:
        return [None] * frames
    if isinstance(budget, (list, tuple)):
        if len(budget) != 3 or budget[0] != frames:
            raise ValueError(
                f"The visual tokens of a clip of {frames} frames, read as images, are a count or ({frames}, rows, "
                f"columns), got {budget!r}."
            )
        return [tuple(budget[1:])] * frames
    _check_count(budget)
    if budget != "auto":
        return share(budget)
    for count in budgets_for(budget, bounds, (frames * patches[0], patches[1])):
        try:
            return share(count)
        except ValueError:
            continue
    raise ValueError(f"No number of visual tokens from {bounds[0]} to {bounds[1]} can be shared by {frames} frames.")


def of_steps(times: list[float], steps: int) -> list[float]:
    """The mean time of the frames of each step, which overlap as cells do."""
    frames = len(times)
    spans = [times[step * frames // steps : -(-(step + 1) * frames // steps)] for step in range(steps)]
    return [sum(span) / len(span) for span in spans]


__all__ = ["Clip", "Video", "clip_grid", "clips_in", "of_steps", "open_clip", "read_sampling", "share_of_frames"]
