"""The model card: made of configuration, weights and results, and held against them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_models import save_tiny, tiny_model

from ms_resampler import TINY
from ms_resampler.hub_upload.card import render_card
from ms_resampler_cli.main import main

RECORD = json.loads(Path(TINY, "training_record.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded checkpoint's small files, and a link to its weights."""
    folder = Path(shutil.copytree(TINY, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors")))
    (folder / "model.safetensors").symlink_to(Path(TINY, "model.safetensors"))
    return folder


def card(folder):
    return (folder / "README.md").read_text()


def test_the_card_of_the_embedded_checkpoint_agrees_with_its_results(capsys):
    assert main(["card", "--check", TINY]) == 0
    assert capsys.readouterr().out.endswith("README.md agrees with the results.\n")


def test_its_metadata_is_complete(folder):
    data = ModelCard.load(folder / "README.md").data
    expected = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": "apache-2.0"}
    assert expected.items() <= data.to_dict().items()
    assert {"custom_code", "ms_resampler"} <= set(data.tags)
    assert data.model_name == "MS-Resampler tiny"
    assert [(row.dataset_config, row.metric_value) for row in data.eval_results] == [
        (row["family"], round(row["mean"], 4)) for row in RECORD["scores"]
    ]


def test_its_numbers_are_those_of_record_and_weights():
    text = card(Path(TINY))
    millions = {name: f"{count / 1e6:.1f} million" for name, count in RECORD["parameters"].items()}
    assert f"{sum(RECORD['parameters'].values()) / 1e6:.1f} million parameters" in text
    for part in millions.values():
        assert part in text
    for row in RECORD["scores"]:
        interval = f"{100 * row['low']:.1f}% to {100 * row['high']:.1f}%"
        cells = f"| {row['family']} | {row['group']} | {row['questions']} | {100 * row['mean']:.1f}% | {interval} |"
        assert cells in text
    for stage in RECORD["stages"]:
        assert f"| {stage['name']} | {stage['steps']:,} | {stage['batch_size']} |" in text


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("| 92.1% |", "| 99.5% |", r"says '\| read \| .*99\.5%.*, where the results say '\| read .*92\.1%"),
        ("value: 0.9771", "value: 0.99", r"says 'value: 0\.99', where the results say 'value: 0\.9771'"),
        ("5.6 million", "7 million", r"7 million"),
        ("| 800 |", "| 24,000 |", r"24,000"),
    ],
)
def test_a_number_that_was_typed_is_found(old, new, line, folder, capsys):
    (folder / "README.md").write_text(card(folder).replace(old, new))
    assert main(["card", "--check", str(folder)]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"README\.md, line \d+, {line}" if "says" in line else line, said)
    assert said.count("\n") == 1
    assert main(["card", str(folder)]) == 0
    assert card(folder) == card(Path(TINY))


def test_new_results_make_an_old_card_wrong(folder):
    record = json.loads(json.dumps(RECORD))
    record["scores"][0] |= {"mean": 0.5, "low": 0.4, "high": 0.6}
    (folder / "training_record.json").write_text(json.dumps(record))
    assert main(["card", "--check", str(folder)]) == 2
    assert main(["card", str(folder)]) == 0
    assert "| read | local | 353 | 50.0% | 40.0% to 60.0% |" in card(folder)


def test_scores_by_tokens_and_wording_are_shown_where_recorded(folder):
    titles = "By number of visual tokens", "By the way of asking", "The demo puts a note"
    told = "budget_scores", "wording_scores", "known_inputs"
    untold = {name: value for name, value in RECORD.items() if name not in told}
    (folder / "training_record.json").write_text(json.dumps(untold))
    assert main(["card", str(folder)]) == 0
    assert not any(title in card(folder) for title in titles)
    row = {"questions": 1100, "mean": 0.864, "low": 0.84, "high": 0.88}
    record = RECORD | {
        "budget_scores": [{"visual_tokens": 9, **row}],
        "wording_scores": [{"family": "held out", "group": "wordings", **row}],
        "known_inputs": {"measured": [{"what": "photographs", "count": 200, "flagged": 0.925}]},
    }
    (folder / "training_record.json").write_text(json.dumps(record))
    assert main(["card", str(folder)]) == 0
    assert "| 9 | 1100 | 86.4% | 84.0% to 88.0% |" in card(folder)
    assert "| held out | 1100 | 86.4% | 84.0% to 88.0% |" in card(folder)
    assert "on\n92.5% of 200 photographs.\n" in card(folder)
    assert all(title in card(folder) for title in titles)


def test_what_the_publisher_has_written_stays(folder):
    text = card(folder).replace("<!-- notes -->\n", "<!-- notes -->\n## Ours\n\nTwo\nlines.\n")
    (folder / "README.md").write_text(text.replace("# MS-Resampler tiny", "# My model"))
    arguments = ["--license", "mit", "--base-model", "a/b", "--base-model", "c/d", "--dataset", "e/f"]
    assert main(["card", str(folder), *arguments]) == 0
    assert main(["card", str(folder)]) == 0
    assert main(["card", "--check", str(folder)]) == 0
    data, text = ModelCard.load(folder / "README.md").data, card(folder)
    assert (data.license, data.base_model, data.datasets) == ("mit", ["a/b", "c/d"], ["e/f"])
    assert data.model_name == "My model"
    assert "# My model\n" in text
    assert "## Ours\n\nTwo\nlines.\n" in text
    assert "parameters on a/b and c/d:" in text


def test_a_card_of_another_origin_is_not_lost(folder, capsys):
    (folder / "README.md").write_text("# By hand\n")
    for arguments in ([], ["--check"]):
        assert main(["card", str(folder), *arguments]) == 2
        assert "was not made by `ms-resampler card`" in capsys.readouterr().err
    assert card(folder) == "# By hand\n"
    (folder / "README.md").unlink()
    assert main(["card", str(folder), "--check"]) == 2
    assert "has no README.md: make it with" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["ms_resampler", "resampler", "mlp", "q_former"])
def test_without_results_it_says_so(kind, tmp_path):
    scopes = {"scope_sigmas": [None]} if kind == "resampler" else {}
    grid = {"visual_tokens": [6, 6]} if kind == "mlp" else {}
    save_tiny(tmp_path, projector={"projector_type": kind, **scopes, **grid})
    text = render_card(tmp_path, "A model")
    assert "No results are stored with this checkpoint." in text
    assert "No record of its training is stored with this checkpoint." in text
    assert "license: unknown\n" in text
    assert "model-index" not in text
    assert ("resamplers side by side" in text) == (kind == "ms_resampler")
    assert ("(Li et al., 2023)" in text) == (kind == "q_former")
    assert f"{36 if kind == 'mlp' else 4} visual tokens" in text


def test_a_recipe_s_record_becomes_a_stage(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    recipe = {"name": "align", "batch_size": 256, "seed": 3, "rates": {"tower": None, "projector": 0.001, "llm": 2e-5}}
    run = {"steps": 2180, "last_session_seconds": 5400, "data": {"sha256": "ab" * 32}, "versions": {"torch": "2.13"}}
    (tmp_path / "training_record.json").write_text(json.dumps({"recipe": recipe, **run}))
    text = render_card(tmp_path)
    assert "| align | 2,180 | 256 | projector 0.001, llm 2e-05 | 3 | 1.50 | abababababab |" in text
    assert "With torch 2.13;" in text
