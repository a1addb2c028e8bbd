"""Peak memory and time of `ms-resampler convert` on a checkpoint of LLaVA-1.5-7B's shapes in bfloat16.

    python -m research.benchmarks.conversion_memory           needs 28 GB of disk in the temporary folder (TMPDIR)

The weights are random, in files of 5 GB as on the Hub; the conversion runs in a separate process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..timing import machine

# Linux's VmHWM is the peak memory of a process since it started its program.
CONVERSION = """
import sys
from ms_resampler_cli.main import main
assert main(["convert", *sys.argv[1:], "--projector", "ms_resampler"]) == 0
print(*(line.strip() for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
FILE_BYTES = 5_000_000_000
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes the checkpoint; returns its weights' bytes."""
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=layers, max_position_embeddings=4096)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=32000, dtype="bfloat16"
    )
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    noise, size = torch.randn(2**20).bfloat16() / 50, 0
    files: list[dict[str, torch.Size]] = [{}]
    for name, value in state.items():
        if size + 2 * value.numel() > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = value.shape
        size += 2 * value.numel()
    where: dict[str, str] = {}
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {
            key: noise.repeat(shape.numel() // 2**20 + 1)[: shape.numel()].view(shape) for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return sum(2 * value.numel() for value in state.values())


def make_processor() -> LlavaProcessor:
    """A processor whose tokenizer has the image token where LLaVA-1.5 has it."""
    words = {f"word{number}": number for number in range(32064)}
    words.pop("word32000")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words | {"<image>": 32000}, unk_token="word0")),
        eos_token="word2",
        pad_token="word1",
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default")


def main() -> None:
    """Makes the checkpoint, converts it, and prints one row for each kind of projector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the language model (default: 32, as in 7B)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "llava")
        source.mkdir()
        size = make_checkpoint(source, arguments.layers)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", CONVERSION, source, Path(place, "out")], check=True)
        print(f"{size / 1e9:.1f} GB of weights in {time.perf_counter() - start:.0f} s; {machine()}")


if __name__ == "__main__":
    main()
