"""The README: every line of it that can run is run, and its numbers are those of the training record."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from ms_resampler import TINY
from ms_resampler_cli.demo import loadable
from ms_resampler_cli.main import build_parser, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_runs_as_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    for block in blocks("python"):
        if "gradio_client" not in block:
            exec(compile(block, "README.md", "exec"), scope)
    answer, weights, shape = capsys.readouterr().out.splitlines()[:3]
    assert re.search(r"(left|right|top|bottom|centre): \w+ \w+", answer)
    assert set(eval(weights)) == {"local", "regional", "global"}
    assert shape == "torch.Size([3, 36, 144])"


@pytest.mark.slow
def test_the_program_asks_the_demo_as_printed(monkeypatch, capsys):
    import space_server
    from answering import load

    (block,) = [block for block in blocks("python") if "gradio_client" in block]
    assert "http://127.0.0.1:7860" in block
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    with loadable(TINY) as model:
        answerer = load(model)
        with space_server.served(answerer) as address:
            exec(compile(block.replace("http://127.0.0.1:7860", address), "README.md", "exec"), scope)
            scope["client"].close()
            *_, answer, maps = capsys.readouterr().out.splitlines()
    if answerer.model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        assert type(answerer.model.lm_head).__name__ == "PackedLinear"
    assert re.search(r"(left|right|top|bottom|centre): \w+ \w+", answer)
    assert maps == "['local', 'regional', 'global'] [6, 6]"


def test_the_chat_and_export_commands_run_as_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ms-resampler")]
    chat = next(shlex.split(line)[1:] for line in commands if " chat " in line)
    assert main(chat) == 0
    assert re.search(r"(left|right|top|bottom|centre): \w+ \w+", capsys.readouterr().out)
    export = next(shlex.split(line)[1:] for line in commands if " export " in line)
    monkeypatch.chdir(tmp_path)
    assert main(export) == 0
    assert (tmp_path / export[-1] / "modeling_ms_resampler.py").is_file()


def test_every_command_line_is_one_that_the_commands_take():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ms-resampler")]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        build_parser(words).parse_args(words)


def test_every_command_named_exists():
    for command in re.findall(r"^ms-resampler (\w+)", README, flags=re.MULTILINE):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_the_links_and_pictures_are_there():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_accuracy_is_that_of_the_embedded_checkpoint():
    card = (Path(TINY) / "README.md").read_text()
    table = re.search(r"^\| family \|.*?\*\*.*?$", card, flags=re.DOTALL | re.MULTILINE)[0]
    assert f"<!-- accuracy -->\n{table}\n<!-- /accuracy -->" in README


def test_the_differences_are_those_of_the_study():
    study = (ROOT / "docs" / "study.md").read_text()
    section_T = re.split(r"^## (?:\d+ tokens|Figures)$", study, flags=re.MULTILINE)[1:4]
    table = re.search(r"<!-- study -->\n(.*)<!-- /study -->", README, flags=re.DOTALL)[1]
    rows = re.findall(r"^\| (`.*?)\n", table, flags=re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        names, *cells = row.strip("| ").split(" | ")
        arms = re.findall(r"`(.+?)`", names)
        for cell, section in zip(cells, section_T, strict=True):
            found = [re.search(rf"^\| {arm} \| \d \| ([+-][\d.]+) ", section, flags=re.MULTILINE)[1] for arm in arms]
            assert cell == min(found, key=float) + " and more" * (len(arms) > 1), (arms, cell, found)
