"""Liger's own kernel, in Triton's interpreter: python interpreted_liger.py START OUT.

Writes OUT/NAME.safetensors for every case of `CASES`, loss and gradients, and OUT/run, two steps of `instruct`.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import IMAGE, collate, pixels, tiny_model, words
from tiny_runs import options_in, small

from ms_resampler.training.collate import IGNORED
from ms_resampler.training.liger import fuse_loss
from ms_resampler.training.recipes import LearningRates, Recipe
from ms_resampler.training.run import train

# name: language model, count of targets over all devices, whether bf16, whether only the projector learns
CASES = {
    "qwen2": ("qwen2", None, False, False),
    "llama, accumulated": ("llama", torch.tensor(40), False, False),
    "head frozen": ("qwen2", None, False, True),
    "bf16": ("qwen2", None, True, False),
}


def batch() -> dict[str, torch.Tensor]:
    """Two records of different lengths; images and padding are no targets."""
    rows = collate([[IMAGE] * 4 + words(9)[0], [IMAGE] * 4 + words(5, seed=1)[0]], side="right")
    labels = rows["input_ids"].masked_fill((rows["attention_mask"] == 0) | (rows["input_ids"] == IMAGE), IGNORED)
    return rows | {"labels": labels, "pixel_values": pixels(2)}


def loss_and_gradients(case: str, fused: bool) -> dict[str, torch.Tensor]:
    """Of a small model on `batch()`, by name."""
    text, items, bf16, aligns = CASES[case]
    model = tiny_model(text=text)
    if aligns:
        model.requires_grad_(False).model.projector.requires_grad_(True)
    if fused:
        fuse_loss(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch(), **({} if items is None else {"num_items_in_batch": items})).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def recipe() -> Recipe:
    """Two steps of `instruct` that change much, one batch of two records after the other."""
    rates = LearningRates(projector=1e-2, llm=1e-2, embeddings=1e-2)
    return small("instruct", steps=2, warmup_ratio=0, rates=rates)


if __name__ == "__main__":
    start, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for name in CASES:
        save_file(loss_and_gradients(name, fused=True), out / f"{name}.safetensors")
    train(dataclasses.replace(recipe(), liger=True), **options_in(start, out / "run", device_batch=2))
