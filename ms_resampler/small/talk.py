"""Questions about scenes: conversations for the adapters, and suites for the evaluator."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.protocol import SHORT
from ..folders import whole_folder
from ..pictures.tasks import centre
from ..progress import progress
from .parts import things
from .scenes import Box, Painter, Scene

PLAIN = json.loads(Path(__file__).with_name("plain.json").read_text(encoding="utf-8"))
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PLURALS = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "fish": "fish", "leaf": "leaves",
           "knife": "knives", "person": "people", "tooth": "teeth", "wolf": "wolves", "ox": "oxen"}  # fmt: skip
CLEAR = 0.18  # of the picture's side: how far apart centres are that are asked about
TASKS = ("naming", "presence", "relations", "counting")
TURNS = 7  # of a conversation
FIRST_OF_TALK = 10**6  # number of the first scene to talk about: the words stage has not seen it


def phrase(noun: str, count: int = 1) -> str:
    """A noun with its article, or with a number: "an owl", "two owls"."""
    if count > 1:
        return f"{NUMBERS[count]} {plural(noun)}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a noun."""
    if noun in PLURALS or noun in ("scissors", "jeans", "glasses"):
        return PLURALS.get(noun, noun)
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"


def listed(parts: Sequence[str]) -> str:
    """A list in words: "a cat, two dogs and an owl"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def place(box: Box) -> str:
    """Where a thing is: "at the top left", "in the middle"."""
    x, y = centre(box)
    row = "" if 0.36 < y < 0.64 else "top" if y < 0.5 else "bottom"
    column = "" if 0.36 < x < 0.64 else "left" if x < 0.5 else "right"
    if not row:
        return f"on the {column}" if column else "in the middle"
    return f"at the {row} {column}".strip()


def in_order(scene: Scene) -> list[str]:
    """The different nouns of a scene in reading order: by thirds of the picture, then from left to right."""
    pairs = sorted(zip(scene.boxes, scene.nouns, strict=True), key=lambda pair: (int(3 * centre(pair[0])[1]), pair))
    return list(dict.fromkeys(noun for _, noun in pairs))


def absent(scene: Scene, rng: random.Random) -> str:
    """A noun that is not in the scene."""
    return rng.choice([noun for noun in things() if noun not in scene.nouns])


def ask_presence(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Up to two things that are there, and as many that are not, in random order."""
    present = rng.sample(sorted(set(scene.nouns)), min(2, len(set(scene.nouns))))
    pairs = [(noun, "yes") for noun in present] + [(absent(scene, rng), "no") for _ in present]
    rng.shuffle(pairs)
    return [(f"Is there {phrase(noun)} in the picture?", answer) for noun, answer in pairs]


def ask_naming(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """What the only thing is."""
    return [("What is shown in the picture?", scene.nouns[0])] if len(scene.nouns) == 1 else []


def ask_relations(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Whether one of two different things is left of, right of, above or below the other."""
    if len(scene.nouns) < 2 or len(set(scene.nouns)) < len(scene.nouns):
        return []
    one, two = rng.sample(range(len(scene.nouns)), 2)
    (x1, y1), (x2, y2) = centre(scene.boxes[one]), centre(scene.boxes[two])
    across = abs(x1 - x2) > abs(y1 - y2)
    if max(abs(x1 - x2), abs(y1 - y2)) < CLEAR:
        return []
    word = rng.choice(("left", "right") if across else ("above", "below"))
    truth = (x1 < x2 if across else y1 < y2) == (word in ("left", "above"))
    where = f"to the {word} of" if across else word
    return [(f"Is the {scene.nouns[one]} {where} the {scene.nouns[two]}?", "yes" if truth else "no")]


def ask_counting(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """How often the thing is there that is there most often."""
    noun, count = Counter(scene.nouns).most_common(1)[0]
    return [(f"How many {plural(noun)} are in the picture?", str(count))]


ASK = {"naming": ask_naming, "presence": ask_presence, "relations": ask_relations, "counting": ask_counting}


def conversation(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Questions and answers about a scene; short answers are asked for as the evaluator does.

    Questions name things, which answers later ones: mostly those after presence come first, and then what is there.
    """
    short = {
        name: [(SHORT.format(question=question), answer) for question, answer in make(scene, rng)]
        for name, make in ASK.items()
    }
    whole = [*short["naming"], ask_for_all(scene, rng)]
    rng.shuffle(whole)
    blocks = [short["presence"], whole]
    if rng.random() < 0.3:
        blocks.reverse()
    rest = [*short["relations"], *short["counting"], *ask_places(scene, rng), *ask_can_you_see(scene, rng)]
    rng.shuffle(rest)
    return [*blocks[0], *blocks[1], *rest][:TURNS]


def ask_for_all(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """What the picture shows, in one of three forms."""
    counts = Counter(scene.nouns)
    whole = listed([phrase(noun, counts[noun]) for noun in in_order(scene)])
    forms = [
        ("What is in the picture?", f"{whole[0].upper()}{whole[1:]}."),
        ("What can you see?", f"I can see {whole}."),
        ("Describe the picture.", described(scene)),
    ]
    return rng.choice(forms)


def ask_places(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Where a thing is and which is largest, if no thing is there twice."""
    if len(set(scene.nouns)) < len(scene.nouns):
        return []
    number = rng.randrange(len(scene.nouns))
    turns = [(f"Where is the {scene.nouns[number]}?", f"It is {place(scene.boxes[number])}.")]
    sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in scene.boxes]
    if len(sizes) > 1 and max(sizes) > 1.3 * sorted(sizes)[-2]:
        turns.append(("What is the largest thing in the picture?", f"The {scene.nouns[sizes.index(max(sizes))]}."))
    return turns


def ask_can_you_see(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """A thing that is there or one that is not, answered in a sentence."""
    noun = absent(scene, rng) if rng.random() < 0.5 else rng.choice(scene.nouns)
    count = scene.nouns.count(noun)
    found = f"Yes, there {'is' if count == 1 else 'are'} {phrase(noun, count)}." if count else ""
    return [(f"Can you see {phrase(noun)}?", found or f"No, I cannot see {phrase(noun)}.")]


def described(scene: Scene) -> str:
    """A sentence with every thing and, if there are several different ones, its place."""
    counts, nouns = Counter(scene.nouns), in_order(scene)
    if len(nouns) < len(scene.nouns) or len(nouns) == 1:
        return f"The picture shows {listed([phrase(noun, counts[noun]) for noun in nouns])}."
    places = {noun: place(box) for noun, box in zip(scene.nouns, scene.boxes, strict=True)}
    return f"The picture shows {listed([f'{phrase(noun)} {places[noun]}' for noun in nouns])}."


def write_conversations(folder: Path, painter: Painter, count: int, plain: Sequence[tuple[str, str]]) -> Path:
    """Conversations about `count` scenes in LLaVA's format, with plain ones among them; returns the file."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    with progress(total=count, desc="conversations", unit="scene") as done:
        for number in range(count):
            rng, scene = random.Random(f"talk {number}"), painter.scene(FIRST_OF_TALK + number)
            name = f"pictures/{number:05}.jpg"
            scene.image.save(folder / name, quality=95, subsampling=0)
            turns = [text for turn in conversation(scene, rng) for text in turn]
            said = as_llava([f"<image>\n{turns[0]}", *turns[1:]])
            records.append({"id": str(number), "image": name, "conversations": said})
            done.update()
    for number, pair in enumerate(plain):
        records.append({"id": f"plain {number}", "conversations": as_llava(pair)})
    path = folder / "train.json"
    path.write_text(json.dumps(records, indent=0, ensure_ascii=False), encoding="utf-8")
    return path


def as_llava(turns: Sequence[str]) -> list[dict[str, str]]:
    """Turns of person and model, one after the other, in LLaVA's format."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


def write_suite(folder: Path, painter: Painter, questions: int) -> None:
    """A suite for the evaluator with so many questions of each of TASKS."""
    with whole_folder(folder) as partial:
        (partial / "pictures").mkdir()
        for task in TASKS:
            lines = list(suite_lines(partial, painter, task, questions))
            (partial / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def suite_lines(folder: Path, painter: Painter, task: str, questions: int) -> Iterator[dict[str, Any]]:
    """A task's questions, one a line; writes their pictures."""
    kinds = {"naming": "open", "counting": "number"}
    number = done = 0
    while done < questions:
        scene, rng = painter.scene(number), random.Random(f"{task} {number}")
        if task == "counting" and len(set(scene.nouns)) == len(scene.nouns) and rng.random() < 0.85:
            number += 1  # few questions whose answer is one
            continue
        name = f"pictures/{number:05}.png"
        for question, answer in ASK[task](scene, rng)[: questions - done]:
            if not (folder / name).is_file():
                scene.image.save(folder / name)
            meta = {"things": "one" if len(scene.nouns) == 1 else "several"}
            yield {"id": f"{task}-{done}", "image": name, "question": question, "answer": answer,
                   "kind": kinds.get(task, "yes/no"), "meta": meta}  # fmt: skip
            done += 1
        number += 1
