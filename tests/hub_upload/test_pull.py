"""Pulling and verifying: a repository is looked at before anything of it is loaded."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from ms_resampler.folders import PACKAGE, temporary_folder
from ms_resampler.hub_upload.check import pull, verify
from ms_resampler.hub_upload.staging import stage_checkpoint
from ms_resampler_cli.main import main

NAME = "acme/tiny"


@pytest.fixture
def staged(tmp_path):
    save_tiny(tmp_path / "saved")
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


def change_code(folder):
    file = folder / "modeling_ms_resampler.py"
    file.write_text(file.read_text() + "# changed\n")


@pytest.mark.parametrize("command", ["verify", "pull"])
def test_other_code_is_told_and_accepted_by_its_hash(command, api, staged, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change_code(staged)
    commit(api, staged)
    assert main([command, NAME]) == 2
    told = capsys.readouterr()
    theirs, ours = re.search(
        r"Code: sha256 (\w{16}), while this package's is (\w{16}); they differ in (.*)\.", told.out
    ).group(1, 2)
    assert theirs != ours
    whole = re.search(r"accept it with --allow-code (\w{64})\.\n", told.err)[1]
    assert whole.startswith(theirs)
    assert not (tmp_path / "tiny").exists()
    for wrong in (ours, theirs[:15], "0" * 64):
        assert main([command, NAME, "--allow-code", wrong]) == 2
    for right in (whole, theirs):
        assert main([command, NAME, "--allow-code", right]) == 0
        assert (tmp_path / "tiny").exists() == (command == "pull")
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shards(folder, **weight_map):
    """Two shards whose index is true but for some entries."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-0000{1 + ('projector' in name)}-of-00002.safetensors" for name in tensors}
    for shard in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index | weight_map}))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
EVIL = "evil/repo--modeling_ms_resampler.MSResamplerModel"
BAD = {
    "a stray file": (
        lambda folder: (folder / "extra.py").write_text("print()"),
        "acme/tiny has files that do not belong to a checkpoint: extra.py. Nothing was downloaded.",
    ),
    "code in a folder": (
        lambda folder: [(folder / "x").mkdir(), (folder / "x" / "config.json").write_text("{}")],
        "acme/tiny has files that do not belong to a checkpoint: x/config.json",
    ),
    "a pickle": (
        lambda folder: torch.save({}, folder / "more.safetensors"),
        "more.safetensors of acme/tiny is a pickle",
    ),
    "code of another repository": (
        lambda folder: change_config(folder, auto_map={"AutoModel": EVIL}),
        f"config.json of acme/tiny refers to another repository: {EVIL}.",
    ),
    "code that is not there": (
        lambda folder: change_config(folder, auto_map={"AutoModel": "modeling_other.Model"}),
        "config.json of acme/tiny names code that is not there: modeling_other.Model.",
    ),
    "no config": (remove("config.json"), "acme/tiny is not a checkpoint folder: it has no config.json."),
    "no weights": (remove("model.safetensors"), "acme/tiny has no weights: neither model.safetensors nor"),
    "no module": (
        remove("processing_ms_resampler.py"),
        "config.json of acme/tiny names code that is not there: processing_ms_resampler.MSResamplerProcessor.",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json of acme/tiny is missing."),
    "no processor": (remove("processor_config.json"), "processor_config.json of acme/tiny is missing."),
    "a plain language model": (
        lambda folder: change_config(folder, model_type="qwen2"),
        "acme/tiny is a `qwen2` model, not one of this package: put one together with `ms-resampler init`",
    ),
    "a missing shard": (
        lambda folder: [shards(folder), (folder / SECOND).unlink()],
        f"acme/tiny is not complete: model.safetensors.index.json names {SECOND}, which is not there.",
    ),
    "a shard outside": (
        lambda folder: shards(folder, extra="../other/model.safetensors"),
        "acme/tiny is not complete: model.safetensors.index.json names '../other/model.safetensors', which is no",
    ),
    "a shard without its weights": (
        lambda folder: shards(folder, **{"model.other": FIRST}),
        f"acme/tiny is not complete: model.safetensors.index.json says that model.other is in {FIRST}, but it is not.",
    ),
    "an index of nothing": (
        lambda folder: [shards(folder), (folder / "model.safetensors.index.json").write_text("[]")],
        "acme/tiny is not complete: model.safetensors.index.json has no weight_map",
    ),
    "a missing weight": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop("model.projector.output_proj.weight")),
        "config.json of acme/tiny asks for weights that are missing or of another size: model.projector.output_proj",
    ),
    "a weight of another size": (
        lambda folder: change_weights(
            folder, lambda tensors: tensors.update({"model.projector.output_proj.weight": torch.ones(2, 2)})
        ),
        "config.json of acme/tiny asks for weights that are missing or of another size: model.projector.output_proj",
    ),
    **{
        f"{value} in a weight": (
            lambda folder, value=value: change_weights(
                folder, lambda tensors: tensors["model.projector.output_proj.weight"].view(-1)[-1].fill_(value)
            ),
            "model.safetensors of acme/tiny is damaged (model.projector.output_proj.weight has numbers that are not",
        )
        for value in (float("nan"), float("inf"))
    },
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
    assert "sent" not in captured.err
    assert not (tmp_path / "tiny").exists()


def test_shards_that_are_whole_are_well(api, staged):
    shards(staged)
    commit(api, staged)
    verify(NAME)


@pytest.mark.parametrize("path", ["/object/", "/resolve/.*config.json", "/tree/", "/api/models/acme/tiny"])
@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"sent": 0}])
def test_a_server_that_stumbles_once_is_asked_again(fault, path, hub, api, staged, tmp_path, impatient):
    commit(api, staged)
    hub.fault(method="GET|HEAD", path=path, **fault)
    pull(NAME, tmp_path / "pulled")
    assert {file.name for file in (tmp_path / "pulled").iterdir()} == {file.name for file in staged.iterdir()}


def test_what_another_download_has_left_is_not_kept(hub, api, staged, tmp_path):
    """A killed download of another revision, or anything else that stands in the partial folder."""
    commit(api, staged)
    partial = tmp_path / "pulled.partial"
    (partial / "more").mkdir(parents=True)
    for name in ("evil_ms_resampler.py", "model-00001-of-00002.safetensors", "config.json", "more/x.py"):
        (partial / name).write_text("print('from elsewhere')")
    pull(NAME, tmp_path / "pulled")
    for file in staged.iterdir():
        assert (tmp_path / "pulled" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "pulled").iterdir())) == len(list(staged.iterdir()))


def test_a_name_with_signs_of_patterns_is_downloaded(api, staged, tmp_path):
    Image.new("L", (2, 2)).save(staged / "curves [1].png")
    commit(api, staged)
    pull(NAME, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "curves [1].png").is_file()


def test_a_token_that_may_not_read_is_told_so(hub, api, staged, capsys):
    commit(api, staged)
    hub.fault(method="GET", path="/resolve/.*config.json", status=403, message="Forbidden", times=99)
    assert main(["verify", NAME]) == 2
    assert "ms-resampler verify: The token in use may not read acme/tiny: ask its owner" in capsys.readouterr().err


def test_folders_of_killed_runs_are_removed_and_those_of_others_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = "import os; from folders import temporary_folder\n"
    script += "with temporary_folder('runs') as place: (place / 'weights').write_text('many'); os.kill(os.getpid(), 9)"
    variables = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(PACKAGE)}  # the module alone is imported in no time
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ | variables, timeout=100)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    with temporary_folder("other"):
        assert (left / "weights").is_file()
    with temporary_folder("runs") as first, temporary_folder("runs") as second:
        assert not left.exists()
        assert first != second
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_content_that_is_not_the_announced_one_is_found(hub, api, staged, tmp_path, capsys):
    sha = commit(api, staged)
    files = hub.model(NAME).commits[sha].files
    path = hub.objects.path(files["generation_config.json"].sha256)
    path.write_bytes(path.read_bytes().replace(b"true", b"null"))
    assert main(["verify", NAME]) == 2
    assert "generation_config.json of acme/tiny came with other content than the Hub states" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("repository", "sentence"),
    [
        ("acme/none", "The Hub knows no acme/none, or the token in use may not see it."),
        ("acme/tiny@v9", "acme/tiny has no such revision."),
        ("tiny", "'tiny' is not a repository name: give ORG/NAME"),
    ],
)
def test_what_is_not_there_is_a_sentence(repository, sentence, api, capsys):
    assert main(["verify", repository]) == 2
    assert capsys.readouterr().err.startswith(f"ms-resampler verify: {sentence}")
