"""`merge`: adds adapters to the weights of the model that they were trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from ..folders import model_or_embedded, whole_folder
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from .adapters import four_bit_config


def merge(run: str | Path, out: str | Path, model: str | None = None) -> None:
    """Writes the model that a run with adapters trained, with merged weights, to the new folder `out`.

    `run` is the run's folder, or the folder of its adapters; `model` is the model that the run started from, if that
    has moved. Raises ValueError if there are no adapters, if that model is not there, or if `out` exists.
    """
    from peft import PeftModel

    adapter, out = adapter_folder(Path(run)), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already; give a new folder.")
    start = model or json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    try:
        start = model_or_embedded(start)
    except ValueError as error:
        raise ValueError("The model that these adapters were trained on is not there: name it, --model.") from error
    whole = as_trained(start, json.loads((adapter / "training_record.json").read_text())["recipe"])
    dtype = whole.dtype
    # In float32: bfloat16 would lose a third of the adapters' digits.
    merged = PeftModel.from_pretrained(whole.float(), str(adapter)).merge_and_unload().to(dtype)
    with whole_folder(out) as folder:
        merged.save_pretrained(folder)
        AutoProcessor.from_pretrained(adapter).save_pretrained(folder)
        shutil.copyfile(adapter / "training_record.json", folder / "training_record.json")


def adapter_folder(run: Path) -> Path:
    """The folder of a run's adapters. Raises ValueError if there are none."""
    for folder in (run / "adapter", run):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ValueError(f"{run} holds no adapters: name the folder of a finished run of a recipe such as instruct_lora.")


def as_trained(start: str, recipe: dict[str, Any]) -> Any:
    """The model under the adapters; for QLoRA its dequantised weights, on which the adapters were trained."""
    four_bits = recipe["adapters"]["four_bits"]
    model = MSResamplerForConditionalGeneration.from_pretrained(
        start,
        dtype="auto",
        quantization_config=four_bit_config(recipe["bf16"]) if four_bits else None,
        # Otherwise transformers puts 4-bit weights on the first GPU, where the float32 weights may not fit.
        device_map="cpu" if four_bits else None,
    )
    return model.dequantize() if four_bits else model
