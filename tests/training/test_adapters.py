"""LoRA: what learns, what is saved and comes back, and a merged model that says the same."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import IMAGE, collate, pixels, tiny_model, words
from tiny_runs import make_start, options_in, run_interrupted, small
from transformers import AutoModelForImageTextToText, AutoProcessor

from ms_resampler import MSResamplerForConditionalGeneration
from ms_resampler.training.adapters import add_adapters
from ms_resampler.training.recipes import RECIPES, Adapters, LearningRates
from ms_resampler.training.run import train
from ms_resampler_cli import main as cli

# peft asks a model of transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("adapters"))


def lora():
    """Three steps of an adapter of rank 4, with dropout."""
    rates = LearningRates(projector=1e-2, llm=1e-2)
    return small("instruct_lora", steps=3, adapters=Adapters(rank=4, alpha=8), rates=rates, warmup_ratio=0)


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(lora(), **options_in(start, out))
    return out


def logits(model):
    batch = collate([[IMAGE] * 4 + words(9)[0]])
    with torch.no_grad():
        return model.eval()(**batch, pixel_values=pixels()).logits


@pytest.mark.parametrize("text", ["qwen2", "llama", "phi3", "gemma2"])
def test_adapters_are_in_every_matrix_of_the_language_model_alone(text):
    model = add_adapters(tiny_model(text=text), Adapters(rank=2), LearningRates(projector=1e-3, llm=1e-4))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    layers = model.base_model.model.model.language_model.layers
    matrices = {
        f"base_model.model.model.language_model.layers.{name}"
        for name, module in layers.named_modules()
        if hasattr(module, "base_layer")
    }
    linear = {
        name
        for name, module in tiny_model(text=text).model.language_model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert adapted == matrices
    assert {name.split("layers.")[1] for name in adapted} == linear
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".projector.modules_to_save." in name for name in learning)


def test_adapters_are_in_the_targets_alone():
    adapters = Adapters(rank=2, targets=("q_proj", "down_proj"))
    model = add_adapters(tiny_model(text="qwen2"), adapters, LearningRates(projector=1e-3, llm=1e-4))
    adapted = {name.split("layers.")[1].split(".lora_A")[0] for name in model.state_dict() if "lora_A" in name}
    assert adapted == {f"{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")}


def test_the_command_trains_the_adapters_that_it_names(start, tmp_path, capsys):
    command = ["train", "instruct_lora", "--model", str(start / "start"), "--data", str(start / "data.json")]
    command += ["--images", str(start / "images"), "--steps", "1", "--batch-size", "2", "--workers", "0", "--no-bf16"]
    command += ["--no-activation-checkpointing", "--lora-rank", "3", "--lora-alpha", "6", "--lora-targets", "v_proj"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ranks = {name: min(value.shape) for name, value in state.items() if "lora_" in name}
    assert len(ranks) == 4  # A and B in two layers
    assert all("v_proj" in name and rank == 3 for name, rank in ranks.items())
    recipe = json.loads((tmp_path / "run" / "record.json").read_text())["recipe"]
    assert recipe["adapters"] == vars(Adapters(rank=3, alpha=6)) | {"targets": ["v_proj"]}
    assert not recipe["activation_checkpointing"]
    capsys.readouterr()
    assert cli.main([*command, "query", "--out", str(tmp_path / "other")]) == 2
    told = capsys.readouterr().err
    assert "The language model has no matrix 'query' for adapters; it has down_proj, gate_proj, k_proj" in told


def test_the_projector_is_saved_with_the_adapters_and_comes_back(start, trained):
    before = MSResamplerForConditionalGeneration.from_pretrained(start / "start")
    plain = logits(before)
    back = PeftModel.from_pretrained(before, trained / "adapter")
    projector = dict(back.base_model.model.model.projector.modules_to_save["default"].named_parameters())
    fresh = dict(
        MSResamplerForConditionalGeneration.from_pretrained(start / "start").model.projector.named_parameters()
    )
    assert projector.keys() == fresh.keys()
    assert not torch.equal(projector["output_proj.weight"], fresh["output_proj.weight"])
    assert (logits(back) - plain).abs().max() > 0.1
    assert AutoProcessor.from_pretrained(trained / "adapter").visual_tokens == 4


def test_a_merged_model_says_what_the_adapters_said(start, trained, tmp_path, capsys):
    assert cli.main(["merge", str(trained), str(tmp_path / "whole")]) == 0
    assert f'from_pretrained("{tmp_path / "whole"}"' in capsys.readouterr().out
    adapted = PeftModel.from_pretrained(
        MSResamplerForConditionalGeneration.from_pretrained(start / "start"), trained / "adapter"
    )
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == tiny_model(text="qwen2").state_dict().keys()
    assert AutoProcessor.from_pretrained(tmp_path / "whole").visual_tokens == 4
    record = json.loads((tmp_path / "whole" / "training_record.json").read_text())
    assert record["recipe"]["adapters"]["rank"] == 4


def test_merging_says_what_is_wrong(start, trained, tmp_path, capsys):
    assert cli.main(["merge", str(start / "start"), str(tmp_path / "x")]) == 2
    assert "holds no adapters" in capsys.readouterr().err
    assert cli.main(["merge", str(trained), str(trained)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["merge", str(trained), str(tmp_path / "x"), "--model", str(tmp_path / "gone")]) == 2
    assert "is not there" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_interrupted_run_ends_with_the_same_adapters(start, trained, tmp_path, monkeypatch):
    """Their dropout draws random numbers, so that these must be taken up, too."""
    run_interrupted(lora(), options_in(start, tmp_path), 2, monkeypatch)
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path, trained))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_published_adapters():
    published = RECIPES["instruct_lora"]()
    assert (published.adapters.rank, published.adapters.alpha) == (128, 256)
    assert published.rates == LearningRates(projector=2e-5, llm=2e-4)
    quantized = RECIPES["instruct_qlora"]()
    assert (quantized.four_bits, published.four_bits) == (True, False)
    assert quantized.rates == published.rates
