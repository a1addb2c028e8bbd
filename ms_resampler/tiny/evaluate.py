"""Accuracy on held-out scenes: by question family, by number of visual tokens, and by the way of asking."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..training.collate import with_budget
from ..training.conversations import images_of, messages_of
from .scenes import FAMILIES, Question, Scene, ask, make_record, make_scene, scene_rng, score
from .wordings import about_nothing, about_one_of, across, beside, greeting, in_other_words

MAX_ANSWER_TOKENS = 96
BUDGETS = (1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121, 144)

# A scene, a question about it, and the scenes whose pictures are shown.
Asked = tuple[Scene, Question, list[Scene]]


@dataclass(frozen=True)
class FamilyScore:
    """Mean score of a family over `questions` questions, and its 95% bootstrap interval; all in [0, 1]."""

    family: str
    group: str
    questions: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class BudgetScore:
    """Mean of the families' mean scores at a number of visual tokens, and its 95% bootstrap interval, in [0, 1]."""

    visual_tokens: int
    questions: int
    mean: float
    low: float
    high: float


def evaluate_scenes(
    model: Any, processor: Any, *, split: str = "test", scenes: int = 400, blind: bool = False
) -> list[FamilyScore]:
    """Asks one question of every family about every scene that allows it, with greedy decoding."""
    rows = []
    for name, family in FAMILIES.items():
        scores = scores_of(model, processor, questions_of(name, split, scenes), blind)
        rows.append(family_score(name, family.group, scores))
    return rows


def evaluate_budgets(model: Any, processor: Any, *, split: str = "test", scenes: int = 100) -> list[BudgetScore]:
    """As `evaluate_scenes`, at every number of visual tokens in BUDGETS."""
    rows = []
    for budget in BUDGETS:
        asked = {name: questions_of(name, split, scenes) for name in FAMILIES}
        by_family = [scores_of(model, with_budget(processor, budget), asked[name]) for name in asked if asked[name]]
        mean = np.mean([np.mean(scores) for scores in by_family])
        rows.append(BudgetScore(budget, sum(map(len, by_family)), float(mean), *bootstrap_interval(by_family)))
        print(f"  {budget:4d} visual tokens {mean:6.1%}", flush=True)
    return rows


def evaluate_wordings(model: Any, processor: Any, *, split: str = "test", scenes: int = 100) -> list[FamilyScore]:
    """The same questions in the scenes' words, in other trained and in held-out ones, and then what else people say.

    The first three rows are means over all questions of all families.
    """
    plain = [asked for name in FAMILIES for asked in questions_of(name, split, scenes)]
    drawn = [make_scene(split, index) for index in range(scenes)]
    kinds = {
        "the scenes' words": plain,
        "other words, trained": reworded(plain, held_out=False),
        "other words, held out": reworded(plain, held_out=True),
        "one of two pictures": [about_two(scene) for scene in drawn],
        "across two pictures": said_of(drawn, lambda scene, rng: across(beside(scene, 2), rng), pictures=2),
        "absent things": said_of(drawn, about_nothing),
        "greetings, held out": said_of(drawn, lambda scene, rng: greeting(rng, held_out=True)),
    }
    return [family_score(kind, "wordings", scores_of(model, processor, asked)) for kind, asked in kinds.items()]


def reworded(asked: Sequence[Asked], held_out: bool) -> list[Asked]:
    """The same questions in other words."""
    rng = np.random.default_rng(0)
    return [
        (scene, replace(question, question=in_other_words(question.question, rng, held_out)), shown)
        for scene, question, shown in asked
    ]


def said_of(
    scenes: Sequence[Scene], make: Callable[[Scene, np.random.Generator], tuple[str, str]], pictures: int = 1
) -> list[Asked]:
    """What `make` draws for each scene, shown with others up to a number of `pictures`."""
    return [
        (scene, Question("said", "wordings", *make(scene, scene_rng(*scene.seed_key, 1))), beside(scene, pictures))
        for scene in scenes
    ]


def about_two(scene: Scene) -> Asked:
    """A question about one of two pictures."""
    shown, rng = beside(scene, 2), scene_rng(*scene.seed_key, 2)
    number = int(rng.integers(2))
    question = ask(shown[number], *shown[number].seed_key, 1)[0]
    return scene, replace(question, question=about_one_of(number, question.question, rng)), shown


def questions_of(family: str, split: str, scenes: int) -> list[Asked]:
    """One question of the family about each of the first `scenes` scenes that allow it."""
    asked = []
    for index in range(scenes):
        scene = make_scene(split, index)
        if FAMILIES[family].questions(scene, scene_rng(split, index, 1)):
            asked.append((scene, ask(scene, split, index, 1, [family])[0], [scene]))
    return asked


def scores_of(
    model: Any, processor: Any, asked: Sequence[Asked], blind: bool = False, batch_size: int = 50
) -> list[float]:
    """The score of every answer, in [0, 1]."""
    model.eval()
    scores: list[float] = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        replies = answer(model, processor, [unanswered(*one, blind) for one in batch])
        scores += [score(question, reply) for (_, question, _), reply in zip(batch, replies, strict=True)]
    return scores


def family_score(family: str, group: str, scores: list[float]) -> FamilyScore:
    """The mean of scores with its interval, printed as it is known."""
    mean = float(np.mean(scores))
    print(f"  {family:22s} {mean:6.1%}", flush=True)
    return FamilyScore(family, group, len(scores), mean, *bootstrap_interval([scores]))


def unanswered(scene: Scene, question: Question, shown: Sequence[Scene], blind: bool) -> dict[str, Any]:
    """A record that ends with its question."""
    record = make_record(scene, [(question.question, "")], pictures=[other.image for other in shown], blind=blind)
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


def bootstrap_interval(
    families: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of the mean of the families' means, over questions resampled in each family."""
    rng = np.random.default_rng(seed)
    means = []
    for scores in map(np.asarray, families):
        means.append(scores[rng.integers(len(scores), size=(resamples, len(scores)))].mean(axis=1))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)
