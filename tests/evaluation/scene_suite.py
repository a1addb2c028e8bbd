"""The drawn scenes as a suite, and the embedded model asked in the words that it knows."""

import json
import shutil
from pathlib import Path

from ms_resampler import TINY
from ms_resampler.tiny.scenes import ask, make_scene

KINDS = {"presence": "yes/no", "count": "number", "colour": "open"}


def make_scene_suite(folder: Path, scenes: int) -> Path:
    """A file of one question of every family about each scene that has one."""
    lines = []
    (folder / "pictures").mkdir(parents=True)
    for index in range(scenes):
        scene = make_scene("test", index)
        scene.image.save(folder / f"pictures/{index}.png")
        for question in ask(scene, "test", index, 3, ["presence", "count", "colour"]):
            kind = KINDS[question.family]
            about = {"id": f"{len(lines)}", "image": f"pictures/{index}.png", "question": question.question}
            lines.append(about | {"answer": question.answer, "kind": kind, "meta": {"family": question.family}})
    path = folder / "scenes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scene_model(folder: Path) -> str:
    """The embedded checkpoint, which carries a prompt of its own for the scenes: the bare question."""
    shutil.copytree(TINY, folder)
    (folder / "evaluation_prompts.json").write_text(json.dumps({"scenes": "{question}", "pope": "{question}"}))
    return str(folder)
