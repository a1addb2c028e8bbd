import json
import shutil
import socket
import subprocess
import sys

import pytest
import space_server
import tiny_models
import torch

from ms_resampler import chat
from ms_resampler.packing_ms_resampler import PackedLinear
from ms_resampler_cli import demo, models
from ms_resampler_cli import main as cli

ASK = ["chat", "What is this?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = space_server.make_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture_file(tmp_path):
    path = tmp_path / "picture.png"
    tiny_models.picture().save(path)
    return str(path)


def expected_answer(folder, pictures, new_tokens):
    model, processor = chat.load(folder, None)
    content = [{"type": "image", "image": picture} for picture in pictures]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": ASK[1]}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_chat_prints_the_answer(folder, picture_file, capsys):
    arguments = ["--image", picture_file, "--model", folder, "--max-new-tokens", "20"]
    assert cli.main([*ASK, *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == expected_answer(folder, [tiny_models.picture()], 20) != ""
    assert captured.out.endswith("\n")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_chat_packs_weights_on_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, _ = chat.load(folder, None)
    assert isinstance(model.lm_head, PackedLinear)


def test_chat_json_tells_all_about_the_answer(folder, picture_file, tmp_path, capsys):
    tiny_models.picture(seed=1).save(tmp_path / "other.png")
    files = [picture_file, str(tmp_path / "other.png")]
    images = [argument for file in files for argument in ("--image", file)]
    assert cli.main([*ASK, *images, "--model", folder, "--max-new-tokens", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["answer", "model", "visual_tokens", "scope_weights", "images", "milliseconds"]
    both = [tiny_models.picture(), tiny_models.picture(seed=1)]
    assert told["answer"] == expected_answer(folder, both, 20)
    assert (told["model"], told["visual_tokens"]) == (folder, 8)
    assert [image["file"] for image in told["images"]] == files
    for weights in (told["scope_weights"], *(image["scope_weights"] for image in told["images"])):
        assert list(weights) == ["local", "regional", "global"]
        assert sum(weights.values()) == pytest.approx(1, abs=1e-3)
    assert told["milliseconds"] > 0


@pytest.mark.parametrize(("budget", "tokens"), [("9", 9), ("2x3", 6)])
def test_chat_takes_a_budget(budget, tokens, folder, picture_file, capsys):
    arguments = ["--image", picture_file, "--model", folder, "--max-new-tokens", "1", "--json"]
    assert cli.main([*ASK, *arguments, "--visual-tokens", budget]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == tokens


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "missing.png"], "There is no picture file 'missing.png'."),
        (["--image", __file__], "is not an image that can be read"),
        (["--image", "PICTURE", "--visual-tokens", "1000"], "1000 visual tokens is impossible"),
        (["--image", "PICTURE", "--max-new-tokens", "0"], "must be at least 1"),
        (["--image", "PICTURE", "--model", "/no/such/folder"], "neither a folder nor"),
        (["--image", "PICTURE", "--model", "tests"], "it has no config.json"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, sentence, folder, picture_file, capsys):
    arguments = [picture_file if argument == "PICTURE" else argument for argument in arguments]
    model = [] if "--model" in arguments else ["--model", folder]
    assert cli.main([*ASK, *arguments, *model]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.startswith("ms-resampler chat: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("argv", [[], ["chat"], ASK, ["sing"], [*ASK, "--image", "x", "--visual-tokens", "a"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_interruption_is_130(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "run", interrupted)
    assert cli.main([*ASK, "--image", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_unexpected_errors_are_not_hidden(monkeypatch):
    def broken(arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(chat, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):  # Python's own exit code for it is 1
        cli.main([*ASK, "--image", "x"])


def test_missing_embedded_checkpoint_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    with pytest.raises(ValueError, match="embedded checkpoint is missing"):
        models.model_or_embedded(None)


@pytest.mark.parametrize("name", ["somebody/model", "gpt2", "some-body/a.model_1"])
def test_repository_names_pass(name):
    assert models.model_or_embedded(name) == name


def test_every_command_has_help(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as exit:
            cli.main([command, "--help"])
        assert exit.value.code == 0
        assert command in capsys.readouterr().out


def test_demo_gives_the_app_its_settings(folder):
    parser = cli.build_parser(["demo"])
    arguments = parser.parse_args(["demo", "--model", folder, "--port", "7999", "--no-browser"])
    with demo.loadable(folder) as model:
        settings = demo.environment(arguments, model)
    assert (settings["MODEL_ID"], settings["GRADIO_SERVER_PORT"]) == (folder, "7999")
    assert settings["GRADIO_SERVER_NAME"] == "127.0.0.1"
    assert "OPEN_BROWSER" not in settings
    assert demo.environment(parser.parse_args(["demo"]), model)["OPEN_BROWSER"] == "1"


def test_demo_compares_two_models(folder):
    arguments = cli.build_parser(["demo"]).parse_args(["demo", "--model", folder, "--compare", "someone/else"])
    assert demo.environment(arguments, folder, "someone/else")["COMPARE_MODEL_ID"] == "someone/else"
    assert "COMPARE_MODEL_ID" not in demo.environment(arguments, folder)


def test_demo_adds_the_code_to_a_folder_of_weights(folder, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors", "processing_ms_resampler.py", "pytorch_model.bin"):
        (weights / name).write_bytes(b"{}")
    with demo.loadable(str(weights)) as model:
        code = (demo.PACKAGE / "processing_ms_resampler.py").read_text()
        assert (demo.Path(model) / "processing_ms_resampler.py").read_text() == code
        assert not (demo.Path(model) / "pytorch_model.bin").exists()
        assert (demo.Path(model) / "modeling_ms_resampler.py").is_file()
        assert (demo.Path(model) / "model.safetensors").is_file()
    assert not demo.Path(model).exists()
    names = ["config.json", "model.safetensors", "processing_ms_resampler.py", "pytorch_model.bin"]
    assert {file.name: file.read_bytes() for file in weights.iterdir()} == dict.fromkeys(names, b"{}")


def test_demo_starts_the_app_before_anything_heavy_is_imported():
    script = """
import sys
from ms_resampler_cli import demo, main
main.build_parser(["demo"])
with demo.loadable_pair(None, None) as (model, compared):
    print(model, compared, {"ms_resampler", "torch", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    model, compared, heavy = done.stdout.split(maxsplit=2)
    assert (demo.Path(model).name, demo.Path(compared).name, heavy) == ("tiny", "tiny_resampler", "set()\n")


def test_demo_says_that_a_projector_is_not_whole(tmp_path, capsys):
    shutil.copytree(demo.PEER, tmp_path / "half")
    weights = tmp_path / "half" / demo.PROJECTOR
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cli.main(["demo", "--model", str(tmp_path / "half")]) == 2
    assert f"{weights} is not a whole file of weights" in capsys.readouterr().err


def test_demo_says_that_a_port_is_none(capsys):
    assert cli.main(["demo", "--port", "65536"]) == 2
    assert capsys.readouterr().err == "ms-resampler demo: A port is a number from 1 to 65535, and 65536 is not.\n"


def test_demo_says_that_a_port_is_taken(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["demo", "--model", folder, "--port", port, "--no-browser"]) == 2
    assert f"Cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


def test_demo_finds_the_app():
    assert demo.find_app() == space_server.SPACE / "app.py"


@pytest.mark.slow
def test_command_line_of_its_own(folder, picture_file):
    command = [sys.executable, "-m", "ms_resampler_cli.main", *ASK, "--image", picture_file, "--model", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    for name in [name for name in sys.modules if name.startswith(("research.study", "scipy."))]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["study", "--quick"]) == 2
    assert (
        capsys.readouterr().err == "ms-resampler study needs scipy: pip install 'ms-resampler[demo,train,eval,push]'\n"
    )
