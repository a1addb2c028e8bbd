"""The Space of a published checkpoint: what is sent, for which commit of the model, and how it is waited for."""

import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from ms_resampler import demo
from ms_resampler.hub_upload import space as push_space
from ms_resampler_cli.main import main

SPACE, MODEL = "acme/demo", "acme/tiny"
APP = demo.find_app().parent


@pytest.fixture
def api(hub, monkeypatch):
    """A client, and a public model of two commits."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ada", orgs={"acme": "write"}))
    monkeypatch.setattr(push_space, "SECONDS_BETWEEN_LOOKS", 0)
    api = HfApi(endpoint=hub.url)
    api.create_repo(MODEL)
    for message in ("first", "second"):
        contents = {"config.json": message.encode(), "model.safetensors": b"weights"}
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(MODEL, operations, commit_message=message)
    api.create_tag(MODEL, tag="v1", revision=hub.model(MODEL).history("main")[1])
    hub.requests.clear()
    return api


@pytest.fixture
def app(tmp_path, monkeypatch):
    """A copy of the app, to be spoiled."""
    folder = Path(shutil.copytree(APP, tmp_path / "app"))
    monkeypatch.setattr(push_space, "find_app", lambda: folder / "app.py")
    return folder


def published(hub, name):
    repo = hub.repos["space", SPACE]
    return hub.objects.path(repo.files("main")[name].sha256).read_bytes()


def test_the_app_is_published_for_one_commit_of_the_model(hub, api, app, capsys):
    (app / "__pycache__").mkdir(exist_ok=True)
    (app / "__pycache__" / "app.pyc").write_bytes(b"\x80")
    (app / ".env").write_text("SECRET=1")
    assert main(["push-space", SPACE, "--model", MODEL, "--model-revision", "v1"]) == 0
    repo, commit = hub.repos["space", SPACE], hub.model(MODEL).tags["v1"]
    assert repo.private
    assert repo.variables == {"MODEL_ID": MODEL, "MODEL_REVISION": commit}
    assert len(repo.history("main")) == 2
    sent = [file for file in APP.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    files = {str(file.relative_to(APP)) for file in sent}
    assert repo.files("main").keys() == files | {".gitattributes"}
    for name in files - {"README.md", "requirements.txt"}:
        assert published(hub, name) == (APP / name).read_bytes(), name
    settings = yaml.safe_load(published(hub, "README.md").decode().split("---\n")[1])
    assert settings["preload_from_hub"] == [f"{MODEL} config.json,model.safetensors {commit}"]
    assert (settings["models"], settings["sdk"], settings["app_file"]) == ([MODEL], "gradio", "app.py")
    assert settings["sdk_version"] == version("gradio")
    assert settings["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    requirements = published(hub, "requirements.txt").decode().splitlines()
    names = [re.match(r"[\w-]+", line)[0] for line in (APP / "requirements.txt").read_text().splitlines()]
    assert requirements == [f"{name}=={version(name).partition('+')[0]}" for name in names if name != "gradio"]
    assert capsys.readouterr().out.endswith(f"  RUNNING\nRunning: {hub.url}/spaces/{SPACE}\n")


def test_a_second_push_changes_what_is_other(hub, api, app):
    assert main(["push-space", SPACE, "--model", MODEL, "--model-revision", "v1"]) == 0
    hub.requests.clear()
    assert main(["push-space", SPACE, "--model", MODEL, "--model-revision", "v1"]) == 0
    assert not [seen for seen in hub.requests if seen.method not in ("GET", "HEAD")]
    (app / "more.css").write_text("a {}")
    (app / "style.css").unlink()
    assert main(["push-space", SPACE, "--model", MODEL]) == 0
    repo = hub.repos["space", SPACE]
    assert len(repo.history("main")) == 3
    assert "more.css" in repo.files("main")
    assert "style.css" not in repo.files("main")
    assert repo.variables["MODEL_REVISION"] == hub.model(MODEL).branches["main"]


def test_a_dry_run_changes_nothing(hub, api, capsys):
    assert main(["push-space", SPACE, "--model", MODEL, "--dry-run"]) == 0
    assert ("space", SPACE) not in hub.repos
    assert not [seen for seen in hub.requests if seen.method not in ("GET", "HEAD")]
    out = capsys.readouterr().out
    assert f"preload_from_hub:\n- {MODEL} config.json,model.safetensors " in out
    assert out.endswith("Nothing was sent (--dry-run).\n")


def test_a_private_model_is_not_preloaded(hub, api, capsys):
    hub.model(MODEL).private = True
    assert main(["push-space", SPACE, "--model", MODEL, "--public"]) == 0
    assert not hub.repos["space", SPACE].private
    assert b"preload_from_hub" not in published(hub, "README.md")
    assert "acme/tiny is private: give the Space a secret HF_TOKEN" in capsys.readouterr().out


def stages(hub, monkeypatch, *names):
    """What the Space goes through once it has the commit."""
    publish = push_space.publish

    def publish_and_start(*args, **kwargs):
        hub.repos["space", SPACE].stages = list(names)
        return publish(*args, **kwargs)

    monkeypatch.setattr(push_space, "publish", publish_and_start)


def test_its_start_is_waited_for(hub, api, capsys, monkeypatch):
    stages(hub, monkeypatch, "BUILDING", "BUILDING", "APP_STARTING", "RUNNING")
    assert main(["push-space", SPACE, "--model", MODEL]) == 0
    assert "  BUILDING\n  APP_STARTING\n  RUNNING\n" in capsys.readouterr().out
    assert len(hub.sent("GET", "/runtime")) == 4


def test_a_failure_to_start_is_told(hub, api, capsys, monkeypatch):
    stages(hub, monkeypatch, "BUILDING", "BUILD_ERROR")
    assert main(["push-space", SPACE, "--model", MODEL]) == 2
    sentence = "acme/demo is published, but does not run (BUILD_ERROR): No module named 'gradio'."
    assert capsys.readouterr().err.splitlines()[-1] == f"ms-resampler push-space: {sentence}"


def test_patience_ends(hub, api, capsys, monkeypatch):
    stages(hub, monkeypatch, "BUILDING")
    assert main(["push-space", SPACE, "--model", MODEL, "--timeout", "0"]) == 2
    assert "does not run after 0 seconds" in capsys.readouterr().err


def test_what_must_not_leave_and_what_is_not_there(hub, api, app, capsys):
    (app / "app.py").write_text((app / "app.py").read_text() + "\nTOKEN = 'hf_" + "aBcD" * 9 + "'\n")
    assert main(["push-space", SPACE, "--model", MODEL]) == 2
    assert "app.py holds a Hugging Face token" in capsys.readouterr().err
    (app / "app.py").unlink()
    (app / "app.py").symlink_to(APP / "app.py")
    assert main(["push-space", SPACE, "--model", MODEL]) == 2
    assert "app.py: a link to another place" in capsys.readouterr().err
    assert main(["push-space", SPACE, "--model", "acme/none"]) == 2
    assert "The Hub knows no acme/none" in capsys.readouterr().err
    assert main(["push-space", SPACE, "--model", MODEL, "--model-revision", "v9"]) == 2
    assert "acme/tiny has no such revision." in capsys.readouterr().err
    assert ("space", SPACE) not in hub.repos
