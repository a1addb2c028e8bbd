"""Records and pictures damaged at random, through what training does with them: python fuzzed_data.py RECORDS PICTURES.

Whatever is wrong must come out as a bad record. Prints how many were bad by kind, the longest time of one, and by how
much the process grew.
"""

import copy
import io
import json
import math
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from labelled_records import turns
from PIL import Image, features
from tiny_models import picture, tiny_processor

from ms_resampler.training.collate import ConversationCollator
from ms_resampler.training.data_check import Examiner
from ms_resampler.training.records import open_records

SECONDS = 30  # that one may take at most

PARTS = [{"type": "image"}, {"type": "text", "text": "Which colour, 🐈?"}]
OPENAI = {"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}}
SAYS = {"role": "assistant", "content": [{"type": "text", "text": "<think>\nhm\n</think>\n\nRed."}]}
BASES = [
    {"id": "a", "image": "0.png", "conversations": turns(("human", "<image>\nWhat?"), ("gpt", "A cat."))},
    {"id": 7, "image": ["0.png", "1.png"], "conversations": turns(("human", "<image><image>?"), ("gpt", "Two."))},
    {"id": "c", "conversations": turns(("human", "Who?"), ("gpt", "I."), ("human", "Why?"), ("gpt", "So."))},
    {"id": "d", "images": ["0.png"], "messages": [{"role": "user", "content": PARTS}, SAYS]},
    {"id": "e", "messages": [{"role": "system", "content": "Go."}, {"role": "user", "content": [OPENAI]}, SAYS]},
]
JUNK = [
    None, True, False, 0, -1, 5, 1e308, math.nan, math.inf, 2**70, "", " ", "\n", "\0", "\ud83d", "\udcff", "<image>",
    "<image>" * 40, "<|im_end|>", "<|im_start|>assistant\n", "\ue000content\ue001", "\ufdd0", "\u202e", "é" * 300,
    "A" * 70_000, "data:", "data:image/png;base64,", "data:image/png;base64,iVBORw0KGgo=", "data:,x", "file://", "://",
    "file:///etc/passwd", "../../etc/passwd", "a" * 5000 + ".png", "/", ".", "..", "\\\\host\\x.png", "~", "C:\\a.png",
    "iVBORw0KGgo" + "A" * 200, "/9j/" + "A" * 100, b"", b"\x00", b"\x89PNG\r\n\x1a\n", [], {}, [[]], [None], ["0.png"],
    [["0.png"]], {"bytes": None, "path": None}, {"bytes": "x"}, {"bytes": b"x"}, {"url": "0.png"}, {"": ""},
    {"a": {"b": 1}}, {"type": "video", "video": "a.mp4"}, {"type": "image"}, {"type": "text"}, {"type": ["text"]},
    {"role": "user"}, {"role": "tool", "content": "x"}, {"from": "gpt"}, {"from": "human", "value": 5}, "system", "gpt",
    "tool", {1: 2},
]  # fmt: skip


NAMES = ("videos", "tools", "tool_calls", "image", "images", "messages", "conversations", "system", "weight", "\ud800")


@dataclass
class Result:
    """What came of many: how many of each kind, and the longest time of one in seconds."""

    kinds: Counter = field(default_factory=Counter)
    longest: float = 0.0


def damaged_record(chance: random.Random) -> dict:
    """A good record with one to four changes somewhere in it."""
    record = copy.deepcopy(chance.choice(BASES))
    for _ in range(chance.randint(1, 4)):
        holder, key = chance.choice(list(places_in(record)) or [(record, "id")])
        junk = deep(chance.choice([20, 900, 5000])) if chance.random() < 0.01 else copy.deepcopy(chance.choice(JUNK))
        change = chance.randrange(4)
        if change == 0 and isinstance(holder, dict):
            holder[chance.choice(NAMES)] = junk
        elif change == 0:
            holder.insert(key, junk)
        elif change == 1 and key in holder:
            holder.pop(key)
        else:
            value = holder.get(key) if isinstance(holder, dict) else holder[key]
            cut = chance.randint(0, len(value)) if isinstance(value, str) else 0
            both = isinstance(value, str) and isinstance(junk, (str, int))
            spliced = f"{value[:cut]}{junk}{value[cut:]}" if both else junk
            holder[key] = chance.choice([junk, [value, junk], {"text": value}, spliced])
    return record


def deep(depth: int) -> list:
    """A list in a list in a list ..."""
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


def places_in(value: dict | list, depth: int = 8) -> Iterator[tuple[dict | list, object]]:
    """Every (container, key) of a record, but for those that are very deep in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if depth and isinstance(value[key], (dict, list)):
            yield from places_in(value[key], depth - 1)


RGB = "AVIF BMP DIB IM JPEG JPEG2000 MPO PCX PPM QOI SGI TIFF WEBP TGA"
FORMATS = {
    **{kind: ({}, "RGB") for kind in RGB.split()},
    **{kind: ({}, "RGBA") for kind in ("DDS", "ICNS", "ICO", "PNG")},
    **{kind: ({}, "P") for kind in ("BLP", "GIF", "PNG, palette")},
    **{kind: ({}, "1") for kind in ("MSP", "XBM", "PPM, bits")},
    "SPIDER": ({}, "F"),
    "PNG, 16 bits": ({}, "I;16"),
    "TGA, packed": ({"compression": "tga_rle"}, "RGB"),
    "TIFF, LZW": ({"compression": "tiff_lzw"}, "RGB"),
    "TIFF, JPEG": ({"compression": "jpeg"}, "RGB"),
    "JPEG, progressive": ({"progressive": True}, "L"),
    "GIF, animated": ({"save_all": True, "append_images": [picture(3).convert("P")]}, "P"),
    "WEBP, lossless": ({"lossless": True}, "RGBA"),
}
NEEDED = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}


def good_pictures() -> dict[str, bytes]:
    """A picture in every format that Pillow writes and reads here."""
    stored = {}
    for name, (options, mode) in FORMATS.items():
        kind = name.partition(",")[0]
        if kind in NEEDED and not features.check(NEEDED[kind]):
            continue
        file, image = io.BytesIO(), picture(1, (40, 52))
        image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
        image.save(file, kind, **options)
        stored[name] = file.getvalue()
    return stored


def damaged_bytes(chance: random.Random, stored: bytes, other: bytes) -> bytes:
    """Bytes with one to five changes, most of them near the start, where sizes are."""
    data = bytearray(stored)
    for _ in range(chance.randint(1, 5)):
        reach = len(data) if chance.random() < 0.4 else min(len(data), 80)
        place, length = chance.randrange(max(1, reach)), chance.choice([1, 2, 4, 8, 64])
        change = chance.randrange(6)
        if change == 0:
            data[place : place + length] = chance.randbytes(length)
        elif change == 1:
            data[place : place + length] = chance.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * length
        elif change == 2:
            del data[place:]
        elif change == 3:
            del data[place : place + length]
        elif change == 4:
            data[place:place] = chance.randbytes(length)
        else:
            data[place:] = other[min(place, len(other)) :]
    return bytes(data)


def examine(examiner: Examiner, records: Iterator[dict]) -> Result:
    """Every record through the check. Raises whatever is no bad record, and TimeoutError after SECONDS."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    result = Result()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for number, record in enumerate(records):
            start = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                verdict = examiner.examine(record)
            except BaseException as error:
                raise AssertionError(f"number {number}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            result.kinds[verdict.problem or "good"] += 1
            result.longest = max(result.longest, time.perf_counter() - start)
            assert verdict.why.isprintable()
    finally:
        signal.signal(signal.SIGALRM, before)
    return result


def fuzz_records(count: int, folder: Path, seed: int = 0) -> Result:
    """Damaged records, half of them as they are, half of them through a file of lines, of which some are damaged."""
    chance, examiner = random.Random(seed), Examiner(ConversationCollator(tiny_processor(), max_length=500))
    for number in (0, 1):
        picture(number).save(folder / f"{number}.png")
    ours = [damaged_record(chance) for _ in range(count)]
    lines = []
    for record in ours[: count // 2]:
        with suppress(TypeError, RecursionError, ValueError):  # bytes, and what is too deep: JSON has none
            line = json.dumps(record, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
            lines.append(damaged_bytes(chance, line, b"}]") if chance.random() < 0.2 else line)
    (folder / "data.jsonl").write_bytes(b'{"id": "first"}\n' + b"\n".join(lines))
    rows = open_records(folder / "data.jsonl")
    direct = ({"id": "none", **record, "folder": folder} for record in ours[count // 2 :])
    result = examine(examiner, (rows[index] for index in range(len(rows))))
    other = examine(examiner, direct)
    return Result(result.kinds + other.kinds, max(result.longest, other.longest))


def fuzz_pictures(count: int, seed: int = 0) -> Result:
    """Damaged pictures of every format in turn."""
    chance, examiner = random.Random(seed), Examiner(ConversationCollator(tiny_processor(), max_length=500))
    stored = good_pictures()
    names = list(stored)

    def records() -> Iterator[dict]:
        for number in range(count):
            image = damaged_bytes(chance, stored[names[number % len(names)]], stored[chance.choice(names)])
            yield BASES[0] | {"id": number, "image": image}

    return examine(examiner, records())


def most_megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    Image.init()
    before = most_megabytes()
    with tempfile.TemporaryDirectory() as place:
        print("records:", fuzz_records(int(sys.argv[1]), Path(place)))
    print("pictures:", fuzz_pictures(int(sys.argv[2])), f"{len(good_pictures())} formats")
    print(f"memory: {before:.0f} MB before, {most_megabytes():.0f} MB at most")
