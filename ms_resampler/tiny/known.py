"""What a checkpoint knows: its demo says so at an answer about a picture or in a wording that is foreign to it.

A picture is foreign if the tower's features of it are far from those of the training pictures; a question, if its
longest sentence has many words that no training question has. The demo repeats `distances` and `unknown_words`, because
it imports nothing of this package.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ..folders import KNOWN
from .scenes import FAMILIES, ask, make_scene
from .wordings import in_other_words

PICTURES, NEIGHBOURS = 400, 5
CUT_OUTS = 100  # of each photograph
CONVERSATIONS = 1500  # of the training data, whose words are taken for known
# Shares of held-out pictures and wordings that the thresholds let pass.
PASSED_PICTURES, PASSED_WORDINGS = 0.99, 0.985
ENDINGS = ("", "s", "es", "d", "ed", "n", "ing")  # of words that are known with them if they are without
SHORTENED = re.compile(r"(?:n['’]t|['’](?:s|re|d|ll|m|ve))\b")
SAMPLES = ["What is in the picture?", "How many things are there?", "Which colour is most common?"]
PLAIN = Path(__file__).resolve().parent.parent / "small" / "plain.json"


def known_inputs(model: Any, processor: Any, trained_on: Dataset, folder: Path) -> dict[str, Any]:
    """Writes the features of training pictures into a folder, and returns the record's entry.

    The entry has the thresholds, the known words, questions that can be answered, and how much of what is known and of
    what is foreign was flagged.
    """
    model.eval()
    familiar = {split: features(model, processor, scenes(split)) for split in ("train", "validation", "test")}
    fit_pictures(familiar["train"], folder / KNOWN)
    tensors = load_file(folder / KNOWN)
    farthest = quantile(distances(familiar["validation"], tensors), PASSED_PICTURES)
    words = known_words(trained_on)
    most = quantile(shares(held_out_questions("validation"), words), PASSED_WORDINGS)

    def measure(what: str, found: Sequence[float], threshold: float) -> dict[str, Any]:
        return {"what": what, "count": len(found), "flagged": float(np.mean(np.asarray(found) > threshold))}

    cut_outs = distances(features(model, processor, photograph_cut_outs()), tensors)
    return {
        "distance": farthest,
        "unknown_share": most,
        "words": " ".join(sorted(words)),
        "questions": SAMPLES,
        "measured": [
            measure("scenes of the test", distances(familiar["test"], tensors), farthest),
            measure("cut-outs of photographs", cut_outs, farthest),
            measure("held-out questions about scenes", shares(held_out_questions("test"), words), most),
            measure("questions of general knowledge", shares(plain_questions(), words), most),
        ],
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them do not exceed."""
    return float(np.quantile(values, share, method="inverted_cdf"))


# --- Pictures ---------------------------------------------------------------------------------------------------


def scenes(split: str) -> list[Image.Image]:
    """The first pictures of a split."""
    return [make_scene(split, index).image for index in range(PICTURES)]


def photograph_cut_outs() -> list[Image.Image]:
    """Random squares of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    rng, squares = np.random.default_rng(0), []
    for photograph in map(Image.fromarray, load_sample_images().images):
        for _ in range(CUT_OUTS):
            side = int(rng.integers(96, min(photograph.size)))
            left, top = (int(rng.integers(length - side + 1)) for length in photograph.size)
            squares.append(photograph.crop((left, top, left + side, top + side)))
    return squares


@torch.inference_mode()
def features(model: Any, processor: Any, pictures: Sequence[Image.Image], batch_size: int = 50) -> Tensor:
    """Mean and standard deviation over the patches of each picture, in the tower's last map (B, 2 C)."""
    rows = []
    for start in range(0, len(pictures), batch_size):
        inputs = processor.image_processor(list(pictures[start : start + batch_size]), return_tensors="pt")
        pixels = inputs["pixel_values"].to(model.device, model.dtype)
        x_BCHW = model.get_image_features(pixels, return_dict=True).last_hidden_state.float().cpu()
        rows.append(torch.cat([x_BCHW.mean(dim=(2, 3)), x_BCHW.std(dim=(2, 3))], dim=-1))
    return torch.cat(rows)


def fit_pictures(x_BF: Tensor, path: Path) -> None:
    """Writes the features of training pictures, standardised, with their mean and standard deviation."""
    mean_F, std_F = x_BF.mean(dim=0), x_BF.std(dim=0).clamp(min=1e-6)
    save_file({"features": ((x_BF - mean_F) / std_F).half(), "mean": mean_F, "std": std_F}, path)


def distances(x_BF: Tensor, known: dict[str, Tensor]) -> list[float]:
    """Of each picture, the mean distance to its nearest training pictures."""
    away = torch.cdist((x_BF - known["mean"]) / known["std"], known["features"].float())
    return away.topk(NEIGHBOURS, largest=False).values.mean(dim=-1).tolist()


# --- Words ------------------------------------------------------------------------------------------------------


def known_words(trained_on: Dataset) -> set[str]:
    """The words of training questions, and those without which hardly any English sentence does."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    count = len(trained_on)  # type: ignore[arg-type]
    asked = (
        turn["value"].replace("<image>", "")
        for index in range(0, count, max(1, count // CONVERSATIONS))
        for turn in trained_on[index]["conversations"]
        if turn["from"] == "human"
    )
    return {word for question in asked for word in re.findall(r"\w+", question.lower())} | ENGLISH_STOP_WORDS


def held_out_questions(split: str) -> list[str]:
    """Questions about the first scenes of a split, half of them in other words than any of the training."""
    rng = np.random.default_rng(0)
    asked = (ask(make_scene(split, index), split, index, len(FAMILIES)) for index in range(PICTURES // 4))
    return [
        question.question if rng.random() < 0.5 else in_other_words(question.question, rng, held_out=True)
        for questions in asked
        for question in questions
    ]


def plain_questions() -> list[str]:
    """Questions that no picture answers."""
    return [question for question, _ in json.loads(PLAIN.read_text(encoding="utf-8"))["test"]]


def shares(questions: Sequence[str], known: Collection[str]) -> list[float]:
    """Of each question, the share of unknown words in its longest sentence."""
    found = (unknown_words(question, known) for question in questions)
    return [len(unknown) / max(1, count) for unknown, count in found]


def unknown_words(question: str, known: Collection[str]) -> tuple[list[str], int]:
    """The unknown words of a question's longest sentence, the last of several, and the number of all its words.

    What leads in to a question, up to a colon, does not count.
    """
    asked = SHORTENED.sub("", question.rpartition(":")[2] if re.search(r":.*\w", question) else question)
    words = max(reversed([re.findall(r"\w+", sentence) for sentence in re.split(r"[.!?]", asked)]), key=len)
    return [word for word in words if not any(word.lower().removesuffix(end) in known for end in ENDINGS)], len(words)
