"""The processor's images a second against LlavaProcessor's, with one image processor and one tokenizer for both.

    python -m research.benchmarks.preprocessing

Pictures of three sizes, as PIL images, as JPEG files and as arrays, one or eight a call, with a chat-length prompt for
each; medians of interleaved repeats. Both give tensors for CLIP-L/14-336: 576 image tokens a picture in LLaVA, 144 in
ours.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from ms_resampler import MSResamplerProcessor
from ms_resampler.folders import write_whole

from ..timing import interleaved, machine, spread

SIZES = ((336, 336), (640, 480), (1920, 1080))
KINDS = ("PIL", "JPEG", "array")
QUESTION = "<image>\nWhat is in the lower left of this picture, and what is above it? Answer in one sentence."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<image>"]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", extra_special_tokens=["<image>"])


def make_processors() -> dict[str, Any]:
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return {
        "LLaVA": LlavaProcessor(images, make_tokenizer(), patch_size=14, **strategy),
        "ours": MSResamplerProcessor(images, make_tokenizer(), patch_size=14, visual_tokens=144),
    }


def make_pictures(kind: str, size: tuple[int, int], count: int, folder: Path) -> list:
    """Smooth noise of (width, height) pixels, as PIL images, paths of JPEG files, or arrays."""
    rng, pictures = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = coarse.resize(size, Image.Resampling.BICUBIC)
        path = folder / f"{size[0]}x{size[1]}_{number}.jpg"
        picture.save(path, quality=90)
        pictures.append({"PIL": picture, "JPEG": str(path), "array": np.asarray(picture)}[kind])
    return pictures


def measure(kind: str, size: tuple[int, int], count: int, repeats: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds an image of each processor."""
    pictures = make_pictures(kind, size, count, folder)
    calls = {
        name: partial(processor, images=pictures, text=[QUESTION] * count, return_tensors="pt")
        for name, processor in make_processors().items()
    }
    return {name: [ms / count for ms in times] for name, times in interleaved(calls, repeats).items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    print("| pictures | pixels | a call | LLaVA, images/s | ours, images/s | ours, ms an image | spread | ms / LLaVA |")
    print("|---|---|---|---|---|---|---|---|")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for size in SIZES:
                for count in (1, 8):
                    times = measure(kind, size, count, arguments.repeats, Path(folder))
                    llava, ours = (statistics.median(times[name]) for name in ("LLaVA", "ours"))
                    print(
                        f"| {kind} | {size[0]} x {size[1]} | {count} | {1000 / llava:.0f} | {1000 / ours:.0f} "
                        f"| {ours:.2f} | {spread(times['ours'], 2)} | {ours / llava:.2f} |",
                        flush=True,
                    )
                    records.append({"pictures": kind, "size": size, "count": count, "milliseconds_an_image": times})
    if arguments.json:
        write_whole(arguments.json, json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
