"""Accuracy on held-out scenes by question family, with intervals."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..training.conversations import images_of, messages_of
from .scenes import FAMILIES, Question, Scene, ask, make_record, make_scene, scene_rng, score

MAX_ANSWER_TOKENS = 96


@dataclass(frozen=True)
class FamilyScore:
    """Mean score of a family over `questions` questions, and its 95% bootstrap interval; all in [0, 1]."""

    family: str
    group: str
    questions: int
    mean: float
    low: float
    high: float


def evaluate_scenes(
    model: Any, processor: Any, *, split: str = "test", scenes: int = 400, blind: bool = False, batch_size: int = 50
) -> list[FamilyScore]:
    """Asks one question of every family about every scene that allows it, with greedy decoding."""
    model.eval()
    rows = []
    for name, family in FAMILIES.items():
        asked = questions_of(name, split, scenes)
        scores: list[float] = []
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            replies = answer(model, processor, [unanswered(scene, question, blind) for scene, question in batch])
            scores += [score(question, reply) for (_, question), reply in zip(batch, replies, strict=True)]
        low, high = bootstrap_interval(np.array(scores))
        rows.append(FamilyScore(name, family.group, len(scores), float(np.mean(scores)), low, high))
        print(f"  {name:13s} {np.mean(scores):6.1%}", flush=True)
    return rows


def questions_of(family: str, split: str, scenes: int) -> list[tuple[Scene, Question]]:
    """One question of the family about each of the first `scenes` scenes that allow it."""
    asked = []
    for index in range(scenes):
        scene = make_scene(split, index)
        if FAMILIES[family].questions(scene, scene_rng(split, index, 1)):
            asked.append((scene, ask(scene, split, index, 1, [family])[0]))
    return asked


def unanswered(scene: Scene, question: Question, blind: bool) -> dict[str, Any]:
    """A record that ends with its question."""
    record = make_record(scene, [(question.question, "")], blind=blind)
    return {**record, "conversations": record["conversations"][:1]}


@torch.inference_mode()
def answer(model: Any, processor: Any, records: list[dict[str, Any]]) -> list[str]:
    """Greedy answers to records that end with a question."""
    images = [images_of(record) for record in records]
    inputs = processor.apply_chat_template(
        [messages_of(record) for record in records],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images": images if any(images) else None},
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def bootstrap_interval(scores: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean, over resampled questions."""
    rng = np.random.default_rng(seed)
    means = scores[rng.integers(len(scores), size=(resamples, len(scores)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
