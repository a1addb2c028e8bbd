"""A small model and a small data set in a folder, and recipes that train on them in a second."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_models import (
    CHAT_TEMPLATE,
    IMAGE,
    loud,
    picture,
    save_tiny,
    text_config,
    tiny_tokenizer,
)
from transformers import AutoConfig, CLIPImageProcessorPil

from ms_resampler import MSResamplerConfig, MSResamplerForConditionalGeneration, MSResamplerProcessor
from ms_resampler.training.recipes import RECIPES, Recipe
from ms_resampler.training.run import train
from ms_resampler.training.trainer import CheckedTrainer


def make_start(folder: Path, records: int = 24, **text_changes) -> Path:
    """folder/start (CLIP and Qwen2, with random weights), folder/data.json and folder/images."""
    torch.manual_seed(0)
    save_tiny(folder / "start", text="qwen2", text_changes={"max_position_embeddings": 512, **text_changes})
    (folder / "images").mkdir()
    rows = [make_row(number, folder / "images") for number in range(records)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def save_efficientnet(folder: Path, dropout: float = 0.5) -> Path:
    """A model whose tower has batch norms and dropout, and whose language model has dropout."""
    tower = AutoConfig.for_model(
        "efficientnet",
        image_size=64,
        width_coefficient=0.25,
        depth_coefficient=0.1,
        hidden_dim=320,
        depth_divisor=4,
        drop_connect_rate=dropout,
    )
    config = MSResamplerConfig(
        vision_config=tower,
        text_config=text_config("qwen2", max_position_embeddings=512, attention_dropout=dropout),
        projector_config={"hidden_size": 16, "num_attention_heads": 4, "visual_tokens": 4},
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    loud(MSResamplerForConditionalGeneration(config)).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    MSResamplerProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=side),
        tiny_tokenizer(),
        patch_size=config.patch_size,
        visual_tokens=4,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_row(number: int, images: Path) -> dict:
    """A record of LLaVA's format; every fourth has no picture."""
    said = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": f"It is {number * 7}."}]
    if number % 4 == 3:
        return {"id": f"r{number}", "conversations": said}
    picture(number).save(images / f"{number}.png")
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": f"r{number}", "image": f"{number}.png", "conversations": said}


def make_shards(folder: Path, out: Path, shards: int) -> Path:
    """The records of `make_start` as tables: JSON lines, the images beside them in `folder`."""
    out.mkdir()
    rows = json.loads((folder / "data.json").read_text())
    for number in range(shards):
        lines = [json.dumps({"image": None} | row) for row in rows[number::shards]]
        (out / f"train-{number:05d}-of-{shards:05d}.jsonl").write_text("\n".join(lines))
    return out


def small(name: str, **changes) -> Recipe:
    """A recipe of a few small steps in float32, on chats: plain captions take no text-only records."""
    sizes = {
        "batch_size": 4,
        "steps": 4,
        "bf16": False,
        "workers": 0,
        "save_steps": 2,
        "logging_steps": 1,
        "max_length": 512,
        "text": "chat",
    }
    return dataclasses.replace(RECIPES[name](), **sizes | changes)


def options_in(folder: Path, out: Path, **changes) -> dict:
    """The arguments of `train` for what `make_start` has made."""
    places = {
        "model": str(folder / "start"),
        "data": str(folder / "data.json"),
        "images": folder / "images",
        "out": out,
    }
    return places | changes


def run_interrupted(recipe: Recipe, options: dict, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped after `step` steps, and resumed to its end."""
    honest = CheckedTrainer.training_step

    def training_step(self, model, inputs, *rest):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return honest(self, model, inputs, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckedTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, **options)
    train(recipe, **options)


def losses_of(out: Path) -> list[float]:
    """The logged losses of a run."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
