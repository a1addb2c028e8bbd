"""The plan of a run: what it tells, held against a step that is run and against sizes counted by hand."""

import dataclasses
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig, Qwen2Config, Siglip2VisionConfig

from ms_resampler import MSResamplerConfig
from ms_resampler.training import estimate
from ms_resampler.training.estimate import Plan, duration
from ms_resampler.training.memory import BatchShape, Sizes, device_bytes, step_sizes
from ms_resampler.training.recipes import RECIPES
from ms_resampler.training.step_time import measure_step
from ms_resampler_cli import main as cli

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def middling_config(tower="clip", **projector):
    """Large enough for tensors to outweigh what a step takes besides: six million parameters."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    towers = {
        "clip": CLIPVisionConfig(**sizes, image_size=112, patch_size=14),
        "siglip2": Siglip2VisionConfig(**sizes, num_patches=64, patch_size=14),
    }
    return MSResamplerConfig(
        vision_config=towers[tower],
        text_config=Qwen2Config(
            vocab_size=4000,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        ),
        projector_config={
            "hidden_size": 128,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "visual_tokens": 16,
            "query_grid": [4, 4],
            **projector,
        },
        image_token_id=3999,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing", "bf16", "tower"),
    [
        ("align", True, False, "clip"),
        ("align", True, False, "siglip2"),
        ("instruct", False, True, "clip"),
        ("instruct_lora", True, True, "clip"),
        ("instruct_qlora", True, False, "clip"),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(name, checkpointing, bf16, tower):
    recipe = dataclasses.replace(RECIPES[name](), activation_checkpointing=checkpointing, bf16=bf16, max_length=96)
    if recipe.adapters:
        recipe = dataclasses.replace(recipe, adapters=dataclasses.replace(recipe.adapters, rank=16))
    config, shape = middling_config(tower), BatchShape(records=4, length=96, image_size=112)
    estimate = sum(device_bytes(step_sizes(config, recipe, shape, "ddp"), recipe, "ddp", devices=1).values())
    assert measure_step(config, recipe, shape, accumulation=2).peak_bytes == pytest.approx(estimate, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ms_resampler", "mlp"])
def test_the_estimate_counts_the_tiles_of_a_picture(kind):
    recipe = dataclasses.replace(RECIPES["instruct"](), activation_checkpointing=False, bf16=False, max_length=700)
    config = middling_config(projector_type=kind, visual_tokens=64 if kind == "mlp" else 16)
    shape = BatchShape(2, 700, 112, tiles=(2, 3))
    estimate = sum(device_bytes(step_sizes(config, recipe, shape, "ddp"), recipe, "ddp", devices=1).values())
    assert measure_step(config, recipe, shape, accumulation=1).peak_bytes == pytest.approx(estimate, rel=0.1)
    assert shape.visual_tokens(config) == (64 + 6 * 64 if kind == "mlp" else 16)


def test_parameters_are_counted_as_they_are():
    sizes = step_sizes(tiny_config(text="qwen2"), RECIPES["instruct"](), BatchShape(2, 20, 24), "ddp")
    model = tiny_model(text="qwen2")
    tower = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    assert sizes.frozen == sizes.parts["tower"]["frozen"] == tower
    assert sizes.trainable == sum(parameter.numel() for parameter in model.parameters()) - tower
    layer = sum(parameter.numel() for parameter in model.model.language_model.layers[0].parameters())
    assert sizes.layer == layer


def test_what_sharding_leaves_on_a_device():
    parts = {"projector": {"trainable": 1000, "frozen": 0}, "llm": {"trainable": 0, "frozen": 4000}}
    sizes, recipe = Sizes(parts, activations=7, layer=100, rest=10), RECIPES["align"]()
    assert device_bytes(sizes, recipe, "ddp", 1) == {
        "weights": 12000, "gradients": 4000, "optimiser": 8000, "gathered": 0, "activations": 7,
    }  # fmt: skip
    assert device_bytes(sizes, recipe, "ddp", 4)["gathered"] == 4000
    assert device_bytes(sizes, RECIPES["instruct_qlora"](), "ddp", 1)["weights"] == 4000 + 4000 * 4.127 / 8
    for launcher in ("fsdp2", "zero3"):
        assert device_bytes(sizes, recipe, launcher, 4) == {
            "weights": 3000, "gradients": 1000, "optimiser": 2000, "gathered": 2 * 210 + 400, "activations": 7,
        }  # fmt: skip
    assert device_bytes(sizes, recipe, "zero2", 4) == {
        "weights": 10000, "gradients": 500, "optimiser": 3000, "gathered": 0, "activations": 7,
    }  # fmt: skip


def test_what_sharding_leaves_of_layers_in_four_bits():
    parts = {"projector": {"trainable": 1000, "frozen": 0}, "llm": {"trainable": 0, "frozen": 8000}}
    parts["embeddings"] = {"trainable": 0, "frozen": 500}
    sizes, recipe, nf4 = Sizes(parts, activations=7, layer=800, rest=10), RECIPES["instruct_qlora"](), 4.127 / 8
    one = device_bytes(sizes, recipe, "ddp", 1)
    assert one["weights"] == pytest.approx(4 * 1000 + 2 * 500 + nf4 * 8000)
    for launcher in ("fsdp2", "zero3"):
        shared = device_bytes(sizes, recipe, launcher, 4)
        assert shared["weights"] == pytest.approx(one["weights"] / 4)
        assert shared["gathered"] == pytest.approx(2 * 10 + nf4 * 2 * 800)  # no gradients of layers
    assert device_bytes(sizes, recipe, "zero2", 4)["weights"] == pytest.approx(2 * (1000 + 500) + nf4 * 8000)


@pytest.mark.parametrize("name", ["instruct", "align"])  # of a language model that learns, and of a frozen one
def test_checkpointing_and_the_fused_loss_save_activations(name):
    shape, config = BatchShape(4, 64, 24), tiny_config(text="qwen2", text_changes={"num_hidden_layers": 8})
    changes = {"all": {"activation_checkpointing": False}, "checkpointed": {}, "fused": {"liger": True}}
    recipes = {kind: dataclasses.replace(RECIPES[name](), **changed) for kind, changed in changes.items()}
    kept = {kind: step_sizes(config, recipe, shape, "ddp").activations for kind, recipe in recipes.items()}
    logits = 4 * 64 * config.text_config.vocab_size * 4
    assert kept["all"] > kept["checkpointed"] + logits
    assert kept["checkpointed"] >= kept["fused"] + logits


def test_the_fused_loss_holds_the_gradient_of_a_head_that_learns():
    """In float32; the weights, and so the other gradients, have 16 bits here."""
    config, shape = middling_config(), BatchShape(1, 20, 112)
    learning = dataclasses.replace(RECIPES["instruct"](), liger=True)
    frozen = dataclasses.replace(learning, rates=dataclasses.replace(learning.rates, embeddings=None))
    ahead, none = (step_sizes(config, recipe, shape, "fsdp2").activations for recipe in (learning, frozen))
    gradient = 4 * config.text_config.vocab_size * config.text_config.hidden_size
    assert none < gradient / 2 < gradient < ahead


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """The configurations of CLIP-L/14-336 and of a language model of 7 billion parameters, without weights."""
    folder = tmp_path_factory.mktemp("components")
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    CLIPConfig(vision_config=tower | {"image_size": 336, "patch_size": 14}).save_pretrained(folder / "clip")
    LlamaConfig().save_pretrained(folder / "llama")
    return ["--vision", str(folder / "clip"), "--llm", str(folder / "llama")]


@pytest.mark.slow
def test_a_plan_for_seven_billion_parameters_needs_no_weights(components, capsys):
    assert cli.main(["plan", "instruct_lora", *components, "--gpus", "1", "--device-batch-size", "4", "--liger"]) == 0
    told = capsys.readouterr().out
    assert float(re.search(r"^llm +([\d,.]+) M", told, re.M)[1].replace(",", "")) == pytest.approx(6476 + 320, abs=5)
    assert re.search(r"^weights +15\.\d\d$", told, re.M)
    assert "fits into 80 GB" in told
    assert "144 visual tokens of 576 patches: 75% fewer" in told


def test_a_plan_counts_the_patches_of_tiles(components, capsys):
    assert cli.main(["plan", "align", *components, "--gpus", "1", "--device-batch-size", "4", "--tiles", "6"]) == 0
    assert "144 visual tokens of 3456 patches: 96% fewer" in capsys.readouterr().out


@pytest.mark.parametrize(("memory", "verdict"), [(80, "fits into 80 GB, 59.0 to spare"), (18, "does not fit into 18")])
def test_what_does_not_fit_is_said(memory, verdict):
    recipe, sizes = RECIPES["align"](), Sizes({}, activations=0, layer=0, rest=0)
    kinds, shape = {"weights": 14e9, "activations": 6e9}, BatchShape(4, 2048, 336)
    told = str(Plan(recipe, shape, sizes, kinds, memory=memory * 1e9, gpus=1, visual_tokens=144, patches=576))
    assert verdict in told
    assert "4 records of 2048 tokens at a time" in told
    assert re.search(r"^total +20\.00", told, re.M)


def test_a_plan_is_for_this_machine_unless_others_are_named(monkeypatch, tmp_path, capsys):
    """Its memory is read as `free` reads it."""
    tiny_config(text="qwen2").save_pretrained(tmp_path)
    command = ["plan", "align", "--model", str(tmp_path), "--length", "64"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    found = re.search(r"fits into ([\d.]+) GB of this machine, which has (\d+) cores and no GPU, ", told)
    size = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024 / 1e9
    assert 0 < float(found[1]) <= size * 1.01
    assert int(found[2]) == multiprocessing.cpu_count()
    assert "CUDA" not in told
    assert cli.main([*command, "--memory", "24"]) == 0
    assert re.search(r"fits into 24 GB, 2[23]\.\d to spare \(CUDA", capsys.readouterr().out)
    assert cli.main([*command, "--gpus", "2"]) == 0
    assert "fits into 80 GB, " in capsys.readouterr().out
    monkeypatch.setattr(estimate, "memory_here", lambda: 3e6)
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "does not fit into 0.003 GB of this machine, which has" in told
    assert "cores and no GPU: lower --device-batch-size, or plan for --gpus" in told
    assert "--liger" not in told


@pytest.mark.parametrize(
    ("seconds", "words"), [(5.4, "5 seconds"), (99, "99 seconds"), (600, "10 minutes"), (9000, "2.5 hours")]
)
def test_durations_are_told_in_units_that_fit(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Name a --model, or a --vision tower and an --llm."),
        (["--length", "100"], "100 tokens are too few for an image of 144 and an answer."),
        (["--length", "5000"], "The recipe takes records of 2048 tokens at most"),
        (["--gpus", "7"], "A batch of 128 cannot be shared among 7 devices"),
        (["--gpus", "0"], "The plan's gpus must be above 0, got 0."),
        (["--memory", "-1"], "The plan's memory must be above 0, got -1"),
        (["--memory", "nan"], "The plan's memory must be above 0, got nan"),
        (["--length", "0"], "The plan's length must be above 0, got 0."),
        (["--records", "-5"], "The plan's records must be above 0, got -5."),
        (["--device-batch-size", "0"], "which 0 at a time do not add up to"),
    ],
)
def test_a_plan_says_what_is_wrong(arguments, sentence, components, capsys):
    assert cli.main(["plan", "instruct", *(components if arguments else []), *arguments]) == 2
    assert sentence in capsys.readouterr().err
