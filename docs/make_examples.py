"""Makes the Space's example pictures, with a question each: scenes of the test split, never seen in training.

    python docs/make_examples.py

The notes on models in examples.json are written by hand, and kept.

The scenes were chosen for their looks before any model had answered them. The questions are of those families of
which the embedded checkpoint's card says that it does more than guess; whether it is right here decided nothing.
"""

import json
from pathlib import Path

from ms_resampler.pictures.sources import Shelf
from ms_resampler.pictures.suite import PACKAGE_FOLDER
from ms_resampler.small.scenes import Painter, find_drawings
from ms_resampler.small.talk import phrase
from ms_resampler.tiny.scenes import ask, make_scene

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
# For the small model: scene number, from FIRST on, in a style that it has not seen, and the question.
FIRST = 2_000_000
CHOSEN_FOR_SMALL = [
    (1, "What is in the picture?"),
    (17, "Is the tree above the rocket?"),
    (16, "How many ants are in the picture?"),
    (37, "Where is the guitar?"),
    (49, "Is there a dog in the picture?"),
    (8, "Describe the picture."),
]


def make_example(index: int, family: str, number: int) -> dict[str, str]:
    """Draws a scene into the folder; returns its file, question and alternative text."""
    scene = make_scene("test", index)
    name = f"scene_{index}.png"
    scene.image.save(FOLDER / name, optimize=True)
    question = ask(scene, "test", index, number + 1, [family])[number].question
    things = ", ".join(f"{thing.colour} {thing.name} ({thing.place})" for thing in scene.things)
    return {"file": name, "question": question, "alt": f"A drawn scene: {things}"}


def make_small_example(painter: Painter, number: int, question: str) -> dict[str, str]:
    """The same for the small model."""
    scene = painter.scene(FIRST + number)
    name = f"things_{number}.png"
    scene.image.save(FOLDER / name, optimize=True)
    return {"file": name, "question": question, "alt": f"Drawings: {', '.join(phrase(noun) for noun in scene.nouns)}"}


def main() -> None:
    for old in [*FOLDER.glob("scene_*.png"), *FOLDER.glob("things_*.png")]:
        old.unlink()
    file = FOLDER / "examples.json"
    painter = Painter(find_drawings(Shelf(PACKAGE_FOLDER), None)["test-style"], "test-style")
    for_small = [make_small_example(painter, *chosen) for chosen in CHOSEN_FOR_SMALL]
    examples = json.loads(file.read_text()) | {
        "scenes": [make_example(*chosen) for chosen in CHOSEN],
        "scenes_of": {"small": for_small},
    }
    file.write_text(json.dumps(examples, indent=2) + "\n")


if __name__ == "__main__":
    main()
