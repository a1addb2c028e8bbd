"""LoRA: what learns, what is saved and comes back, and a merged model that says the same."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import IMAGE, collate, pixels, tiny_model, words
from tiny_runs import options_in, run_interrupted, small
from transformers import AutoModelForImageTextToText, AutoProcessor

from ms_resampler import MSResamplerForConditionalGeneration
from ms_resampler.training.adapters import add_adapters
from ms_resampler.training.recipes import Adapters, LearningRates
from ms_resampler.training.run import train
from ms_resampler_cli import main as cli

# peft asks a model of transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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


FAMILIES = {
    "qwen2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "phi3": "qkv_proj o_proj gate_up_proj down_proj",
    "gemma2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "phi": "q_proj k_proj v_proj dense fc1 fc2",
    "gpt2": "c_attn attn.c_proj c_fc mlp.c_proj",
    "gpt_neox": "query_key_value attention.dense dense_h_to_4h dense_4h_to_h",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "falcon_h1": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
}


@pytest.mark.parametrize("text", FAMILIES)
def test_adapters_are_in_every_matrix_of_the_language_models_layers_alone(text):
    model = add_adapters(tiny_model(text=text), Adapters(rank=2), LearningRates(projector=1e-3, llm=1e-4))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * len(FAMILIES[text].split())  # in two layers
    for name in FAMILIES[text].split():
        for layer in (0, 1):
            assert [place for place in adapted if f".{layer}." in place and place.endswith(f".{name}")], name
    assert all(place.startswith("base_model.model.model.language_model.") for place in adapted)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".projector.modules_to_save." in name for name in learning)


def test_the_options_of_the_command_reach_the_adapters_and_the_record(start, tmp_path):
    command = ["train", "instruct_lora", "--model", str(start / "start"), "--data", str(start / "data.json")]
    command += ["--images", str(start / "images"), "--out", str(tmp_path), "--steps", "1", "--batch-size", "2"]
    command += ["--workers", "0", "--no-bf16", "--max-length", "512", "--no-activation-checkpointing"]
    chosen = ["--lora-rank", "3", "--lora-alpha", "5", "--lora-dropout", "0.2", "--lora-targets", "q_proj", "down_proj"]
    assert cli.main([*command, *chosen]) == 0
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    adapters = {name: tensor for name, tensor in weights.items() if "lora_A" in name}
    assert {name.split(".")[-3] for name in adapters} == {"q_proj", "down_proj"}
    assert {len(tensor) for tensor in adapters.values()} == {3}
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["lora_alpha"], settings["lora_dropout"]) == (5, 0.2)
    recipe = json.loads((tmp_path / "adapter" / "training_record.json").read_text())["recipe"]
    assert not recipe["activation_checkpointing"]
    assert recipe["adapters"] == {
        "rank": 3, "alpha": 5, "dropout": 0.2, "targets": ["q_proj", "down_proj"], "four_bits": False,
    }  # fmt: skip
    assert cli.main([*command, *chosen]) == 0  # it is the same run


def test_an_unknown_target_is_refused_and_the_known_ones_are_named(start, tmp_path, capsys):
    command = ["train", "instruct_lora", "--model", str(start / "start"), "--data", str(start / "data.json")]
    command += ["--out", str(tmp_path / "run"), "--lora-targets", "q_proj", "embed_tokens"]
    assert cli.main(command) == 2
    known = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith(f"`qwen2` has no matrix embed_tokens in its layers: the LoRA targets are {known}.")
    assert not (tmp_path / "run").exists()


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
