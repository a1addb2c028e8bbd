"""Intervals, paired differences and corrections; the tables, the figure and the card's metadata made of runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ms_resampler.evaluation import TASKS, Options, evaluate, figure, model_index, report
from ms_resampler.evaluation.aggregation import mean_of_scores
from ms_resampler.evaluation.published import comparable_rows, published_rows
from ms_resampler.evaluation.report import Run, published_points
from ms_resampler.evaluation.samples import Outcome, Picture, Sample, Scored
from ms_resampler.evaluation.statistics import compare, holm, interval
from ms_resampler_cli import main as cli

MEAN = mean_of_scores()


def scored(scores, questions_per_picture=1):
    return [
        Scored(
            Sample(str(n), {}, (Picture(str(n // questions_per_picture), str),), "yes"),
            "",
            Outcome(float(score), "yes"),
        )
        for n, score in enumerate(scores)
    ]


def test_the_interval_is_that_of_the_binomial_distribution():
    scores = np.random.default_rng(0).random(1000) < 0.7
    low, high = interval(MEAN, scored(scores))
    error = 100 * 1.96 * np.sqrt(scores.mean() * (1 - scores.mean()) / 1000)
    assert low == pytest.approx(100 * scores.mean() - error, abs=0.3)
    assert high == pytest.approx(100 * scores.mean() + error, abs=0.3)


def test_pictures_are_drawn_and_not_questions():
    """Ten questions with one fate make one observation: the interval is wider by the square root of ten."""
    pictures = np.random.default_rng(0).random(200) < 0.5
    scores = np.repeat(pictures, 10)
    together, apart = (np.diff(interval(MEAN, scored(scores, per)))[0] for per in (10, 1))
    assert together / apart == pytest.approx(np.sqrt(10), rel=0.1)


def test_a_paired_difference_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    first = rng.random(500) < 0.6
    second = np.where(rng.random(500) < 0.05, True, first)  # better in a few places, never worse
    found = compare(MEAN, scored(first), scored(second))
    assert found.value == pytest.approx(100 * (second.mean() - first.mean()))
    assert 0 < found.low < found.value < found.high
    assert found.p < 0.001
    low, high = interval(MEAN, scored(first))
    assert found.high - found.low < (high - low) / 2
    same = compare(MEAN, scored(first), scored(first))
    assert (same.value, same.p) == (0, 1)


def test_the_paired_test_holds_its_level():
    """Of pairs that differ by chance alone, one in twenty is found at 5%."""
    rng = np.random.default_rng(0)
    p_values = [
        compare(MEAN, scored(rng.random(60) < 0.5), scored(rng.random(60) < 0.5), seed).p for seed in range(200)
    ]
    assert 0.01 < np.mean(np.array(p_values) <= 0.05) < 0.1


def test_only_shared_samples_are_compared():
    first, second = scored([1, 1, 0, 1]), scored([0, 0, 0, 0])[1:]
    found = compare(MEAN, first, second)
    assert (found.value, found.samples) == (pytest.approx(-200 / 3), 3)
    with pytest.raises(ValueError, match="no sample in common"):
        compare(MEAN, first[:1], second)


def test_a_difference_without_a_number_is_not_significant():
    """F1 of no positives is no number."""
    pope = TASKS["pope"]
    samples = [Sample(str(n), {}, (Picture(str(n), str),), "no", meta={"category": "random"}) for n in range(4)]
    answered = [Scored(sample, "no", pope.score(sample, "no")) for sample in samples]
    found = compare(pope.aggregation, answered, answered)
    assert np.isnan([found.value, found.low, found.high]).all()
    assert found.p == 1


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


class Guessing:
    """Answers yes to a share of the questions."""

    def __init__(self, share, tokens):
        self.rng, self.share, self.tokens = np.random.default_rng(1), share, tokens

    def encode(self, pictures):
        return list(pictures)

    def answer(self, prompts, pictures, max_new_tokens):
        return ["yes" if self.rng.random() < self.share else "no" for _ in prompts]

    def visual_tokens(self, encoded):
        return self.tokens


@pytest.fixture
def runs(tmp_path):
    """Two runs of a suite with two tasks, where yes is always right."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for name in ("presence", "cards"):
        lines = [
            {"id": n, "image": "a.png" if n % 2 else [], "question": f"{n}?", "answer": "yes", "kind": "yes/no"}
            for n in range(60)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, share, tokens in (("small", 0.5, 9), ("large", 0.95, 144)):
        evaluate(Guessing(share, tokens), [tmp_path], tmp_path / "runs" / name, Options())
    return [tmp_path / "runs" / name for name in ("small", "large")]


def test_the_report_joins_runs_and_pairs_them(runs):
    text = report(runs)
    header, small, large = text.splitlines()[:3]
    assert header.split()[:3] == ["tokens", "cards", "presence"]
    assert (small.split()[:2], large.split()[:2]) == (["small", "9"], ["large", "144"])
    assert "large - small" in text
    assert "p (Holm)" in text
    assert "TokenPacker" not in text  # published rows have none of these tasks
    differences = [line.split() for line in text.splitlines() if line.startswith(("cards", "presence"))]
    assert all(float(difference[1]) > 20 and float(difference[5]) < 0.01 for difference in differences)


def test_markdown_has_as_many_cells_in_every_row(runs):
    tables = report(runs, markdown=True).split("\n\n")[:2]
    for text in tables:
        assert len({line.count("|") for line in text.splitlines()}) == 1
        assert set(text.splitlines()[1]) <= set("| -")


def test_the_figure_and_the_model_index(runs, tmp_path, capsys):
    figure(runs, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1350, 600)
        assert len(set(image.convert("L").get_flattened_data())) > 20
    entries = yaml.safe_load(model_index(runs[1], "ours"))["model-index"]
    results = {result["dataset"]["name"]: result["metrics"][0]["value"] for result in entries[0]["results"]}
    summary = json.loads((runs[1] / "summary.json").read_text())["tasks"]
    assert results == {name: summary[name]["value"] for name in ("cards", "presence")}
    assert cli.main(["evaluate", "--report", *map(str, runs)]) == 0
    assert capsys.readouterr().out == report(runs) + "\n"
    assert cli.main(["evaluate", "--report", str(tmp_path)]) == 2
    assert "not the folder of a finished evaluation" in capsys.readouterr().err


def test_published_rows_are_drawn_where_they_have_all_the_tasks():
    part = {"title": "POPE", "scale": 100, "value": 80.0}
    pope = Run(Path("x"), {"tasks": {"pope": part}})
    points = {(budget, name): score for budget, score, name in published_points([pope])}
    assert points[36, "TokenPacker"] == 86.2
    both = Run(Path("x"), {"tasks": {"pope": part, "mme": {"title": "MME-P", "scale": 2000, "value": 1000.0}}})
    points = {(budget, name): score for budget, score, name in published_points([both])}
    assert points[36, "MQT-LLaVA"] == pytest.approx((81.9 + 1416.3 / 20) / 2)
    assert (36, "TokenPacker") not in points  # prints no number for MME
    assert published_points([Run(Path("x"), {"tasks": {}})]) == []


def test_published_rows_have_sources_and_numbers():
    rows = published_rows()
    assert len(rows) > 40
    assert all(row.source and row.budget for row in rows)
    first = rows[0]
    assert (first.numbers["VQAv2"], first.numbers["MME-P"], first.budget) == ("78.5", "1510.7", 576)
    assert {row.budget for row in comparable_rows(150)} == {144, 576}
    assert {row.budget for row in comparable_rows(None)} == {576}
