"""`ms-resampler train`: what it prints, what it changes, what it refuses; and the published numbers of the recipes."""

import dataclasses
import importlib.util
import json

import pytest
from components import save_llm, save_tower
from tiny_runs import make_start

from ms_resampler.training.recipes import RECIPES, Adapters, LearningRates, Recipe
from ms_resampler_cli import main as cli


def shown(capsys, *arguments):
    assert cli.main(["train", *arguments, "--show"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "batch", "rates"),
    [
        ("llava-1.5-align", 256, {"projector": 1e-3}),
        ("llava-1.5-instruct", 128, {"projector": 2e-5, "llm": 2e-5, "embeddings": 2e-5}),
        ("tokenpacker-align", 256, {"projector": 1e-3}),
        ("tokenpacker-instruct", 128, {"projector": 2e-5, "llm": 2e-5, "embeddings": 2e-5}),
        ("mqt-align", 256, {"projector": 1e-3}),
        ("mqt-instruct", 128, {"projector": 2e-5, "llm": 2e-5, "embeddings": 2e-5}),
        ("mobilevlm-v2-align", 256, {"projector": 1e-3, "llm": 2e-5, "embeddings": 2e-5}),
        ("mobilevlm-v2-instruct", 128, {"projector": 4e-5, "llm": 4e-5, "embeddings": 4e-5}),
        ("instruct_lora", 128, {"projector": 2e-5, "llm": 2e-4}),
        ("instruct_qlora", 128, {"projector": 2e-5, "llm": 2e-4}),
    ],
)
def test_the_published_recipes(name, batch, rates, capsys):
    recipe = shown(capsys, name)
    assert recipe["name"] == name
    assert recipe["batch_size"] == batch
    assert recipe["rates"] == dict.fromkeys(("tower", "projector", "llm", "embeddings")) | rates
    assert (recipe["warmup_ratio"], recipe["weight_decay"], recipe["max_length"]) == (0.03, 0, 2048)
    assert ((recipe["adapters"] or {}).get("four_bits") is True) == (name == "instruct_qlora")
    assert recipe["group_by_modality"] == (recipe["text"] == "chat") == ("align" not in name)
    assert recipe["epochs"] == (2 if name == "mqt-instruct" else 1)


def test_the_list_names_every_recipe(capsys):
    assert cli.main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*RECIPES, "tiny", "small"]
    assert all(make().name == name for name, make in RECIPES.items())


def test_a_few_fields_are_changed_and_the_others_stay(capsys):
    changes = ["--steps", "7", "--batch-size", "32", "--seed", "3", "--no-bf16", "--bad-records", "skip"]
    changed, whole = shown(capsys, "instruct", *changes), shown(capsys, "instruct")
    assert {name: value for name, value in changed.items() if value != whole[name]} == {
        "steps": 7, "batch_size": 32, "seed": 3, "bf16": False, "bad_records": "skip",
    }  # fmt: skip
    assert set(whole) == {field.name for field in dataclasses.fields(Recipe)}


def test_adapters_and_checkpointing_are_changed(capsys):
    changes = ["--lora-rank", "16", "--lora-alpha", "24", "--lora-targets", "q_proj", "v_proj"]
    changed, whole = (shown(capsys, "instruct_qlora", *changes) for changes in (changes, []))
    assert changed.pop("adapters") == {
        "rank": 16, "alpha": 24, "targets": ["q_proj", "v_proj"], "dropout": 0.05, "four_bits": True,
    }  # fmt: skip
    assert whole.pop("adapters") == {"rank": 128, "alpha": 256, "targets": [], "dropout": 0.05, "four_bits": True}
    assert changed == whole
    assert shown(capsys, "align")["activation_checkpointing"]
    assert not shown(capsys, "align", "--no-activation-checkpointing")["activation_checkpointing"]


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        (["1e-4"], {"projector": 1e-4, "llm": 1e-4, "embeddings": 1e-4}),
        (["tower=2e-6"], {"tower": 2e-6, "projector": 2e-5, "llm": 2e-5, "embeddings": 2e-5}),
        (["1e-4", "projector=1e-3", "embeddings=frozen"], {"projector": 1e-3, "llm": 1e-4}),
    ],
)
def test_learning_rates_are_changed_for_all_or_for_a_part(changes, rates, capsys):
    changed = shown(capsys, "instruct", "--learning-rate", *changes)["rates"]
    assert {part: rate for part, rate in changed.items() if rate is not None} == rates


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Name a recipe; `ms-resampler train --list` shows them."),
        (["align"], "The recipe align needs --model and --data."),
        (["align", "--model", "gone/away/x", "--data", "d.json"], "neither a folder nor the name of a Hub repository"),
        (["align", "--learning-rate", "fast"], "'fast' is not a learning rate: write 1e-4"),
        (["align", "--learning-rate", "eyes=1e-4"], "'eyes' is not a part of a model: the parts are tower, projector"),
        (["align", "--learning-rate", "projector=frozen"], "Every part of the model is frozen"),
        (["align", "--learning-rate", "3"], "The learning rate of the projector must lie between 0 and 1, got 3.0."),
        (["align", "--steps", "0"], "The recipe's steps must be at least 1, got 0."),
        (["align", "--epochs", "-1"], "The recipe's epochs must be above 0, got -1.0."),
        (["align", "--epochs", "nan"], "The recipe's epochs must be above 0, got nan."),
        (["align", "--batch-size", "0"], "The recipe's batch_size must be at least 1, got 0."),
        (["align", "--max-length", "-2"], "The recipe's max_length must be at least 1, got -2."),
        (["align", "--workers", "-1"], "The recipe's workers must be at least 0, got -1."),
        (["align", "--save-steps", "0"], "The recipe's save_steps must be at least 1, got 0."),
        (["align", "--seed", "-1"], "The recipe's seed must be at least 0, got -1."),
        (["align", "--learning-rate", "nan"], "must lie between 0 and 1, got nan."),
        (["tiny", "--steps", "0"], "The number of steps must be at least 1, got 0."),
        (["tiny", "--scenes", "0"], "The number of scenes must be at least 1, got 0."),
        (["missing"], "There is no recipe 'missing': choose one of words, align, instruct"),
        (["instruct_lora", "--learning-rate", "embeddings=1e-5"], "the embeddings stay frozen"),
        (["instruct_lora", "--lora-rank", "0"], "The adapters' rank must be at least 1, got 0."),
        (["instruct_lora", "--lora-alpha", "-1"], "The adapters' alpha must be at least 1, got -1."),
        (
            ["instruct", "--lora-rank", "8"],
            "--lora-rank is for recipes with adapters, such as instruct_lora, and instr",
        ),
        (["align", "--lora-targets", "q_proj"], "--lora-targets is for recipes with adapters"),
        (["tiny", "--lora-alpha", "8"], "it does not accept --lora-alpha."),
        (["tiny", "--no-activation-checkpointing"], "it does not accept --no-activation-checkpointing."),
        (["tiny", "--show"], "it does not accept --show."),
        (["tiny", "--workers", "2"], "it does not accept --workers."),
        (["tiny", "--no-bf16"], "it does not accept --no-bf16."),
        (["tiny", "--streaming"], "it does not accept --streaming."),
        (["align", "--scenes", "5"], "--scenes is an option of the recipe tiny, and the recipe here is align."),
        (
            ["tiny", "--data", "d.json"],
            "The recipe tiny has its own model and data: it does not accept --data.",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, sentence, capsys):
    assert cli.main(["train", *arguments, *(["--show"] if len(arguments) == 3 and arguments[0] != "tiny" else [])]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["train align --data d.json", "data check d.json", "plan align"])
def test_a_language_model_alone_is_not_trained(command, tmp_path, capsys):
    llm = save_llm(tmp_path / "qwen2")
    capsys.readouterr()
    assert cli.main([*command.split(), "--model", str(llm)]) == 2
    told = capsys.readouterr().err
    assert f"{llm} is a `qwen2` model, not one of this package: put one together with `ms-resampler init`" in told
    assert told.count("\n") == 1


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="Adapters train at the rate of `llm`"):
        dataclasses.replace(RECIPES["instruct_lora"](), rates=LearningRates(projector=1e-4))
    assert Adapters() == Adapters(rank=128, alpha=256)


def test_the_command_trains_and_a_finished_run_is_not_run_again(tmp_path, capfd):
    start, out = make_start(tmp_path, records=3), tmp_path / "run"
    command = ["train", "align", "--model", str(start / "start"), "--data", str(start / "data.json")]
    command += ["--images", str(start / "images"), "--out", str(out), "--steps", "2", "--batch-size", "2"]
    command += ["--workers", "0", "--no-bf16", "--max-length", "512"]
    assert cli.main(command) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(out / "model")
    log = (out / "log.jsonl").read_text()
    assert cli.main(command) == 0
    assert (out / "log.jsonl").read_text() == log


def test_a_package_that_is_missing_is_named_before_anything_is_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ["train", "align", "--model", "a/b", "--data", "d.json", "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--report-to", "tensorboard"]) == 2
    assert "This run needs the package tensorboard: pip install tensorboard." in capsys.readouterr().err
    assert cli.main([*command, "--liger"]) == 2
    assert "This run needs the package liger_kernel: pip install liger-kernel." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_commands_make_a_model_that_answers(tmp_path, capfd):
    make_start(tmp_path, records=12)
    rows = [row for row in json.loads((tmp_path / "data.json").read_text()) if "image" in row]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    tower, llm, model = save_tower(tmp_path / "clip"), save_llm(tmp_path / "qwen2"), str(tmp_path / "model")
    fields = ["--visual-tokens", "4", "--set", "hidden_size=32", "--set", "num_attention_heads=4"]
    assert cli.main(["init", "--vision", str(tower), "--llm", str(llm), "--out", model, *fields]) == 0

    common = ["--images", str(tmp_path / "images"), "--batch-size", "4", "--workers", "0", "--steps", "2"]
    for recipe, data in (("align", "captions.json"), ("instruct", "data.json")):
        files = ["--model", model, "--data", str(tmp_path / data), "--out", str(tmp_path / recipe)]
        assert cli.main(["train", recipe, *files, *common]) == 0
        assert f"{recipe}: 2 steps of 4 records" in capfd.readouterr().out
        model = str(tmp_path / recipe / "model")

    image = str(tmp_path / "images" / "0.png")
    assert cli.main(["chat", "What is 0?", "--model", model, "--image", image, "--max-new-tokens", "4", "--json"]) == 0
    assert '"visual_tokens": 4' in capfd.readouterr().out
