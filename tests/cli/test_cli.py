"""The command line: arguments reach the library, users' errors are one sentence, and faults keep their trace."""

import json
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import space_server
import tiny_models
import torch

import ms_resampler
from ms_resampler import demo, folders
from ms_resampler.reducers_ms_resampler import DART
from ms_resampler_cli import chat, errors
from ms_resampler_cli import main as cli

ASK = ["chat", "What is this?"]
FASTV = ["--image", "PICTURE", "--reducer", "fastv"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in space_server.make_model():
        part.save_pretrained(folder)
    return str(folder)


def test_chat_prints_the_answer(folder, picture_file, capsys):
    arguments = ["--image", picture_file, "--model", folder, "--max-new-tokens", "20"]
    assert cli.main([*ASK, *arguments]) == 0
    captured = capsys.readouterr()
    answer = ms_resampler.ask(ASK[1], tiny_models.picture(), folder, max_new_tokens=20)
    assert captured.out.strip() == answer.text != ""
    assert captured.out.endswith("\n")


def test_chat_json_tells_all_about_the_answer(folder, picture_file, tmp_path, capsys):
    tiny_models.picture(seed=1).save(tmp_path / "other.png")
    files = [picture_file, str(tmp_path / "other.png")]
    images = [argument for file in files for argument in ("--image", file)]
    assert cli.main([*ASK, *images, "--model", folder, "--max-new-tokens", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["answer", "model", "visual_tokens", "scope_weights", "images", "milliseconds"]
    answer = ms_resampler.ask(ASK[1], files, folder, max_new_tokens=20, scopes=True)
    assert (told["answer"], told["model"], told["visual_tokens"]) == (answer.text, folder, 8)
    assert [image["file"] for image in told["images"]] == files
    for image, weights in zip(told["images"], answer.scope_weights, strict=True):
        assert image["scope_weights"] == pytest.approx(weights, abs=1e-4)
    one, other = answer.scope_weights
    assert told["scope_weights"] == pytest.approx({scope: (one[scope] + other[scope]) / 2 for scope in one}, abs=1e-4)
    assert told["milliseconds"] > 0


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("kind", ["mlp", "avg_pool", "token_packer", "mqt", "resampler"])
def test_chat_asks_models_of_every_projector(kind, more, picture_file, tmp_path, capsys):
    fields = {"projector_type": kind, "visual_tokens": [6, 6] if kind == "mlp" else [3, 3], "query_grid": [3, 3]}
    model, processor = space_server.make_model(projector=fields)
    processor.visual_tokens = fields["visual_tokens"]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    arguments = ["--image", picture_file, "--model", str(tmp_path / "model"), "--max-new-tokens", "1"]
    assert cli.main([*ASK, *arguments, *more]) == 0
    if more:
        told = json.loads(capsys.readouterr().out)
        assert told["visual_tokens"] == (36 if kind == "mlp" else 9)
        assert ("scope_weights" in told) == (kind == "resampler")


@pytest.mark.parametrize(("budget", "tokens"), [("9", 9), ("2x3", 6)])
def test_chat_takes_a_budget(budget, tokens, folder, picture_file, capsys):
    arguments = ["--image", picture_file, "--model", folder, "--max-new-tokens", "1", "--json"]
    assert cli.main([*ASK, *arguments, "--visual-tokens", budget]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == tokens


def test_chat_takes_a_reducer(folder, picture_file, capsys):
    arguments = ["--image", picture_file, "--model", folder, "--max-new-tokens", "4", "--json"]
    assert cli.main([*ASK, *arguments, "--reducer", "divprune", "--keep", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["visual_tokens"] == 2
    reducer = {"reducer_type": "divprune", "keep": 2}
    answer = ms_resampler.ask(ASK[1], picture_file, folder, max_new_tokens=4, reducer=reducer)
    assert told["answer"] == answer.text


def test_chat_takes_a_methods_own_settings(folder, picture_file, monkeypatch, capsys):
    arguments, used = ["--image", picture_file, "--model", folder, "--max-new-tokens", "1", "--json"], []
    set_reducer = ms_resampler.MSResamplerForConditionalGeneration.set_reducer
    monkeypatch.setattr(
        ms_resampler.MSResamplerForConditionalGeneration,
        "set_reducer",
        lambda self, *given, **named: used.append(set_reducer(self, *given, **named).reducer),
    )
    for more in (["--keep", "2", "--reducer-option", "pivots=1", "--reducer-option", "layer=1"],
                 ["--reducer-option", "keep=0.5", "--reducer-option", "layer=1"]):  # fmt: skip
        assert cli.main([*ASK, *arguments, "--reducer", "dart", *more]) == 0
    assert used == [DART(keep=2, pivots=1, layer=1), DART(keep=0.5, layer=1)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "PICTURE", "--keep", "2"], "--keep needs --reducer"),
        (["--image", "PICTURE", "--reducer-option", "layer=2"], "--reducer-option needs --reducer"),
        (["--image", "PICTURE", "--reducer", "fastw"], "There is no `reducer_type` 'fastw'; did you mean `fastv`?"),
        ([*FASTV, "--keep", "2", "--reducer-option", "layr=1"], "fastv has no setting `layr`; did you mean `layer`?"),
        ([*FASTV, "--keep", "2", "--reducer-option", "layer=one"], "`layer` of fastv is a whole number"),
        ([*FASTV, "--keep", "2", "--reducer-option", "keep=3"], "`keep` of the reducer is given twice"),
        ([], "Give a picture with --image, or a video with --video."),
        (["--image", "missing.png"], "There is no picture file 'missing.png'."),
        (["--image", __file__], "is not an image that can be read"),
        (["--image", "PICTURE", "--visual-tokens", "1000"], "1000 visual tokens is impossible"),
        (["--image", "PICTURE", "--max-new-tokens", "0"], "must be at least 1"),
        (["--image", "PICTURE", "--model", "/no/such/folder"], "neither a folder nor"),
        (["--image", "PICTURE", "--model", "tests"], "it has no config.json"),
        (["--image", "PICTURE", "--model", "no-one/nothing"], "no-one/nothing cannot be loaded: "),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["plain", "debug"])
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, sentence, debug, folder, picture_file, capsys):
    arguments = [picture_file if argument == "PICTURE" else argument for argument in arguments]
    model = [] if "--model" in arguments else ["--model", folder]
    assert cli.main([*ASK, *arguments, *model, *debug]) == 2
    captured = capsys.readouterr()
    *trace, last = captured.err.splitlines()
    assert last.startswith("ms-resampler chat: ")
    assert sentence in last
    assert ("Traceback (most recent call last):" in trace) == bool(debug)
    assert bool(trace) == bool(debug)
    assert captured.out == ""


@pytest.mark.parametrize("argv", [[], ["chat"], ["sing"], [*ASK, "--image", "x", "--visual-tokens", "a"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "usage:" in capsys.readouterr().err


def raising(error):
    def run(arguments):
        raise error

    return run


def test_interruption_is_130(monkeypatch, capsys):
    monkeypatch.setattr(chat, "run", raising(KeyboardInterrupt))
    assert cli.main([*ASK, "--image", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def in_module(module, source):
    """A command whose code belongs to a module of this name."""
    space = {"__name__": module, "np": np, "torch": torch, "json": json}
    exec(f"def run(arguments):\n    {source}", space)
    return space["run"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ms_resampler.chat", "raise RuntimeError('a bug')"),
        ("ms_resampler.chat", "raise KeyError('a bug')"),
        ("ms_resampler.chat", "int('a bug')"),
        ("ms_resampler.chat", "one, other = [1]"),
        ("ms_resampler.chat", "np.zeros((2, 3)) + np.zeros((3, 2))"),
        ("ms_resampler.chat", "json.loads('{')"),
        ("ms_resampler.chat", "torch.nn.Embedding(2, 3, padding_idx=7)"),
        ("ms_resampler.chat", "torch.optim.SGD([torch.zeros(1)], lr=-1)"),
        ("ms_resampler.chat", "import ms_resampler.no_such_module"),
        ("ms_resampler.chat", f"open({str(folders.PACKAGE / 'no.jinja')!r})"),
        ("torch.nn.functional", "raise ValueError('a bug')"),
        ("torch.nn.functional", "raise OSError('libcuda.so: cannot open shared object file')"),
        ("transformers.modeling_utils", "raise ValueError('a bug')"),
    ],
)
def test_faults_keep_their_trace(module, source, monkeypatch):
    monkeypatch.setattr(chat, "run", in_module(module, source))
    with pytest.raises(Exception) as caught:  # noqa: PT011 (Python's own exit code for any is 1)
        cli.main([*ASK, "--image", "x"])
    assert not isinstance(caught.value, SystemExit)


@pytest.mark.parametrize(
    ("module", "source", "sentence"),
    [
        ("ms_resampler.chat", "raise ValueError('It is too long.\\nMuch.')", "It is too long."),
        ("ms_resampler.chat", "raise OSError('It is damaged.')", "It is damaged."),
        ("research.study", "raise ValueError('No such arm.')", "No such arm."),
        ("ms_resampler.chat", "open('/no/such/file')", "No such file or directory: '/no/such/file'."),
        ("ms_resampler.chat", "open('/')", "Is a directory: '/'."),
        ("shutil", "raise OSError(28, 'No space left on device')", "No space left on device."),
        ("transformers.utils.hub", "raise OSError('a/b is not a\\nvalid model')", "a/b is not a valid model"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(module, source, sentence, monkeypatch, capsys):
    monkeypatch.setattr(chat, "run", in_module(module, source))
    assert cli.main([*ASK, "--image", "x"]) == 2
    assert capsys.readouterr().err == f"ms-resampler chat: {sentence}\n"


def extras():
    """Packages of each extra by the names that they are imported under."""
    modules = {"scikit-learn": "sklearn"}
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, requirements in described.items():
        for requirement in requirements if extra != "dev" else []:
            package = requirement.partition(">=")[0]
            yield extra, modules.get(package, package.replace("-", "_"))


@pytest.mark.parametrize(("extra", "module"), list(extras()))
def test_a_missing_package_is_named_with_its_extra(extra, module, monkeypatch, capsys):
    assert extra in errors.EXTRAS[module]
    command = {"eval": ["evaluate", "x"], "pictures": ["pictures", "x"], "small": ["small", "x"]}.get(
        extra, [*ASK, "--image", "x"]
    )
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(cli.COMMANDS[command[0]][0], "run", in_module("ms_resampler.x", f"import {module}"))
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said == f"ms-resampler {command[0]}: {module} is needed: pip install 'ms-resampler[{extra}]'\n"


def test_transformers_missing_packages_are_named_too(monkeypatch, capsys):
    sentence = "Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch."
    monkeypatch.setattr(chat, "run", in_module("transformers.gguf", f"raise ImportError({sentence!r})"))
    assert cli.main([*ASK, "--image", "x"]) == 2
    assert capsys.readouterr().err == "ms-resampler chat: gguf is needed: pip install 'ms-resampler[gguf]'\n"


def test_missing_embedded_checkpoint_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(folders, "EMBEDDED", tmp_path)
    with pytest.raises(ValueError, match="embedded checkpoint is missing"):
        folders.model_or_embedded(None)


@pytest.mark.parametrize("name", ["somebody/model", "gpt2", "some-body/a.model_1"])
def test_repository_names_pass(name):
    assert folders.model_or_embedded(name) == name


def test_every_command_has_help(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as exit:
            cli.main([command, "--help"])
        assert exit.value.code == 0
        assert command in capsys.readouterr().out


def run_apart(script, *arguments, **options):
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, **options).stdout


@pytest.mark.slow
def test_a_question_may_hold_the_name_of_any_command(folder, picture_file):
    """Where no extra is installed; nor does a command's function need one before it runs."""
    script = """
import sys
from ms_resampler_cli import errors, main
sys.modules.update(dict.fromkeys(errors.EXTRAS))
import ms_resampler
assert all(callable(getattr(ms_resampler, name)) for name in ms_resampler.FUNCTIONS)
_, *arguments = sys.argv
question = " ".join(main.COMMANDS)
assert main.build_parser().parse_args(["chat", question, *arguments]).question == question
sys.exit(main.main(["chat", "push", *arguments, "--max-new-tokens", "2"]))
"""
    assert run_apart(script, "--image", picture_file, "--model", folder)


def test_the_parser_and_the_demo_start_without_anything_heavy():
    script = """
import sys
from ms_resampler_cli import main, demo as command
parser = main.build_parser()
arguments = parser.parse_args(["demo", "--no-browser", "--port", "65536"])
try:
    command.run(arguments)
except ValueError as error:
    print(error)
import ms_resampler.demo
with ms_resampler.demo.loadable_pair(None, None) as (model, compared):
    print(model, compared)
print({"torch", "transformers", "huggingface_hub", "gradio"} & set(sys.modules))
"""
    port, models, heavy = run_apart(script).splitlines()
    assert port == "A port is a number from 1 to 65535, and 65536 is not."
    assert [Path(model).name for model in models.split()] == ["tiny", "tiny_resampler"]
    assert heavy == "set()"


def test_functions_are_where_users_look_and_no_module_hides_them():
    for name, module in ms_resampler.FUNCTIONS.items():
        assert callable(getattr(ms_resampler, name))
        assert name in dir(sys.modules[f"ms_resampler.{module}"])
        assert not (ROOT / "ms_resampler" / name).exists()
        assert not (ROOT / "ms_resampler" / f"{name}.py").exists()
    with pytest.raises(AttributeError, match="no attribute 'sing'"):
        _ = ms_resampler.sing


class App:
    """Stands for the app's process: what it was started with, and that it ended well."""

    started = None

    def __init__(self, command, env):
        App.started = command, env

    def wait(self):
        return 0

    def terminate(self):
        pass


@pytest.mark.parametrize("more", [[], ["--compare", "someone/else", "--revision", "v1"]])
def test_demo_gives_the_app_its_settings(folder, more, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", App)
    monkeypatch.setenv("COMPARE_MODEL_ID", "stale")
    assert cli.main(["demo", "--model", folder, "--port", "7999", "--no-browser", *more]) == 0
    command, settings = App.started
    assert command == [sys.executable, str(space_server.SPACE / "app.py")]
    assert (settings["MODEL_ID"], settings["GRADIO_SERVER_PORT"]) == (folder, "7999")
    assert settings["GRADIO_SERVER_NAME"] == "127.0.0.1"
    assert "OPEN_BROWSER" not in settings
    assert settings.get("COMPARE_MODEL_ID") == ("someone/else" if more else None)
    assert settings.get("MODEL_REVISION") == ("v1" if more else None)


def test_serve_opens_the_browser_by_default(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", App)
    assert ms_resampler.serve(folder) == 0
    assert App.started[1]["OPEN_BROWSER"] == "1"


def test_demo_needs_gradio(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "ms-resampler demo: gradio is needed: pip install 'ms-resampler[demo]'\n"


def test_demo_adds_the_code_to_a_folder_of_weights(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors", "processing_ms_resampler.py", "pytorch_model.bin"):
        (weights / name).write_bytes(b"{}")
    with demo.loadable(str(weights)) as model:
        code = (folders.PACKAGE / "processing_ms_resampler.py").read_text()
        assert (Path(model) / "processing_ms_resampler.py").read_text() == code
        assert not (Path(model) / "pytorch_model.bin").exists()
        assert (Path(model) / "modeling_ms_resampler.py").is_file()
        assert (Path(model) / "model.safetensors").is_file()
    assert not Path(model).exists()
    names = ["config.json", "model.safetensors", "processing_ms_resampler.py", "pytorch_model.bin"]
    assert {file.name: file.read_bytes() for file in weights.iterdir()} == dict.fromkeys(names, b"{}")


def test_demo_says_that_a_projector_is_not_whole(tmp_path, capsys):
    shutil.copytree(demo.PEER, tmp_path / "half")
    weights = tmp_path / "half" / folders.PROJECTOR
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cli.main(["demo", "--model", str(tmp_path / "half")]) == 2
    assert f"{weights} is not a whole file of weights" in capsys.readouterr().err


def test_demo_of_a_language_model_says_what_to_do(tmp_path, capsys):
    tiny_models.text_config("qwen2").save_pretrained(tmp_path)
    assert cli.main(["demo", "--model", str(tmp_path)]) == 2
    assert "is a `qwen2` model, not one of this package" in capsys.readouterr().err


def test_demo_says_that_a_port_is_taken(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["demo", "--model", folder, "--port", port, "--no-browser"]) == 2
    assert f"Cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
