"""Pulling and verifying: a repository is looked at before anything of it is loaded."""

import json
import re

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_processor

from ms_resampler.hub_upload import check as verify
from ms_resampler.hub_upload.staging import remote_code_files, stage_checkpoint
from ms_resampler_cli.main import main

NAME = "acme/tiny"


@pytest.fixture
def staged(tmp_path):
    tiny_model().save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    stage_checkpoint(tmp_path / "saved", tmp_path / "staged")
    return tmp_path / "staged"


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ada", orgs={"acme": "write"}))
    api = HfApi(endpoint=hub.url)
    api.create_repo(NAME, private=True)
    return api


def commit(api, folder):
    """Publishes a folder by the client's own means, whatever is in it."""
    return api.upload_folder(repo_id=NAME, folder_path=folder).oid


def test_a_pulled_checkpoint_is_the_published_one(api, staged, tmp_path, capsys):
    sha = commit(api, staged)
    api.create_tag(NAME, tag="v1")
    api.create_commit(NAME, [CommitOperationAdd("LICENSE", b"later")], commit_message="later")
    capsys.readouterr()
    assert main(["pull", f"{NAME}@v1", str(tmp_path / "pulled")]) == 0
    out = capsys.readouterr().out
    assert f"acme/tiny at {sha}: {len(list(staged.iterdir()))} files of" in out
    assert re.search(r"Code: sha256 [0-9a-f]{16}, the same as this package's\.", out)
    assert {file.name for file in (tmp_path / "pulled").iterdir()} == {file.name for file in staged.iterdir()}
    for file in staged.iterdir():
        assert (tmp_path / "pulled" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (tmp_path / "pulled.partial").exists()
    assert main(["pull", NAME, str(tmp_path / "pulled")]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err


def test_a_pull_goes_on_where_it_stopped(hub, api, staged, tmp_path, capsys):
    commit(api, staged)
    hub.fault(method="GET", path="/object/", status=403)
    assert main(["pull", NAME, str(tmp_path / "pulled")]) == 2
    assert not (tmp_path / "pulled").exists()
    hub.faults.clear()
    hub.requests.clear()
    assert main(["pull", NAME, str(tmp_path / "pulled")]) == 0
    assert len(hub.sent("GET", "/object/")) == 1
    assert not hub.sent("GET", "/resolve/.*/config.json")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path / "pulled", staged))
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_other_code_is_told(api, staged, capsys):
    file = staged / "modeling_ms_resampler.py"
    file.write_text(file.read_text() + "# changed\n")
    commit(api, staged)
    assert main(["verify", NAME]) == 0
    out = capsys.readouterr().out
    ours = verify.code_hash({file.name: verify.hash_of(file) for file in remote_code_files()})[:16]
    assert f"while this package's is {ours}; they differ in modeling_ms_resampler.py." in out


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD = {
    "a stray file": (
        lambda folder: (folder / "extra.py").write_text("print()"),
        "acme/tiny holds what no checkpoint of ours does: extra.py. Nothing was downloaded.",
    ),
    "code in a folder": (
        lambda folder: [(folder / "x").mkdir(), (folder / "x" / "config.json").write_text("{}")],
        "acme/tiny holds what no checkpoint of ours does: x/config.json",
    ),
    "a pickle": (
        lambda folder: torch.save({}, folder / "more.safetensors"),
        "more.safetensors of acme/tiny is a pickle",
    ),
    "code of another repository": (
        lambda folder: change_config(
            folder, auto_map={"AutoModel": "evil/repo--modeling_ms_resampler.MSResamplerModel"}
        ),
        "config.json of acme/tiny sends its readers to another repository: evil/repo--modeling_ms_resampler",
    ),
    "code that is not there": (
        lambda folder: change_config(folder, auto_map={"AutoModel": "modeling_other.Model"}),
        "config.json of acme/tiny names code that is not there: modeling_other.Model.",
    ),
    "hidden deep down": (
        lambda folder: change_config(folder, text_config={"auto_map": {"AutoTokenizer": [None, "a/b--x.Y"]}}),
        "config.json of acme/tiny sends its readers to another repository: a/b--x.Y.",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["pull", "verify"])
def test_what_should_not_be_there_is_refused(command, case, api, staged, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, sentence = BAD[case]
    spoil(staged)
    commit(api, staged)
    capsys.readouterr()
    assert main([command, NAME]) == 2
    captured = capsys.readouterr()
    assert f"ms-resampler {command}: {sentence}" in captured.err
    assert not (tmp_path / "tiny").exists()


def test_a_content_that_is_not_the_announced_one_is_found(hub, api, staged, tmp_path, capsys):
    sha = commit(api, staged)
    files = hub.model(NAME).commits[sha].files
    path = hub.objects.path(files["generation_config.json"].sha256)
    path.write_bytes(path.read_bytes().replace(b"true", b"null"))
    assert main(["verify", NAME]) == 2
    assert "generation_config.json of acme/tiny came with another content than the Hub says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("repository", "sentence"),
    [
        ("acme/none", "The Hub knows no acme/none, or the token in use may not see it."),
        ("acme/tiny@v9", "acme/tiny has no such revision."),
        ("tiny", "'tiny' is no repository: it is ORG/NAME"),
    ],
)
def test_what_is_not_there_is_a_sentence(repository, sentence, api, capsys):
    assert main(["verify", repository]) == 2
    assert capsys.readouterr().err.startswith(f"ms-resampler verify: {sentence}")
