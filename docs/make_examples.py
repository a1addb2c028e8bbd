"""Makes the Space's example pictures, with questions: scenes of the test split, never seen in training.

    python docs/make_examples.py

The notes on models in examples.json are written by hand, and kept.

The scenes were chosen for their looks before any model had answered them. The questions are of those families of
which the embedded checkpoint's card says that it does more than guess; whether it is right here decided nothing. To
play with there are the scenes PLAYED, with a question of every family that they allow.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ms_resampler.pictures.sources import Shelf
from ms_resampler.pictures.suite import PACKAGE_FOLDER
from ms_resampler.small.scenes import Painter, find_drawings
from ms_resampler.small.talk import phrase
from ms_resampler.tiny.scenes import FAMILIES, PLACES, Scene, ask, make_scene, scene_rng

FOLDER = Path(__file__).resolve().parent.parent / "space_app" / "examples"
# Scene number, question family, and which of the questions of that family.
CHOSEN = [
    (15, "read", 2),
    (144, "where", 1),
    (18, "relation", 1),
    (134, "count_colour", 3),
    (53, "majority", 3),
    (166, "describe", 0),
]
OPENING = 166  # the page opens with it
# For tiles: the first of nine scenes, then as above. Of twelve such questions the embedded model, which has not learned
# tiles, answers one rightly without them and four in nine tiles, this among them.
LARGE = (5001, "read", 0)
PLAYED = range(1000, 1040)
# For the small model: scene number, from FIRST on, in a style that it has not seen, the question, and its
# answer if there is only one way to put it.
FIRST = 2_000_000
CHOSEN_FOR_SMALL = [
    (1, "What is in the picture?", None),
    (17, "Is the tree above the rocket?", "yes"),
    (16, "How many ants are in the picture?", None),
    (37, "Where is the guitar?", None),
    (49, "Is there a dog in the picture?", "no"),
    (8, "Describe the picture.", None),
]


def draw(index: int) -> tuple[Scene, str]:
    """A scene, and the file in the folder that it is drawn into."""
    scene = make_scene("test", index)
    scene.image.save(FOLDER / f"scene_{index}.png", optimize=True)
    return scene, f"scene_{index}.png"


def make_example(index: int, family: str, number: int) -> dict[str, Any]:
    """A scene with one question and its answer."""
    return entry(*draw(index), family, number) | ({"opening": True} if index == OPENING else {})


def entry(scene: Scene, file: str, family: str, number: int) -> dict[str, Any]:
    """What the page shows of a scene: a question, its answer, and alternative text."""
    asked = ask(scene, "test", scene.seed_key[1], number + 1, [family])[number]
    things = ", ".join(f"{thing.colour} {thing.name} ({thing.place})" for thing in scene.things)
    return {"file": file, "question": asked.question, "alt": f"A drawn scene: {things}", "truth": asked.answer}


def make_large(index: int, family: str, number: int) -> dict[str, Any]:
    """Nine scenes of one thing each in a picture, at its nine places, with one question and its answer."""
    scenes = [make_scene("test", index + place, max_things=1) for place in range(len(PLACES))]
    side = scenes[0].image.width
    picture, things = Image.new("RGB", (3 * side, 3 * side)), []
    for place, scene in enumerate(scenes):
        left, top, (thing,) = place % 3 * side, place // 3 * side, scene.things
        picture.paste(scene.image, (left, top))
        box = (thing.box[0] + left, thing.box[1] + top, thing.box[2] + left, thing.box[3] + top)
        things.append(replace(thing, box=box, place=PLACES[place]))
    file = f"scene_{index}.png"
    picture.save(FOLDER / file, optimize=True)
    return entry(Scene(picture, tuple(things), ("test", index)), file, family, number)


def make_played(index: int) -> dict[str, Any]:
    """A scene with a question of each family, and the answers."""
    scene, file = draw(index)
    questions = [family.questions(scene, scene_rng("test", index, 1)) for family in FAMILIES.values()]
    return {"file": file, "asked": [[first.question, first.answer] for first, *_ in filter(None, questions)]}


def make_small_example(painter: Painter, number: int, question: str, truth: str | None) -> dict[str, Any]:
    """A scene of the small model, with its question."""
    scene = painter.scene(FIRST + number)
    name = f"things_{number}.png"
    scene.image.save(FOLDER / name, optimize=True)
    shown = {"file": name, "question": question, "alt": f"Drawings: {', '.join(phrase(noun) for noun in scene.nouns)}"}
    return shown | ({} if truth is None else {"truth": truth})


def main() -> None:
    for old in [*FOLDER.glob("scene_*.png"), *FOLDER.glob("things_*.png")]:
        old.unlink()
    file = FOLDER / "examples.json"
    painter = Painter(find_drawings(Shelf(PACKAGE_FOLDER), None)["test-style"], "test-style")
    for_small = [make_small_example(painter, *chosen) for chosen in CHOSEN_FOR_SMALL]
    examples = json.loads(file.read_text()) | {
        "scenes": [make_example(*chosen) for chosen in CHOSEN],
        "large": [make_large(*LARGE)],
        "scenes_of": {"small": for_small},
    }
    file.write_text(json.dumps(examples, indent=2) + "\n")
    played = ",\n".join(json.dumps(make_played(index)) for index in PLAYED)
    (FOLDER / "played.json").write_text(f"[\n{played}\n]\n")


if __name__ == "__main__":
    main()
