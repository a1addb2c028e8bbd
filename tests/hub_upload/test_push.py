"""Publishing, against the loopback Hub: what is sent, what is refused, and what a failure leaves behind."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants
from loopback_hub import LoopbackHub
from loopback_hub.storage import git_oid
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_model, tiny_processor

from ms_resampler.folders import remote_code_files
from ms_resampler.hub_upload import check, plan, publish, push
from ms_resampler.hub_upload import inspect as content
from ms_resampler.hub_upload.secrets import redact, redacted
from ms_resampler_cli.main import main

NAME = "acme/tiny"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture
def token(hub, monkeypatch):
    """The token in use: it may write to acme, and only read corp."""
    token = hub.add_user("ada", orgs={"acme": "write", "corp": "read"})
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.fixture
def unverified(monkeypatch):
    """Leaves out the two processes of strangers, which take most of the time; the slow tests have them."""
    for module in (push, check):
        monkeypatch.setattr(module, "answer_of_a_stranger", lambda *args, **kwargs: b"the same")


def changed(hub):
    """The requests that may have changed something."""
    return [str(seen) for seen in hub.requests if seen.method not in ("GET", "HEAD")]


def error(capsys):
    """The one line on stderr that is not a progress bar."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("ms-resampler push: ")]
    assert len(lines) == 1, err
    return lines[0].removeprefix("ms-resampler push: ")


# What a push does


def test_one_private_commit_and_a_tag(hub, token, folder, unverified, capsys):
    (folder / ".env").write_text("nothing to see")
    (folder / "checkpoint-1").mkdir()
    (folder / "modeling_ms_resampler.py").write_text("raise SystemExit('old code')")
    assert main(["push", str(folder), NAME]) == 0
    repo = hub.model(NAME)
    assert repo.private
    assert len(repo.history("main")) == 2  # the Hub's first one, and ours
    assert repo.tags == {"v1": repo.branches["main"]}
    files = repo.files("v1")
    code = {file.name: file.read_bytes() for file in remote_code_files()}
    copied = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name not in code}
    del copied[".env"]
    assert files.keys() - {".gitattributes", "README.md"} == copied.keys() | code.keys()
    for name, data in (copied | code).items():
        assert hub.objects.path(files[name].sha256).read_bytes() == data, name
    out = capsys.readouterr().out
    assert "acme/tiny (private, new repository), branch main:" in out
    assert "Stays here: .env, checkpoint-1/, modeling_ms_resampler.py (replaced by the package's)." in out
    assert out.endswith(f"Published: {hub.url}/acme/tiny/tree/v1\n")


def test_a_second_push_sends_changes_and_removes_what_is_stale(hub, token, folder, unverified, capsys):
    assert main(["push", str(folder), NAME, "--max-shard-size", "50KB"]) == 0
    sharded = set(hub.model(NAME).files("v1"))
    assert "model.safetensors.index.json" in sharded
    capsys.readouterr()
    hub.requests.clear()
    assert main(["push", str(folder), NAME, "--max-shard-size", "50KB"]) == 0
    assert changed(hub) == [f"POST /api/models/acme/tiny/tag/{hub.model(NAME).tags['v1']}"]
    assert "to send: 0 B." in capsys.readouterr().out
    assert main(["push", str(folder), NAME, "--message", "In one file"]) == 0
    repo = hub.model(NAME)
    commit = repo.commits[repo.tags["v2"]]
    assert (commit.title, commit.parent, repo.branches["main"]) == ("In one file", repo.tags["v1"], repo.tags["v2"])
    assert not [name for name in commit.files if "-of-" in name or name.endswith("index.json")]
    assert [seen.path.rpartition("/")[2] for seen in hub.sent("PUT")] == [commit.files["model.safetensors"].sha256]
    out = capsys.readouterr().out
    assert re.search(r"new +\S+ kB  model\.safetensors\n", out)
    assert re.search(r"remove +model-00001-of-0000\d\.safetensors\n", out)


def test_shards_hold_the_same_weights(hub, token, folder, unverified, tmp_path):
    assert main(["push", str(folder), NAME, "--max-shard-size", "50KB"]) == 0
    files = hub.model(NAME).files("main")
    index = json.loads(hub.objects.path(files["model.safetensors.index.json"].sha256).read_text())
    whole = load_file(folder / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for shard in set(index["weight_map"].values()):
        tensors = load_file(hub.objects.path(files[shard].sha256))
        assert tensors.keys() == {name for name, where in index["weight_map"].items() if where == shard}
        assert len(tensors) == 1 or files[shard].size < 60_000
        for name, tensor in tensors.items():
            assert torch.equal(tensor, whole[name])


def test_a_branch_a_pull_request_and_tags(hub, token, folder, unverified, capsys):
    assert main(["push", str(folder), NAME, "--revision", "next/one", "--tag", "preview"]) == 0
    repo = hub.model(NAME)
    assert repo.tags == {"preview": repo.branches["next/one"]}
    assert list(repo.files("main")) == [".gitattributes"]
    assert main(["push", str(folder), NAME, "--create-pr"]) == 0
    assert capsys.readouterr().out.endswith(f"Published: {hub.url}/acme/tiny/discussions/1\n")
    assert list(repo.files("main")) == [".gitattributes"]
    assert list(repo.tags) == ["preview"]
    HfApi(endpoint=hub.url).merge_pull_request(NAME, 1)
    assert repo.files("main") == repo.files("preview")
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    assert main(["push", str(folder), NAME, "--tag", "preview"]) == 2
    assert error(capsys) == "acme/tiny has a tag preview already, for something else: choose another --tag."
    assert main(["push", str(folder), NAME, "--tag", "v2.0"]) == 0
    assert repo.tags["v2.0"] == repo.branches["main"] != repo.tags["preview"]


def test_public_is_asked_for(hub, token, folder, unverified, capsys, monkeypatch):
    assert main(["push", str(folder), NAME, "--public"]) == 0
    assert not hub.model(NAME).private
    assert main(["push", str(folder), NAME]) == 2
    assert error(capsys).startswith("acme/tiny exists and is public: give --public,")
    assert main(["push", str(folder), "acme/other"]) == 0
    assert main(["push", str(folder), "acme/other", "--public"]) == 2
    assert error(capsys).startswith("acme/other exists and is private: leave out --public,")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["push", str(folder), "acme/third", "--public"]) == 2
    assert ("model", "acme/third") not in hub.repos


def test_a_dry_run_changes_nothing_and_shows_the_card(hub, folder, unverified, capsys):
    assert main(["push", str(folder), NAME, "--dry-run"]) == 0  # without a token, too
    assert (changed(hub), hub.repos) == ([], {})
    out = capsys.readouterr().out
    assert re.search(r"new +\d+ B  generation_config\.json\n", out)
    assert 'repo = "acme/tiny"' in out
    assert "\n# tiny\n" in out  # after the repository, not the folder in which it was staged
    assert out.endswith("Nothing was sent (--dry-run).\n")


def test_a_dry_run_works_without_a_network(folder, unverified, capsys):
    assert main(["push", str(folder), NAME, "--dry-run"]) == 0
    assert "The Hub cannot be reached; the plan assumes that acme/tiny does not exist yet." in capsys.readouterr().out


# What is refused


def text_with(secret):
    return f"---\nlibrary_name: transformers\nlicense: mit\npipeline_tag: image-text-to-text\n---\n{secret}\n"


HUB_TOKEN = "hf_" + "aBcD" * 8 + "xy"


def link(folder):
    (folder / "elsewhere").write_text("secret")
    (folder / "LICENSE").symlink_to(folder / "elsewhere")


def shards_of_which_one_is_missing(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")


REFUSED = {
    "a link": (link, r"LICENSE: a link to another place"),
    "a pickle": (lambda folder: torch.save({}, folder / "training_args.bin"), r"training_args\.bin: a pickle"),
    "a disguised pickle": (
        lambda folder: torch.save({}, folder / "extra.safetensors"),
        r"extra\.safetensors: a pickle",
    ),
    "an AWS key": (
        lambda folder: (folder / "README.md").write_text(text_with("key: AKIA" + "Z7QW" * 4)),
        r"README\.md, line 6, looks like a secret \(AWS Access Key\): remove it",
    ),
    "a token in a text": (
        lambda folder: (folder / "training_record.json").write_text(json.dumps({"hub": HUB_TOKEN})),
        r"training_record\.json holds a Hugging Face token: remove it, and revoke it",
    ),
    "cut-off weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 20_000),
        r"model\.safetensors is damaged \(.+\): save the checkpoint again",
    ),
    "empty weights": (lambda folder: os.truncate(folder / "model.safetensors", 0), r"model\.safetensors: empty"),
    "broken JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json is damaged"),
    "no picture": (lambda folder: (folder / "a.png").write_text("GIF89a"), r"a\.png is damaged \(no PNG picture\)"),
    "a missing shard": (shards_of_which_one_is_missing, r"names model-00002-of-00002\.safetensors, which is not there"),
    "two sets of weights": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        r"holds both model\.safetensors and shards",
    ),
    "code of another repository": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": [null, "evil/repo--x.Y"]}'),
        r"tokenizer_config\.json refers to another repository: evil/repo--x\.Y",
    ),
    "a missing weight": (
        lambda folder: save_file({"model.other": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"}),
        r"config\.json asks for weights that are missing or of another size: ",
    ),
    "NaN": (
        lambda folder: save_file({"a": torch.full([1], torch.nan)}, folder / "model.safetensors"),
        r"model\.safetensors is damaged \(a has numbers that are not finite\)",
    ),
    "a plain language model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2"}'),
        r"is a `qwen2` model, not one of this package: put one together with `ms-resampler init`",
    ),
    "no checkpoint": (lambda folder: (folder / "config.json").unlink(), r"it has no config\.json"),
    "no metadata": (
        lambda folder: (folder / "README.md").write_text("# A model\n"),
        r"README\.md lacks in its metadata: library_name: transformers, pipeline_tag: .+, license: \.\.\.",
    ),
    "metadata that are no YAML": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: [mit\n---\n# A model\n"),
        r"README\.md is damaged: its metadata, between two lines of ---, are no YAML",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_not_leave_is_refused_by_name(case, hub, token, folder, unverified, capsys):
    spoil, sentence = REFUSED[case]
    spoil(folder)
    assert main(["push", str(folder), NAME]) == 2
    said = error(capsys)
    assert re.search(sentence, said)
    assert HUB_TOKEN not in said
    assert (changed(hub), hub.repos) == ([], {})


def test_a_message_with_a_secret_is_refused(hub, token, folder, capsys):
    assert main(["push", str(folder), NAME, "--message", f"by {HUB_TOKEN}"]) == 2
    assert error(capsys) == "Nothing was sent. The message looks like a secret: give another --message."
    assert hub.requests == []


def test_personal_data_is_cleaned_or_named(hub, token, folder, unverified, capsys):
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"made_by": "/home/ada/models/run.py"}))
    (folder / "LICENSE").write_text("Free for all.\nAsk ada@example.org.\n")
    assert main(["push", str(folder), NAME]) == 0
    assert "Everybody with read access sees LICENSE, line 2: an e-mail address." in capsys.readouterr().out
    file = hub.model(NAME).files("v1")["generation_config.json"]
    assert json.loads(hub.objects.path(file.sha256).read_text())["made_by"] == "run.py"


def test_the_token_in_use_is_found_whatever_its_form(hub, folder, unverified, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token")
    hub.users["an-unusual-token"] = hub.users[hub.add_user("acme")]
    (folder / "LICENSE").write_text("Ask me: an-unusual-token.")
    assert main(["push", str(folder), NAME]) == 2
    assert "LICENSE holds a Hugging Face token" in error(capsys)


def test_oversized_files_are_refused(hub, token, folder, unverified, capsys, monkeypatch):
    monkeypatch.setitem(content.LIMITS, "*.safetensors", 100_000)
    assert main(["push", str(folder), NAME]) == 2
    assert "model.safetensors: too large; weights can be split with --max-shard-size 5GB" in error(capsys)
    assert main(["push", str(folder), NAME, "--max-shard-size", "50KB", "--dry-run"]) == 0


def test_weights_whose_length_begins_like_a_pickle_are_none(tmp_path):
    for extra in range(0, 4096, 8):  # until the header is 0x__80 + 0x02..05 bytes long
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"x": "y" * extra})
        if (tmp_path / "a.safetensors").read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            break
    else:
        pytest.fail("no such length was met")
    content.inspect_files([tmp_path / "a.safetensors"])


# What goes wrong on the way


def test_no_token_a_bad_one_and_no_rights(hub, token, folder, unverified, capsys, monkeypatch):
    assert main(["push", str(folder), "corp/tiny"]) == 2
    assert error(capsys).startswith("The token in use may not write to corp/tiny: ask its owner for the right")
    hub.users[token].expired = True
    assert main(["push", str(folder), NAME]) == 2
    assert "The Hub does not accept the token (it is invalid or has expired)" in error(capsys)
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(folder), NAME]) == 2
    assert error(capsys).startswith("There is no Hub token on this computer: log in with `hf auth login`")
    assert hub.repos == {}


def test_a_reader_may_propose_but_not_push(hub, folder, unverified, capsys, monkeypatch):
    HfApi(endpoint=hub.url, token=hub.add_user("ada")).create_repo("ada/tiny")
    monkeypatch.setenv("HF_TOKEN", hub.add_user("bob"))
    assert main(["push", str(folder), "ada/tiny", "--public"]) == 2
    assert error(capsys).startswith("The token in use may not write to ada/tiny")
    assert main(["push", str(folder), "ada/tiny", "--public", "--create-pr"]) == 0
    assert len(hub.model("ada/tiny").pulls) == 1


@pytest.mark.parametrize("name", ["tiny", "acme/tiny/more", "acme/ti ny", "acme/-tiny", "acme/../tiny", "acme/ti--ny"])
def test_a_bad_name_is_refused_before_anything(name, hub, token, folder, capsys):
    assert main(["push", str(folder), name]) == 2
    assert "is not a repository name: give ORG/NAME" in error(capsys)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tag", "v 1"], "--tag 'v 1' is not a git name"),
        (["--revision", "../x"], "--revision '../x' is not a git name"),
        (["--tag", "v1", "--create-pr"], "A pull request gets no tag"),
        (["--max-shard-size", "much"], "--max-shard-size 'much' is not a size: give one such as"),
    ],
)
def test_bad_options_are_refused(arguments, sentence, hub, token, folder, capsys):
    assert main(["push", str(folder), NAME, *arguments]) == 2
    assert sentence in error(capsys)
    assert changed(hub) == []


def test_somebody_else_was_faster(hub, token, folder, unverified, capsys):
    """The commit builds on what the plan was made for, or is not made at all."""
    assert main(["push", str(folder), NAME]) == 0
    api, repo = HfApi(endpoint=hub.url), hub.model(NAME)
    before = plan.look_at(api, NAME, "main")
    theirs = api.create_commit(NAME, [CommitOperationAdd("notes.txt", b"theirs")], commit_message="theirs").oid
    (folder / "generation_config.json").write_text("{}")
    mine = plan.make_plan(folder, before, "main", lambda name: False)
    sentence = r"^acme/tiny has changed while this was running, and nothing was published"
    with pytest.raises(ValueError, match=sentence), push.hub_errors(NAME):
        publish.publish(api, mine, "mine")
    assert repo.branches["main"] == theirs


def test_a_server_that_stumbles_once_is_asked_again(hub, token, folder, unverified, impatient):
    for path in ("/whoami-v2", "/api/models/acme/tiny$", "/repos/create", "/preupload/", "/commit/", "/tag/", "/tree/"):
        hub.fault(path=path, status=503)
    hub.fault(method="PUT", status=500)
    assert main(["push", str(folder), NAME]) == 0
    assert [seen.status for seen in hub.sent("POST", "/commit/")] == [503, 200]
    assert hub.model(NAME).tags == {"v1": hub.model(NAME).branches["main"]}
    assert len(hub.model(NAME).history("main")) == 2


@pytest.mark.parametrize("path", ["/tag/", "/commit/"])
def test_an_answer_that_gets_lost_makes_no_second_commit(path, hub, token, folder, unverified, impatient):
    hub.fault(method="POST", path=path, sent=0)
    assert main(["push", str(folder), NAME]) == 0
    assert len(hub.model(NAME).history("main")) == 2
    assert hub.model(NAME).tags == {"v1": hub.model(NAME).branches["main"]}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({"path": "/commit/", "status": 500}, r"The Hub reports an internal error \(500\), after several tries"),
        ({"path": "/upload/", "status": 500}, r"The Hub reports an internal error \(500\), after several tries"),
        ({"path": "/upload/", "status": 507}, r"The Hub has no room left for acme/tiny"),
        ({"path": "/upload/", "received": 1000}, r"The Hub at http://127\.0\.0\.1:\d+ cannot be reached"),
        ({"path": "/commit/", "received": 0}, r"The Hub at http://127\.0\.0\.1:\d+ cannot be reached"),
        ({"path": "/validate-yaml", "status": 418, "message": "I am a teapot"}, r"The Hub refuses \(418\): .*teapot"),
    ],
)
def test_a_failure_on_the_way_publishes_nothing(fault, sentence, hub, token, folder, unverified, impatient, capsys):
    hub.fault(method="PUT|POST", times=99, **fault)
    assert main(["push", str(folder), NAME]) == 2
    said, repo = error(capsys), hub.model(NAME)
    assert re.match(sentence, said)
    assert ("The commit may have been made all the same: run the command again" in said) == ("commit" in fault["path"])
    assert (len(repo.history("main")), repo.tags) == (1, {})
    hub.faults.clear()
    hub.requests.clear()
    assert main(["push", str(folder), NAME]) == 0
    assert (len(repo.history("main")), list(repo.tags)) == (2, ["v1"])
    assert len(hub.sent("PUT")) == (1 if "upload" in fault["path"] else 0)  # what had arrived is not sent again


def test_no_network(folder, unverified, impatient, capsys, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
        assert main(["push", str(folder), NAME]) == 2
    assert re.match(r"The Hub at http://127\.0\.0\.1:\d+ cannot be reached \(ConnectError\)", error(capsys))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(folder), NAME]) == 2
    assert error(capsys) == "HF_HUB_OFFLINE forbids every request to the Hub: unset it."


def test_a_full_disk_here(hub, token, folder, unverified, capsys, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        assert main(["push", str(folder), NAME]) == 2
        assert error(capsys).startswith("The disk is full: make room, or set TMPDIR")
    usage = shutil.disk_usage(folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert main(["push", str(folder), NAME]) == 2
    assert re.search(r"has 10 B free and \S+ kB are needed: set TMPDIR", error(capsys))
    assert changed(hub) == []


def test_what_comes_back_different_gets_no_tag(hub, token, folder, unverified, capsys, monkeypatch):
    commit_once = publish.commit_once

    def corrupted(*args):
        made = commit_once(*args)
        name = "generation_config.json"
        path = hub.objects.path(hub.model(NAME).files(made)[name].sha256)
        path.write_bytes(path.read_bytes().replace(b"true", b"null"))
        return made

    monkeypatch.setattr(publish, "commit_once", corrupted)
    assert main(["push", str(folder), NAME]) == 2
    assert re.search(r"without a tag: generation_config\.json came back different from what was sent", error(capsys))
    assert hub.model(NAME).tags == {}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"method": "POST", "path": "/tag/", "status": 500}, r"an internal error \(500\)"),
        ({"method": "POST", "path": "/tag/", "received": 0}, r"cannot be reached \(\w+\): check the network"),
        ({"method": "GET", "path": "/object/", "status": 403}, r"may not read acme/tiny"),
    ],
)
def test_a_failure_after_the_commit_says_that_it_stands(
    fault, reason, hub, token, folder, unverified, impatient, capsys
):
    hub.fault(times=99, **fault)
    assert main(["push", str(folder), NAME]) == 2
    repo, said = hub.model(NAME), error(capsys)
    head = repo.branches["main"]
    assert (len(repo.history("main")), repo.tags) == (2, {})
    assert re.match(rf"acme/tiny has the commit {head[:8]}, without a tag: .*{reason}.*\. The commit stands: ", said)
    assert f"`hf repos tag create acme/tiny v1 --revision {head}`" in said
    hub.faults.clear()
    hub.requests.clear()
    assert main(["push", str(folder), NAME]) == 0  # what the sentence proposes
    assert repo.tags == {"v1": head} == {"v1": repo.branches["main"]}
    assert hub.sent("PUT") == hub.sent("POST", "/commit/") == []


def test_an_interruption_after_the_commit_says_that_it_stands(hub, token, folder, unverified, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "answer_of_a_stranger", interrupted)
    assert main(["push", str(folder), NAME]) == 130
    head = hub.model(NAME).branches["main"]
    assert f"acme/tiny has the commit {head[:8]}, without a tag. The commit stands: " in capsys.readouterr().err


def test_a_download_that_fails_once_is_repeated(hub, token, folder, unverified, impatient):
    hub.fault(method="GET", path="/object/", status=500)
    hub.fault(method="HEAD", path="/resolve/", status=500)
    assert main(["push", str(folder), NAME]) == 0
    assert list(hub.model(NAME).tags) == ["v1"]


def test_a_server_without_xet_gets_its_files_by_lfs(hub, token, folder, unverified, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert main(["push", str(folder), NAME]) == 0
    assert len(hub.sent("PUT", "/upload/")) == 1
    assert constants.HF_HUB_DISABLE_XET is False


# Tokens


def test_secrets_are_redacted(monkeypatch, caplog, recwarn):
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    line = f"PUT https://a.b/c?X-Amz-Signature=abc&x=1 with Bearer xyz, {HUB_TOKEN}, unusual-token, and this."
    clean = "PUT https://a.b/c?[hidden] with Bearer [hidden] [hidden], [hidden], and this."
    assert redact(line) == clean
    import logging
    import warnings

    with redacted():
        logging.getLogger("huggingface_hub.some.child").warning("%s!", line)
        try:
            raise RuntimeError(line)
        except RuntimeError:
            logging.getLogger("anything").exception("failed")
    assert caplog.messages[0] == clean + "!"
    assert "abc&x=1" not in caplog.text
    assert HUB_TOKEN not in caplog.text
    with warnings.catch_warnings(record=False):
        warnings.simplefilter("always")
        shown = []
        monkeypatch.setattr(warnings, "showwarning", lambda message, *rest, **more: shown.append(str(message)))
        with redacted():
            warnings.warn(line, stacklevel=1)
    assert shown == [clean]


def assert_nowhere(token, hub, done, folder):
    """That a token is in no file, no output and no request but in its headers, and no signature in the output."""
    said = (done.stdout + done.stderr).encode()
    sent = {str(seen): seen.body + seen.path.encode() + seen.query.encode() for seen in hub.requests}
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(written) > 20
    assert sum(map(len, sent.values())) > 100_000
    for where, data in {"output": said, **written, **sent}.items():
        assert token.encode() not in data, where
    assert not [signature for signature in hub.signatures if signature.encode() in said]
    for seen in hub.requests:
        for name, value in seen.headers.items():
            assert token not in value or (name == "authorization" and seen.origin == "hub")


# The whole way


def push_in_a_process(hub, token, folder, home, *arguments, **variables):
    return subprocess.run(**command(hub, token, folder, home, *arguments, **variables), timeout=200)


def command(hub, token, folder, home, *arguments, **variables):
    """How a person runs a push, on a computer of their own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    (home / "tmp").mkdir(exist_ok=True)
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home / "home"), **variables}
    return {
        "args": [sys.executable, "-m", "ms_resampler_cli.main", "push", str(folder), NAME, *arguments],
        "env": kept | {"TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"} | variables,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


A_STRANGER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
name, revision, inputs, result = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True)
AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
assert not [module for module in sys.modules if module.partition(".")[0] == "ms_resampler"]
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, result)
"""


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True])
def test_what_is_pushed_loads_for_a_stranger(xet, folder, tmp_path):
    """Elsewhere, online, by name and tag, with a token of their own; the publisher's token is nowhere to be found."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "elsewhere").mkdir()
    no_xet = {"HF_HUB_DISABLE_XET": "0" if xet else "1"}
    loud = {"HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    with LoopbackHub(tmp_path / "hub", xet=xet) as hub:
        hub.fault(method="PUT", status=503)  # makes the client print the address it will try again
        token = hub.add_user("ada", orgs={"acme": "write"})
        done = push_in_a_process(hub, token, folder, tmp_path, **no_xet, **loud)
        assert done.returncode == 0, done.stderr
        assert len(hub.sent("PUT")) == (0 if xet else 2)
        assert xet or "?[hidden]" in done.stderr
        assert_nowhere(token, hub, done, tmp_path)
        processor, model = tiny_processor(), tiny_model()
        inputs = processor(images=Image.new("RGB", (30, 40), "red"), text="<image> What?", return_tensors="pt")
        save_file({name: inputs[name].contiguous() for name in inputs}, tmp_path / "inputs")
        reader = hub.add_user("bob", orgs={"acme": "read"})
        options = command(hub, reader, folder, tmp_path, HF_HOME=str(tmp_path / "elsewhere" / "home"), **no_xet)
        options["env"].pop("PYTHONPATH", None)
        options["args"] = [sys.executable, "-I", "-c", A_STRANGER, NAME, "v1"]
        options["args"] += [str(tmp_path / "inputs"), str(tmp_path / "logits")]
        done = subprocess.run(**options, cwd=tmp_path / "elsewhere", timeout=200)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_killed_upload_run_again_sends_only_what_is_missing(hub, token, folder, unverified, tmp_path):
    hub.fault(method="PUT", nth=2, times=99, seconds=100)
    options = ["--max-shard-size", "30KB"]
    with subprocess.Popen(**command(hub, token, folder, tmp_path, *options)) as killed:
        while not any(seen.status for seen in hub.sent("PUT")[1:]):
            assert killed.poll() is None, killed.stderr.read()
            time.sleep(0.05)
        killed.kill()
    repo, arrived = hub.model(NAME), {path.name for path in hub.objects.folder.iterdir()}
    assert (len(repo.history("main")), repo.tags) == (1, {})
    hub.faults.clear()
    hub.requests.clear()
    assert main(["push", str(folder), NAME, *options]) == 0
    shards = {file.sha256 for file in repo.files("v1").values() if file.lfs}
    assert {seen.path.rpartition("/")[2] for seen in hub.sent("PUT")} == shards - arrived
    assert 0 < len(shards - arrived) < len(shards)
    assert len(repo.history("main")) == 2


@pytest.mark.slow
def test_a_projector_alone_fits_into_another_model_of_its_base(hub, token, folder, tmp_path):
    """By the code of its own card, on a base whose projector is another one."""
    base = tiny_model(projector={"projector_type": "mlp", "visual_tokens": [6, 6]})
    base.save_pretrained(tmp_path / "base")
    HfApi(endpoint=hub.url).create_repo("acme/base")
    HfApi(endpoint=hub.url).upload_folder(repo_id="acme/base", folder_path=tmp_path / "base")
    assert main(["push", str(folder), NAME, "--projector-only", "acme/base"]) == 0
    files = hub.model(NAME).files("v1")
    card = hub.objects.path(files["README.md"].sha256).read_text()
    assert "\nbase_model: acme/base\n" in card
    assert "\nbase_model_relation: adapter\n" in card
    assert "model.safetensors" not in files
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1] + SAVE_STATE
    options = command(hub, token, folder, tmp_path)
    options["args"] = [sys.executable, "-I", "-c", code, str(tmp_path / "state")]
    done = subprocess.run(**options, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    loaded, whole, other = load_file(tmp_path / "state"), tiny_model().state_dict(), base.state_dict()
    assert loaded.keys() == whole.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, (whole if name.startswith("model.projector.") else other)[name]), name


SAVE_STATE = """
import sys
from safetensors.torch import save_file
save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, sys.argv[1])
"""


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_not_sent(hub, token, folder, capsys):
    broken = load_file(folder / "model.safetensors")
    broken["model.language_model.norm.weight"].fill_(3e38)
    save_file(broken, folder / "model.safetensors", {"format": "pt"})
    assert main(["push", str(folder), NAME]) == 2
    assert "It does not load without this package: the logits are not finite" in error(capsys)
    assert changed(hub) == []


def test_hashes_are_those_of_git_and_lfs(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"some text")
    assert plan.same_content(file, git_oid(b"some text"))
    assert plan.same_content(file, "b94f6f125c79e3a5ffaa826f584c10d52ada669e6762051b826b55776d05aed2")
    assert not plan.same_content(file, "0" * 40)
