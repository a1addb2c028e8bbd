"""Makes the Space's example pictures, with a question each: scenes of the test split, never seen in training.

    python docs/make_examples.py

The notes on models in examples.json are written by hand, and kept.

The scenes were chosen for their looks before any model had answered them. The questions are of those families of
which the embedded checkpoint's card says that it does more than guess; whether it is right here decided nothing.
"""

import json
from pathlib import Path

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


def make_example(index: int, family: str, number: int) -> dict[str, str]:
    """Draws a scene into the folder; returns its file, question and alternative text."""
    scene = make_scene("test", index)
    name = f"scene_{index}.png"
    scene.image.save(FOLDER / name, optimize=True)
    question = ask(scene, "test", index, number + 1, [family])[number].question
    things = ", ".join(f"{thing.colour} {thing.name} ({thing.place})" for thing in scene.things)
    return {"file": name, "question": question, "alt": f"A drawn scene: {things}"}


def main() -> None:
    for old in FOLDER.glob("scene_*.png"):
        old.unlink()
    file = FOLDER / "examples.json"
    examples = json.loads(file.read_text()) | {"scenes": [make_example(*chosen) for chosen in CHOSEN]}
    file.write_text(json.dumps(examples, indent=2) + "\n")


if __name__ == "__main__":
    main()
