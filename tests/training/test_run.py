"""Runs of a recipe: what learns and what does not, exact resume, whole checkpoints, records, and bad input."""

import dataclasses
import json
import re
import resource
import shutil
from functools import partial

import pytest
import torch
from components import THINKING
from frozen_parts import PARTS, assert_frozen, changed_parts
from killed_runs import assert_same_weights, finish, kill_at, start_run, weights
from labelled_records import turns
from tiny_models import save_tiny, tiny_model, tiny_processor
from tiny_runs import losses_of, options_in, run_interrupted, save_efficientnet, small
from transformers import AutoModelForImageTextToText, AutoProcessor

from ms_resampler import MSResamplerForConditionalGeneration
from ms_resampler.chat_format import ChatFormat, image_aware
from ms_resampler.training import run
from ms_resampler.training.collate import IGNORED, BatchMaker, ConversationCollator
from ms_resampler.training.data_check import check_data
from ms_resampler.training.order import Schedule
from ms_resampler.training.parameters import count_parameters, freeze, parameter_groups, part_of
from ms_resampler.training.recipes import LearningRates
from ms_resampler.training.records import open_records
from ms_resampler.training.run import share_batch, train
from ms_resampler.training.trainer import CheckedTrainer, last_checkpoint


@pytest.mark.parametrize(
    ("recipe", "rates", "learning"),
    [
        ("align", {}, {"projector"}),
        ("instruct", {}, {"projector", "llm", "embeddings"}),
        ("instruct", {"embeddings": None, "projector": None}, {"llm"}),
        ("align", {"tower": 1e-4}, {"tower", "projector"}),
    ],
)
def test_the_parts_with_a_rate_learn_and_no_other(recipe, rates, learning, start, tmp_path):
    recipe = small(recipe, steps=2)
    recipe = dataclasses.replace(recipe, rates=dataclasses.replace(recipe.rates, **rates))
    result = train(recipe, **options_in(start, tmp_path))
    assert changed_parts(weights(start / "start"), weights(result)) == learning


@pytest.mark.parametrize("frozen", PARTS)
def test_what_is_frozen_keeps_every_tensor_and_buffer(frozen, start, tmp_path, monkeypatch):
    """Batch statistics, and buffers that no file has, too, in a run that is stopped and resumed."""
    kept, plain_save = {}, run.save_result

    def save_result(trainer, *rest):
        kept.update({name: value.clone() for name, value in trainer.model.named_buffers()})
        plain_save(trainer, *rest)

    monkeypatch.setattr(run, "save_result", save_result)
    begin = save_efficientnet(tmp_path / "start")
    rates = LearningRates(**{part: None if part == frozen else 1e-3 for part in PARTS})
    options = options_in(start, tmp_path / "run", model=str(begin))
    run_interrupted(small("instruct", rates=rates), options, 2, monkeypatch)
    assert_frozen({frozen}, begin, tmp_path / "run" / "model")
    buffers = dict(MSResamplerForConditionalGeneration.from_pretrained(begin).named_buffers())
    assert buffers.keys() == kept.keys()
    moved = {part_of(name) for name in buffers if not torch.equal(buffers[name], kept[name])}
    assert moved == {"tower"} - {frozen}


@pytest.mark.parametrize("name", ["align", "instruct"])
def test_batch_norms_take_part_in_bfloat16(name, start, tmp_path):
    begin = save_efficientnet(tmp_path / "start")
    recipes = [small(name, steps=1, bf16=bf16, rates=LearningRates(projector=1e-3)) for bf16 in (True, False)]
    for recipe in recipes:
        train(recipe, **options_in(start, tmp_path / str(recipe.bf16), model=str(begin)))
    narrow, wide = (losses_of(tmp_path / str(recipe.bf16)) for recipe in recipes)
    torch.testing.assert_close(narrow, wide, rtol=0.02, atol=0)


@pytest.mark.parametrize("tower", ["clip_vision_model", "efficientnet"])
def test_dropout_is_off_in_what_is_frozen(tower, start, tmp_path):
    """Through layers whose activations are checkpointed, too."""
    runs = []
    for rate in (0.0, 0.5):
        folder = tmp_path / str(rate)
        if tower == "efficientnet":
            save_efficientnet(folder, rate)
        else:
            dropout = {"attention_dropout": rate}
            save_tiny(folder, tower, "qwen2", tower_changes=dropout, text_changes=dropout)
        train(small("align", steps=2), **options_in(start, folder / "run", model=str(folder)))
        runs.append(weights(folder / "run" / "model"))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_result_loads_anywhere_and_differs_in_weights_alone(start, tmp_path):
    result = train(small("instruct", steps=1), **options_in(start, tmp_path))
    model = AutoModelForImageTextToText.from_pretrained(result)
    trained = weights(result)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trained.items())
    assert AutoProcessor.from_pretrained(result).visual_tokens == 4
    before = AutoModelForImageTextToText.from_pretrained(start / "start").config.to_dict()
    assert model.config.to_dict() == before | {"_name_or_path": str(result)}
    assert (result / "modeling_ms_resampler.py").exists()


@pytest.mark.parametrize("bf16", [True, False])
def test_a_start_in_bfloat16_trains_in_float32_and_comes_back_in_bfloat16(bf16, start, tmp_path):
    """With bf16 what learns is in float32, without it all that the run computes with."""
    MSResamplerForConditionalGeneration.from_pretrained(start / "start", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "start"
    )
    AutoProcessor.from_pretrained(start / "start").save_pretrained(tmp_path / "start")
    options = options_in(start, tmp_path / "run", model=str(tmp_path / "start"))
    result = train(small("align", steps=1, save_steps=1, bf16=bf16), **options)
    kept = weights(tmp_path / "run" / "checkpoint-1")
    assert {part_of(name) for name, value in kept.items() if value.dtype == torch.float32} == (
        {"projector"} if bf16 else {part_of(name) for name in kept}
    )
    assert {value.dtype for value in weights(result).values()} == {torch.bfloat16}


def test_a_tied_head_is_saved_once_and_comes_back_tied(start, tmp_path):
    tied = tiny_model(text="qwen2", text_changes={"max_position_embeddings": 512, "tie_word_embeddings": True})
    tied.save_pretrained(tmp_path / "start")
    AutoProcessor.from_pretrained(start / "start").save_pretrained(tmp_path / "start")
    options = options_in(start, tmp_path / "run", model=str(tmp_path / "start"))
    result = train(small("instruct", steps=2), **options)
    assert weights(result).keys() == weights(tmp_path / "start").keys()
    model = AutoModelForImageTextToText.from_pretrained(result)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert changed_parts(weights(tmp_path / "start"), weights(result)) == {"projector", "llm", "embeddings"}


def test_groups_have_their_rates_and_decay_matrices_alone():
    model = tiny_model(projector={"projector_type": "ms_resampler_branches"})
    rates = LearningRates(projector=1e-3, llm=2e-5, embeddings=1e-5)
    freeze(model, rates)
    groups = parameter_groups(model, rates, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert listed.keys() == {name for name in names.values() if part_of(name) != "tower"}
    assert listed["model.projector.layers.0.q_proj.weight"] == (1e-3, 0.1)
    undecayed = (
        "model.projector.layers.0.prior.log_scale",
        "model.projector.query",
        "model.projector.layers.0.q_proj.bias",
        "model.projector.input_norm.weight",
    )
    assert {listed[name] for name in undecayed} == {(1e-3, 0.0)}
    assert listed["model.language_model.layers.1.mlp.up_proj.weight"] == (2e-5, 0.1)
    assert listed["model.language_model.norm.weight"] == (2e-5, 0.0)
    assert listed["model.language_model.embed_tokens.weight"] == (1e-5, 0.0)
    assert listed["lm_head.weight"] == (1e-5, 0.1)
    counts = count_parameters(model)
    assert sum(sum(count.values()) for count in counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["tower"]["trainable"] == counts["llm"]["frozen"] == 0


def test_a_step_is_the_same_however_it_is_cut_into_batches(start, tmp_path):
    whole = train(small("instruct", steps=3), **options_in(start, tmp_path / "whole", device_batch=4))
    parts = train(small("instruct", steps=3), **options_in(start, tmp_path / "parts", device_batch=1))
    torch.testing.assert_close(losses_of(tmp_path / "parts"), losses_of(tmp_path / "whole"), rtol=1e-5, atol=0)
    ours, theirs = weights(parts), weights(whole)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-6)


def test_batches_are_shared_out_evenly_or_not_at_all():
    recipe = small("align", batch_size=256)
    assert share_batch(recipe, 8, None) == (16, 2)
    assert share_batch(recipe, 1, 4) == (4, 64)
    with pytest.raises(ValueError, match="A batch of 256 cannot be shared among 6 devices"):
        share_batch(recipe, 6, None)
    with pytest.raises(ValueError, match="8 devices take 32 of the 256 records of a step each, which 5 at a time"):
        share_batch(recipe, 8, 5)


def test_every_epoch_has_every_record_once_in_an_order_of_its_own(start):
    schedule = Schedule(open_records(str(start / "data.json"), start / "images"), small("align", steps=None, epochs=2))
    ids = [schedule[position][0]["id"] for position in range(len(schedule))]
    first, second = ids[:24], ids[24:]
    assert sorted(first) == sorted(second) == sorted(f"r{number}" for number in range(24))
    assert first != second
    assert [schedule[position][0]["id"] for position in reversed(range(48))] == ids[::-1]


def test_a_budget_holds_for_a_whole_step_and_changes_from_step_to_step(start):
    recipe = small("elastic", steps=50, token_budgets=(1, 4, 9))
    schedule = Schedule(open_records(str(start / "data.json"), start / "images"), recipe)
    budgets = [schedule[position][1] for position in range(len(schedule))]
    steps = [set(budgets[step * 4 : step * 4 + 4]) for step in range(50)]
    assert all(len(step) == 1 for step in steps)
    assert set(budgets) == {1, 4, 9}


def batch_maker(start, tmp_path, recipe, bad_records="fatal"):
    processor = AutoProcessor.from_pretrained(start / "start")
    return BatchMaker(partial(ConversationCollator, max_length=recipe.max_length), processor, bad_records, tmp_path)


@pytest.mark.parametrize(("budget", "grid"), [(None, [2, 2]), (9, [3, 3]), ((1, 6), [1, 6])])
def test_a_batch_has_the_budget_of_its_step(budget, grid, start, tmp_path):
    records = open_records(str(start / "data.json"), start / "images")
    batch = batch_maker(start, tmp_path, small("elastic"))([(records[0], budget), (records[1], budget)])
    image = tiny_processor().image_token_id
    assert (batch["input_ids"] == image).sum(-1).tolist() == [grid[0] * grid[1]] * 2
    assert batch["record_ids"] == ["r0", "r1"]
    assert batch["token_grids"].tolist() == [grid, grid]


def test_text_alone_goes_through_the_projector_and_teaches_it_nothing(start, tmp_path):
    records = open_records(str(start / "data.json"), start / "images")
    batch = batch_maker(start, tmp_path, small("instruct"))([(records[3], None), (records[7], None)])
    assert batch.pop("record_ids") == ["r3", "r7"]
    assert (batch["labels"][2] == IGNORED).all()
    assert len(batch["pixel_values"]) == 1
    model = tiny_model(text="qwen2")
    loss = model(**batch).loss
    loss.backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in model.model.projector.parameters())
    rows = {name: batch[name][:2] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(model(**rows).loss, loss, rtol=1e-5, atol=0)


def bad_data(start, folder):
    """The data with a missing image, an image that is none, and an answer that is too long."""
    rows = json.loads((start / "data.json").read_text())
    rows[0]["image"] = "missing.png"
    (start / "images" / "none.png").write_text("no picture")
    rows[1]["image"] = "none.png"
    rows[2]["conversations"][1]["value"] = "x" * 600
    (folder / "data.json").write_text(json.dumps(rows))
    return options_in(start, folder / "run", data=str(folder / "data.json"))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_stop_a_run_or_are_counted_and_named(workers, start, tmp_path):
    options = bad_data(start, tmp_path)
    with pytest.raises(ValueError, match=r"^Record r[012] .*\.$"):
        train(small("instruct", steps=6, workers=workers), **options)
    options = options | {"out": tmp_path / "skipping"}
    result = train(small("instruct", steps=6, bad_records="skip", workers=workers), **options)
    skipped = json.loads((result / "training_record.json").read_text())["skipped"]
    assert skipped["records"] == 3
    assert skipped["first"].keys() == {"r0", "r1", "r2"}
    assert "tokens" in skipped["first"]["r2"]


def test_a_step_of_bad_records_alone_changes_nothing_and_goes_by(start, tmp_path):
    rows = [{"id": f"b{number}", "conversations": "nothing"} for number in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    options = options_in(start, tmp_path / "run", data=str(tmp_path / "data.json"))
    result = train(small("instruct", steps=2, bad_records="skip"), **options)
    assert changed_parts(weights(start / "start"), weights(result)) == set()
    assert json.loads((result / "training_record.json").read_text())["skipped"]["records"] == 8


def test_a_thinking_template_is_mended_and_saved_so(start, tmp_path, capsys):
    model = tmp_path / "thinker"
    shutil.copytree(start / "start", model)
    tokenizer = AutoProcessor.from_pretrained(model).tokenizer
    template = image_aware(THINKING, "<image>", tokenizer)
    (model / "chat_template.jinja").write_text(template)
    thought = "<think>\nhm\n</think>\n\nyes"
    rows = [{"id": "t", "conversations": turns(("human", "Q"), ("gpt", thought), ("human", "R"), ("gpt", "no"))}]
    (tmp_path / "data.json").write_text(json.dumps(rows))

    report = check_data(tmp_path / "data.json", model=model, workers=0)
    assert "The chat template is used and saved with thinking switched off" in str(report)
    learned = ["".join(piece.text for piece in report.examples[0].pieces if piece.learned)]
    assert learned == [f"{thought}<|im_end|>no<|im_end|>"]
    options = options_in(start, tmp_path / "run", model=str(model), data=str(tmp_path / "data.json"))
    result = train(small("instruct", steps=1), **options)
    assert "The chat template is used and saved with thinking switched off" in capsys.readouterr().out
    saved = ChatFormat(AutoProcessor.from_pretrained(result).chat_template, tokenizer)
    assert saved.check_generation_prompt() is None
    assert ChatFormat(template, tokenizer).check_generation_prompt() is not None


def test_records_that_are_cut_are_counted_and_the_rest_of_them_is_learned(start, tmp_path, capsys):
    options = bad_data(start, tmp_path)
    recipe = small("instruct", steps=6, bad_records="skip", truncate=True)
    record = json.loads((train(recipe, **options) / "training_record.json").read_text())
    assert record["skipped"]["first"].keys() == {"r0", "r1"}
    assert record["cut"]["records"] == 1
    assert re.fullmatch(r"has 6\d\d tokens, of which 512 stay\.", record["cut"]["first"]["r2"])
    told = capsys.readouterr().out
    assert f"Bad records skipped: 2 ({options['out']}/skipped.jsonl says why)." in told
    assert f"Records cut to the recipe's length: 1 (named in {options['out']}/cut.jsonl)." in told
    records = open_records(options["data"], start / "images")
    batch = BatchMaker(
        partial(ConversationCollator, max_length=512, truncate=True),
        AutoProcessor.from_pretrained(start / "start"),
        "fatal",
        tmp_path,
    )([(records[2], None), (records[4], None)])
    assert batch["input_ids"].shape == (2, 512)
    assert batch["labels"][0, -1] == batch["input_ids"][0, -1]
    assert [json.loads(line)["id"] for line in (tmp_path / "cut.jsonl").read_text().splitlines()] == ["r2"]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_records(poison, start, tmp_path, monkeypatch):
    seen = []
    honest = CheckedTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = honest(self, model, inputs, *args, **kwargs)
        seen.append(self.ids_of_step[-2:])
        if len(seen) < 6:
            return loss
        return loss * float("nan") if poison == "loss" else torch.sqrt(loss - loss.detach()) + loss

    monkeypatch.setattr(CheckedTrainer, "compute_loss", compute_loss)
    with pytest.raises(ValueError, match=f"The {poison} of step 3 is not finite") as stopped:
        train(small("align", save_steps=1), **options_in(start, tmp_path, device_batch=2))
    for name in seen[5]:
        assert f"{name}" in str(stopped.value)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not any(value.isnan().any() for value in weights(tmp_path / "checkpoint-2").values())


def test_a_run_is_not_gone_on_with_by_another_recipe_or_other_data(start, tmp_path):
    train(small("align", steps=1), **options_in(start, tmp_path))
    with pytest.raises(ValueError, match="started with another batch_size, seed: give a new --out"):
        train(small("align", steps=1, batch_size=2, seed=3), **options_in(start, tmp_path))
    (tmp_path / "other.json").write_text((start / "data.json").read_text() + " ")
    other = options_in(start, tmp_path, data=str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="started with another data"):
        train(small("align", steps=1), **other)


def test_a_result_that_cannot_be_written_comes_with_the_next_try(start, tmp_path, monkeypatch):
    def fail(trained, state, dtype, folder):
        folder.mkdir()
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_weights", fail)
        with pytest.raises(OSError, match=r"The result could not be written \(No space left on device\)"):
            train(small("align", steps=2), **options_in(start, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "log.jsonl", "record.json"]
    assert train(small("align", steps=2), **options_in(start, tmp_path)) == tmp_path / "model"
    assert weights(tmp_path / "model").keys() == weights(start / "start").keys()


def test_data_without_records_are_refused(start, tmp_path):
    (tmp_path / "data.json").write_text("[]")
    options = options_in(start, tmp_path / "run", data=str(tmp_path / "data.json"))
    with pytest.raises(ValueError, match="The data hold no records"):
        train(small("align"), **options)


CHANGES = {"steps": 12, "save_steps": 3, "token_budgets": [1, 4, 9]}


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """The weights of a run that nobody stopped: budgets drawn at random, twice through shuffled data."""
    out = tmp_path_factory.mktemp("unbroken")
    finish(start_run(start, out, CHANGES))
    return out


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(start, unbroken, tmp_path):
    out = tmp_path / "run"
    log = out / "log.jsonl"
    for lines in (2, 8):  # in the middle of a stretch between two checkpoints, the second time after a resume
        kill_at(
            start_run(start, out, CHANGES),
            out,
            lambda lines=lines: log.exists() and len(log.read_text().splitlines()) > lines,
        )
    finish(start_run(start, out, CHANGES))
    assert_same_weights(out, unbroken)


@pytest.mark.slow
def test_a_run_killed_in_a_checkpoint_resumes_from_the_one_before(start, unbroken, tmp_path):
    out = tmp_path / "run"
    kill_at(start_run(start, out, CHANGES), out, lambda: last_checkpoint(out) and (out / "unfinished").exists())
    (out / "unfinished" / "checkpoint-99").mkdir(parents=True, exist_ok=True)  # the kill may have come too late
    (out / "unfinished" / "checkpoint-99" / "trainer_state.json").write_text("{}")
    assert int(last_checkpoint(out).rsplit("-", 1)[1]) < 99
    finish(start_run(start, out, CHANGES))
    assert_same_weights(out, unbroken)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(start, unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for folder in ("checkpoint-12", "model"):
        shutil.rmtree(out / folder)

    def no_large_files():  # a write of the weights fails in the middle, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    run = start_run(start, out, CHANGES, preexec_fn=no_large_files)
    error = run.communicate()[1]
    assert run.returncode != 0
    assert "The checkpoint of step 12 could not be written (" in error
    assert f"The last complete checkpoint is {out / 'checkpoint-9'}: make room, then run the same command." in error
    assert not (out / "unfinished").exists()
    finish(start_run(start, out, CHANGES))
    assert_same_weights(out, unbroken)


@pytest.mark.slow
def test_no_file_of_a_run_holds_the_token(unbroken):
    files = [file for file in unbroken.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if b"s3cret" in file.read_bytes()]
    assert not list(unbroken.rglob("training_args.bin"))
