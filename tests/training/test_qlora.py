"""QLoRA, run on the CPU: what is in four bits, what is learned, and that a merged model is the one that was trained."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import IMAGE, collate, pixels, tiny_model, words
from tiny_runs import losses_of, make_start, options_in, run_interrupted, small
from transformers import AutoModelForImageTextToText, AutoProcessor

from ms_resampler import MSResamplerForConditionalGeneration
from ms_resampler.training.adapters import four_bit_config
from ms_resampler.training.recipes import Adapters, LearningRates
from ms_resampler.training.run import load_model, train
from ms_resampler_cli import main as cli

# peft asks a model of transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RATES = LearningRates(projector=1e-2, llm=1e-2)
# Rows of whole blocks, as language models have them: with AVX512 bitsandbytes reads narrower ones wrongly.
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128}


def qlora(**changes):
    """Four steps of an adapter of rank 4, with dropout."""
    adapters = Adapters(rank=4, alpha=8, four_bits=True)
    return dataclasses.replace(small("instruct_qlora", adapters=adapters, warmup_ratio=0), rates=RATES, **changes)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("qlora"), **WHOLE_BLOCKS)


@pytest.fixture
def quantized(start):
    return MSResamplerForConditionalGeneration.from_pretrained(
        start / "start", dtype="auto", quantization_config=four_bit_config(bf16=False)
    )


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(qlora(), **options_in(start, out))
    return out


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "whole"
    assert cli.main(["merge", str(trained), str(out)]) == 0
    return out


def nf4(weight):
    """What a matrix becomes in NF4, after the paper: blocks of 64, each entry the nearest of 16 quantiles of a normal.

    The scales are whole here, where double quantization rounds them: a hundredth of a scale or two away.
    """
    tail = 0.9677083
    positive, negative = (torch.special.ndtri(torch.linspace(tail, 0.5, steps))[:-1] for steps in (9, 8))
    levels = torch.cat([positive, torch.zeros(1), -negative]).sort().values
    levels /= levels.abs().max()
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scales).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * scales).reshape(weight.shape), scales.max()


def matrices_of_layers(names):
    """The weights of linear layers in the language model's decoder layers."""
    return {name for name in names if "language_model.layers" in name and name.endswith("_proj.weight")}


def test_the_language_models_matrices_are_in_four_bits_and_nothing_else(start):
    model, dtype = load_model(qlora(bf16=True), str(start / "start"))
    packed = {name for name, parameter in model.named_parameters() if type(parameter).__name__ == "Params4bit"}
    plain = tiny_model(text="qwen2", text_changes=WHOLE_BLOCKS).state_dict()
    unpacked = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in packed}
    assert unpacked == matrices_of_layers(plain)
    assert dtype == torch.float32
    others = {name: parameter for name, parameter in model.named_parameters() if name not in packed}
    learning = {name for name, parameter in others.items() if parameter.requires_grad}
    assert all(("lora_" in name) != (".projector.modules_to_save." in name) for name in learning)
    assert {others[name].dtype for name in learning} == {torch.float32}
    assert {parameter.dtype for name, parameter in others.items() if name not in learning} == {torch.bfloat16}


def test_what_is_learned_is_saved_and_counted(start, trained):
    saved = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in saved} == {"projector", "language_model"}
    assert all("lora_" in name or ".projector." in name for name in saved)
    counts = json.loads((trained / "record.json").read_text())["parameters"]
    llm = tiny_model(text="qwen2", text_changes=WHOLE_BLOCKS).model.language_model
    embeddings = llm.embed_tokens.weight.numel()
    assert counts["llm"]["frozen"] == sum(parameter.numel() for parameter in llm.parameters()) - embeddings
    losses = losses_of(trained)
    assert losses[-1] < losses[0] - 0.5


def test_a_merged_model_is_the_dequantized_one_with_its_adapters(start, trained, merged):
    before = load_file(start / "start" / "model.safetensors")
    saved = load_file(trained / "adapter" / "adapter_model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert after.keys() == before.keys()
    in_layers = matrices_of_layers(before)
    for name in after:
        peft_name = f"base_model.model.{name}"
        if name in in_layers:
            a, b = (saved[peft_name.replace("weight", f"lora_{part}.weight")] for part in "AB")
            base, scale = nf4(before[name])
            quantized = after[name] - 8 / 4 * b @ a
            other_level = (quantized - base).abs() > 0.02 * scale  # of an entry that is halfway between two
            assert other_level.float().mean() < 1e-3, name
            distances = ((level - before[name]).abs()[other_level] for level in (quantized, base))
            torch.testing.assert_close(*distances, rtol=0.05, atol=0)
            assert (base - before[name]).abs().max() > 0.05 * scale, name  # it is not the weights of the start
        else:
            torch.testing.assert_close(after[name], saved.get(peft_name, before[name]), rtol=0, atol=0)


def test_a_merged_model_says_what_was_trained(quantized, trained, merged):
    batch = collate([[IMAGE] * 4 + words(9)[0]])
    adapted = PeftModel.from_pretrained(quantized, trained / "adapter")
    whole = AutoModelForImageTextToText.from_pretrained(merged)
    assert not hasattr(whole.config, "quantization_config")
    adapted.enable_input_require_grads()  # or bitsandbytes multiplies in bfloat16, on processors that can
    said, ours = (model.eval()(**batch, pixel_values=pixels()).logits for model in (adapted, whole))
    torch.testing.assert_close(ours, said, rtol=1e-4, atol=1e-4)
    assert AutoProcessor.from_pretrained(merged).visual_tokens == 4


@pytest.mark.slow
def test_it_learns_as_lora_does_on_the_dequantized_weights(start, quantized, tmp_path):
    """The same recipe, but for the four bits, on what these stand for; without dropout, and steps as they come."""
    quantized.dequantize().save_pretrained(tmp_path / "start")
    AutoProcessor.from_pretrained(start / "start").save_pretrained(tmp_path / "start")
    adapters = Adapters(rank=4, alpha=8, dropout=0.0)
    plain = dataclasses.replace(qlora(), adapters=adapters)
    train(plain, **options_in(start, tmp_path / "lora", model=str(tmp_path / "start")))
    train(
        dataclasses.replace(plain, adapters=dataclasses.replace(adapters, four_bits=True)),
        **options_in(start, tmp_path / "qlora"),
    )
    train(plain, **options_in(start, tmp_path / "unquantized"))
    ours, theirs, whole = (torch.tensor(losses_of(tmp_path / run)) for run in ("qlora", "lora", "unquantized"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    assert (ours[0] - whole[0]).abs() > 10 * (ours - theirs).abs().max()


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_adapters(start, trained, tmp_path, monkeypatch):
    run_interrupted(qlora(), options_in(start, tmp_path), 3, monkeypatch)
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path, trained))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_checkpoint_in_bfloat16_trains_in_bf16_and_is_merged_in_it(start, tmp_path):
    MSResamplerForConditionalGeneration.from_pretrained(start / "start", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "start"
    )
    AutoProcessor.from_pretrained(start / "start").save_pretrained(tmp_path / "start")
    train(qlora(bf16=True), **options_in(start, tmp_path / "run", model=str(tmp_path / "start")))
    assert cli.main(["merge", str(tmp_path / "run"), str(tmp_path / "whole")]) == 0
    assert {value.dtype for value in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.bfloat16}
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.5


def test_without_bitsandbytes_there_is_a_sentence(start, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    assert cli.main(["merge", str(trained), str(tmp_path / "whole")]) == 2
    assert "(QLoRA) need the package bitsandbytes: pip install --upgrade bitsandbytes." in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()
