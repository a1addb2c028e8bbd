"""Every projector side by side, at its published sizes: 576 patches of 1024 channels -> 144 tokens -> width 4096.

    python benchmarks/projectors.py                  float32, batch 1
    python benchmarks/projectors.py --dtype bfloat16 --batch 8

Prints one markdown table: parameters, multiply-accumulates of one image, and median milliseconds over interleaved
repeats (and their spread), relative to our single-scope resampler in the same run.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ms_resampler import MSResamplerConfig
from ms_resampler.evaluation.timing import count_macs, interleaved, machine
from ms_resampler.projectors_ms_resampler import build_projector, init_projector_weights
from ms_resampler.resampler_ms_resampler import init_resampler_weights

PATCHES, TOKENS, TEXT_WIDTH = (24, 24), (12, 12), 4096
# Sizes of the publications: projector fields, and the tower's layers where there are several.
PUBLISHED: dict[str, dict[str, Any]] = {
    "resampler": {},
    "ms_resampler": {},
    "mlp": {"visual_tokens": list(PATCHES)},
    "avg_pool": {},
    "pixel_shuffle": {},
    "c_abstractor": {"num_hidden_layers": 3},
    "ldp_v2": {},
    "token_packer": {"num_attention_heads": 8, "layers": [12, 16, 22, 23]},
    "mqt": {"query_grid": [16, 16]},
    "saep": {"layers": [9, 13, 17, 20, 22]},
    "qwen_resampler": {"hidden_size": 4096, "num_attention_heads": 32},
    "perceiver": {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 6},
    "idefics2_perceiver": {
        "hidden_size": 1536,
        "num_attention_heads": 16,
        "num_hidden_layers": 3,
        "intermediate_size": 14336,
    },
    "q_former": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
    },
}


def published_config(name: str) -> MSResamplerConfig:
    """CLIP-L/14-336 and a language model of width 4096, with a projector at its published sizes."""
    fields = dict(PUBLISHED[name])
    layers = fields.pop("layers", -2)
    return MSResamplerConfig(
        text_config={"model_type": "llama", "hidden_size": TEXT_WIDTH, "num_attention_heads": 32},
        projector_config={"projector_type": name, **fields},
        vision_feature_layer=layers,
    )


def forward(projector: nn.Module, name: str, x_BNC: torch.Tensor) -> torch.Tensor:
    """The visual tokens (B, M, T)."""
    y = projector(x_BNC, PATCHES, PATCHES if name == "mlp" else TOKENS)
    return y[0] if isinstance(y, tuple) else y


def cost(name: str) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image."""
    config = published_config(name)
    projector = build_projector(config)
    x_BNC = torch.randn(1, PATCHES[0] * PATCHES[1], config.feature_width)
    parameters = sum(weight.numel() for weight in projector.parameters())
    return parameters, count_macs(lambda: forward(projector, name, x_BNC))


def make_run(name: str, batch: int, dtype: torch.dtype, backward: bool) -> Callable[[], object]:
    """A projector's run on fixed random features: forward alone, or with the gradients of all parameters."""
    config = published_config(name)
    torch.manual_seed(0)
    projector = build_projector(config).apply(init_resampler_weights).apply(init_projector_weights).to(dtype)
    x_BNC = torch.randn(batch, PATCHES[0] * PATCHES[1], config.feature_width, dtype=dtype)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y_BMT = forward(projector.train(backward), name, x_BNC)
        if backward:
            y_BMT.sum().backward()

    return run


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backward", action="store_true", help="with the gradients of all parameters")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    runs = {name: make_run(name, arguments.batch, dtype, arguments.backward) for name in PUBLISHED}
    times = interleaved(runs, arguments.repeats)
    base = statistics.median(times["resampler"])
    what = "forward + backward" if arguments.backward else "forward"
    print(f"{machine()}; {arguments.dtype}, batch {arguments.batch}, {what}\n")
    print("| projector | parameters (M) | GMAC | median ms | spread | x resampler |\n|---|---|---|---|---|---|")
    for name, spent in times.items():
        parameters, macs = cost(name)
        median = statistics.median(spent)
        print(
            f"| {name} | {parameters / 1e6:.2f} | {macs / 1e9:.2f} | {median:.1f} | {min(spent):.1f} to "
            f"{max(spent):.1f} | {median / base:.2f} |"
        )


if __name__ == "__main__":
    main()
