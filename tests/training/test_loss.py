"""The loss of training, held against the loss of all logits."""

import dataclasses

import pytest
import torch
from interpreted_liger import batch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from tiny_runs import losses_of, make_start, options_in, small

from ms_resampler.training import parameters
from ms_resampler.training.collate import IGNORED
from ms_resampler.training.loss import skip_unlearned
from ms_resampler.training.recipes import Adapters
from ms_resampler.training.run import train

HEADS = {
    "untied": ("qwen2", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "capped": ("gemma2", {}),
    "divided": ("granite", {}),
    "multiplied": ("cohere", {}),
    "with a bias": ("phi", {}),
}


def answers(labels):
    """Labels as in a conversation: the first half of every record is a question."""
    return labels.masked_fill(torch.arange(labels.shape[1]) < labels.shape[1] // 2, IGNORED)


def learning(model, labels_of, count):
    """Loss and gradients of `batch()`."""
    inputs = batch()
    inputs["labels"] = labels_of(inputs["labels"])
    loss = model(**inputs, **({} if count is None else {"num_items_in_batch": torch.tensor(count)})).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_learning(ours, theirs, labels_of=answers, count=None):
    ours, theirs = (learning(model, labels_of, count) for model in (ours, theirs))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-6, atol=0)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-7, msg=name)
    return ours


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("count", [None, 40], ids=["alone", "accumulated"])
def test_loss_and_gradients_are_those_of_all_logits(head, count):
    text, changes = HEADS[head]
    ours, theirs = (tiny_model(text=text, text_changes=changes) for _ in range(2))
    skip_unlearned(ours)
    assert_same_learning(ours, theirs, count=count)


def test_a_batch_with_nothing_to_learn_has_gradients_of_zero():
    """So that every process has the gradients that the others have."""
    ours, theirs = tiny_model(), tiny_model()
    skip_unlearned(ours)
    made = assert_same_learning(ours, theirs, lambda labels: torch.full_like(labels, IGNORED), count=1)
    assert "lm_head.weight" in made
    assert all((value == 0).all() for value in made.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_with_adapters_learns_the_same():
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["projector"], init_lora_weights=False
    )
    adapted = []
    for change in (skip_unlearned, lambda model: None):
        model = tiny_model(text="qwen2")
        change(model)
        torch.manual_seed(0)
        adapted.append(get_peft_model(model, config))
    assert_same_learning(*adapted, count=40)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["align", "instruct", "instruct_lora"])
def test_a_run_computes_the_head_only_where_something_is_learned(name, tmp_path, monkeypatch):
    start, recipe = make_start(tmp_path, records=8), small(name, steps=2)
    if recipe.adapters:
        recipe = dataclasses.replace(recipe, adapters=Adapters(rank=2, dropout=0))
    rows, learned, plain_freeze = [], [], parameters.freeze

    def freeze(model, rates):
        """Watches the head, and the labels."""
        plain_freeze(model, rates)
        plain_words = model.words_only
        model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(output.shape[:-1].numel()))

        def words_only(labels, kept_positions):
            words = plain_words(labels, kept_positions)
            learned.append(int((words[:, 1:] != IGNORED).sum()))
            return words

        model.words_only = words_only

    monkeypatch.setattr(parameters, "freeze", freeze)
    train(recipe, **options_in(start, tmp_path / "ours", device_batch=2))
    assert len(rows) == 4
    assert rows == learned
    monkeypatch.setattr(parameters, "skip_unlearned", lambda model: None)
    train(recipe, **options_in(start, tmp_path / "theirs", device_batch=2))
    assert sum(rows[4:]) > 2 * sum(rows[:4])
    torch.testing.assert_close(losses_of(tmp_path / "ours"), losses_of(tmp_path / "theirs"), rtol=1e-6, atol=0)
