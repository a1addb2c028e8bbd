"""README, docs/python.md and docs/space.md: what can run is run, and the numbers are those of the study."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from components import save_llm
from picture_packages import make_packages
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import ms_resampler
from ms_resampler import FUNCTIONS, TINY, demo
from ms_resampler.demo import loadable
from ms_resampler_cli.main import build_parser, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()
SPACE = (ROOT / "docs" / "space.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_the_python_runs_as_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
    answer, weights, shape = capsys.readouterr().out.splitlines()[:3]
    assert re.search(r"(left|right|top|bottom|centre): \w+ \w+", answer)
    assert set(eval(weights)) == {"local", "regional", "global"}
    assert shape == "torch.Size([3, 36, 144])"


def save_models(tower: Path, llm: Path, llava: Path) -> None:
    """Small models with as many patches as the real ones that a page names."""
    vision = tiny_models.tower_config(image_size=96)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    CLIPVisionModel(vision).save_pretrained(tower)
    image_processor.save_pretrained(tower)
    save_llm(llm)
    text = tiny_models.text_config("llama", max_position_embeddings=1024)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=tiny_models.IMAGE)
    LlavaForConditionalGeneration(config).save_pretrained(llava)
    processor = LlavaProcessor(image_processor, tiny_models.tiny_tokenizer(), 4, "default", tiny_models.CHAT_TEMPLATE)
    processor.num_additional_image_tokens = 1
    processor.save_pretrained(llava)


class App:
    """Stands for the process of the page, which ends at once."""

    def __init__(self, command, env):
        self.compared = env["COMPARE_MODEL_ID"]
        assert (Path(self.compared) / "modeling_ms_resampler.py").is_file()

    def wait(self):
        return 0

    terminate = wait


def test_the_page_on_python_runs_as_printed(monkeypatch, capsys, tmp_path):
    """Where the real models are named, small ones lie in folders of these names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "space_app" / "examples", "space_app/examples")
    save_models(
        tmp_path / "openai/clip-vit-large-patch14-336",
        tmp_path / "Qwen/Qwen2.5-7B-Instruct",
        tmp_path / "llava-hf/llava-1.5-7b-hf",
    )
    monkeypatch.setattr(demo, "check_port", lambda host, port: None)
    monkeypatch.setattr(demo.subprocess, "Popen", App)
    scope: dict = {}
    for block in blocks("python", PYTHON.partition("\n## Train\n")[0]):
        exec(compile(block, "python.md", "exec"), scope)
    answer, tokens, weights, *notes, written, close = capsys.readouterr().out.splitlines()
    assert re.search(r"(left|right|top|bottom|centre): \w+ \w+", answer)
    assert tokens == "[36]"
    assert set(eval(weights)) == {"local", "regional", "global"}
    assert notes[-1] == "Visual tokens: 12 x 12 = 144 of 24 x 24 patches."
    assert written.endswith("MB written.")
    assert close == "True"
    for folder in ("start", "scopes", "same", "back", "alone", "my-model"):
        assert (tmp_path / folder / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_page_trains_evaluates_and_publishes_as_printed(hub, monkeypatch, capsys, tmp_path):
    """On a Hub of this machine, with small packages in the place of those that npm fetches."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ada"))
    monkeypatch.setattr("ms_resampler.pictures.suite.PACKAGE_FOLDER", make_packages(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "space_app" / "examples", "space_app/examples")
    scope = {"ms_resampler": ms_resampler}
    ms_resampler.export(tmp_path / "my-model")
    for block in blocks("python", PYTHON.partition("\n## Train\n")[2]):
        exec(compile(block, "python.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert scope["report"].trainable
    assert scope["summary"]["tasks"]["presence"]["value"] in (0, 1, 100)
    assert scope["built"]["splits"]["test-style"]["presence"]["pictures"] == 10
    assert f"{hub.url}/ada/my-model/tree/v1" in printed
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("trained", "pulled", "my-model")]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert any(not torch.equal(weights[2][name], value) for name, value in weights[0].items())


def test_the_page_on_python_has_an_example_of_every_function():
    code = "\n".join(blocks("python", PYTHON))
    for name in FUNCTIONS:
        assert f"ms_resampler.{name}(" in (PYTHON if name == "push_space" else code)  # which waits for a Space to run
        assert f"[`{name}`](#" in PYTHON


@pytest.mark.slow
def test_the_program_asks_the_demo_as_printed(monkeypatch, capsys):
    import space_server
    from answering import load

    (block,) = blocks("python", SPACE)
    assert "http://127.0.0.1:7860" in block
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    with loadable(TINY) as model:
        answerer = load(model)
        with space_server.served(answerer) as address:
            exec(compile(block.replace("http://127.0.0.1:7860", address), "space.md", "exec"), scope)
            scope["client"].close()
            *_, answer, maps = capsys.readouterr().out.splitlines()
    if answerer.model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        assert type(answerer.model.lm_head).__name__ == "PackedLinear"
    assert re.search(r"(left|right|top|bottom|centre): \w+ \w+", answer)
    assert maps == "['local', 'regional', 'global'] [6, 6]"


def test_the_chat_and_export_commands_run_as_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ms-resampler")]
    chat = next(shlex.split(line, comments=True)[1:] for line in commands if " chat " in line)
    assert main(chat) == 0
    assert re.search(r"(left|right|top|bottom|centre): \w+ \w+", capsys.readouterr().out)
    export = next(shlex.split(line, comments=True)[1:] for line in commands if " export " in line)
    monkeypatch.chdir(tmp_path)
    assert main(export) == 0
    assert (tmp_path / export[-1] / "modeling_ms_resampler.py").is_file()


def test_every_command_line_is_one_that_the_commands_take():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ms-resampler")]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        build_parser().parse_args(words)


def test_every_target_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_the_links_and_pictures_are_there():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_differences_are_those_of_the_study():
    study = (ROOT / "docs" / "study.md").read_text()
    section_T = re.split(r"^## (?:\d+ tokens|Figures)$", study, flags=re.MULTILINE)[1:4]
    table = re.search(r"<!-- study -->\n(.*)<!-- /study -->", README, flags=re.DOTALL)[1]
    rows = re.findall(r"^\| (`.*?)\n", table, flags=re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        names, *cells = row.strip("| ").split(" | ")
        arms = re.findall(r"`(.+?)`", names)
        for cell, section in zip(cells, section_T, strict=True):
            found = [
                re.search(rf"^\| {arm}(?: \(\d+ seeds\))? \| ([+-][\d.]+) ", section, flags=re.MULTILINE)[1]
                for arm in arms
            ]
            assert cell == min(found, key=float) + " and more" * (len(arms) > 1), (arms, cell, found)
