"""Evaluation: every question once, alone, and scored as a person would."""

import numpy as np
import pytest
import torch
from tiny_models import asked, picture, tiny_model, tiny_processor

from ms_resampler.tiny.evaluate import answer, bootstrap_interval, evaluate_scenes
from ms_resampler.tiny.scenes import FAMILIES, ask, make_scene, scene_rng


def test_answers_in_a_batch_are_those_of_single_questions():
    model, processor = tiny_model(), tiny_processor()
    records = [
        {
            "id": n,
            "image": picture(n),
            "conversations": [{"from": "human", "value": "<image>\n" + "What is this? " * (n + 1)}],
        }
        for n in range(3)
    ]
    together = answer(model, processor, records)
    assert together == [answer(model, processor, [record])[0] for record in records]
    prompt = asked(processor, "What is this? ", picture(0))
    ids = prompt["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    greedy = processor.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert together[0].startswith(greedy)


class Oracle:
    """Stands in for a model: what it is asked is answered by `answer_from_the_scene`."""

    def eval(self):
        return self


def test_an_oracle_scores_one_and_a_mute_family_zero(monkeypatch):
    scenes = {f"test-{index}": make_scene("test", index) for index in range(30)}
    colour_words = ("What colour",)

    def answer_from_the_scene(model, processor, records):
        replies = []
        for record in records:
            assert record["image"] is not None
            scene, asked = scenes[record["id"]], record["conversations"][0]["value"].removeprefix("<image>\n")
            assert len(record["conversations"]) == 1
            known = {
                question.question: question.answer
                for family in FAMILIES
                if FAMILIES[family].questions(scene, scene_rng(*scene.seed_key, 1))
                for question in ask(scene, *scene.seed_key, 1, [family])
            }
            replies.append("?" if asked.startswith(colour_words) else known[asked])
        return replies

    monkeypatch.setattr("ms_resampler.tiny.evaluate.answer", answer_from_the_scene)
    rows = {row.family: row for row in evaluate_scenes(Oracle(), None, scenes=30)}
    assert {family: row.mean for family, row in rows.items()} == {f: 0.0 if f == "colour" else 1.0 for f in FAMILIES}
    assert rows["describe"].questions == 30
    assert rows["majority"].questions < 30


def test_the_bootstrap_interval_covers_the_mean_and_shrinks():
    rng = np.random.default_rng(0)
    few, many = rng.random(50) < 0.7, rng.random(5000) < 0.7
    (low, high), (many_low, many_high) = bootstrap_interval([few * 1.0]), bootstrap_interval([many * 1.0])
    assert low < few.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * few.std() / 50**0.5, rel=0.1)
    assert many_high - many_low < 0.2 * (high - low)
