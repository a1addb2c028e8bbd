"""Makes the Space's example pictures, with a question each: scenes of the test split, never seen in training.

    python docs/make_examples.py

The scenes were chosen for their looks before any model had answered them. The questions are of those families of
which the embedded checkpoint's card says that it does more than guess; whether it is right here decided nothing.
"""

import json
from pathlib import Path

from ms_resampler.training.scenes import ask, make_scene

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
NOTE = (
    "The model that answers here is small and was trained on drawn scenes only. It reads digits and words, names "
    "colours and shapes, finds things and says how they lie to each other, counts, and describes a scene; it mostly "
    "guesses which thing has another's colour. Of photographs it knows nothing."
)


def make_example(index: int, family: str, number: int) -> dict[str, str]:
    """Draws a scene into the folder; returns its file, question and alternative text."""
    scene = make_scene("test", index)
    name = f"scene_{index}.png"
    scene.image.save(FOLDER / name, optimize=True)
    question = ask(scene, "test", index, number + 1, [family])[number].question
    things = ", ".join(f"{thing.colour} {thing.name} ({thing.place})" for thing in scene.things)
    return {"file": name, "question": question, "alt": f"A drawn scene: {things}"}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("scene_*.png"):
        old.unlink()
    examples = {"note": NOTE, "scenes": [make_example(*chosen) for chosen in CHOSEN]}
    (FOLDER / "examples.json").write_text(json.dumps(examples, indent=2) + "\n")


if __name__ == "__main__":
    main()
