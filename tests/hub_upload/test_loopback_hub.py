"""The loopback Hub itself, through the real client and the `hf` command: what the tests of publishing stand on."""

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from loopback_hub import LoopbackHub
from loopback_hub.xet import stored_files

NAME = "acme/model"


@pytest.fixture
def api(hub):
    """A client whose token may write to acme, and a private repository there."""
    api = HfApi(endpoint=hub.url, token=hub.add_user("ada", orgs={"acme": "write"}))
    api.create_repo(NAME, private=True)
    return api


def weights(folder: Path, size: int = 250_000) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(os.urandom(size))
    return path


def commit(api: HfApi, path: Path | None = None, text: str = "hello", **options):
    operations = [CommitOperationAdd("notes.txt", text.encode())]
    if path is not None:
        operations.append(CommitOperationAdd(path.name, str(path)))
    return api.create_commit(NAME, operations, commit_message="a commit", **options)


@pytest.mark.parametrize(("xet", "part_size"), [(False, 2**40), (False, 100_000), (True, 2**40)])
def test_files_come_back_whole_and_no_token_reaches_the_second_origin(xet, part_size, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    (tmp_path / "hub").mkdir()
    path = weights(tmp_path)
    with LoopbackHub(tmp_path / "hub", xet=xet, part_size=part_size, page_size=2) as hub:
        api = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
        api.create_repo("ada/model", private=True)
        api.create_commit("ada/model", [CommitOperationAdd(path.name, str(path))], commit_message="weights")
        assert len(hub.sent("PUT", "/upload/")) == (1 if not xet and part_size > 250_000 else 0)
        assert len(hub.sent("PUT", "/part/")) == (3 if part_size == 100_000 else 0)
        folder = Path(api.snapshot_download("ada/model", cache_dir=tmp_path / "cache"))
        assert (folder / path.name).read_bytes() == path.read_bytes()
        assert (len(stored_files(hub.xet_store)) == 1) if xet else hub.xet_store is None
        assert not [seen for seen in hub.requests if seen.origin == "storage" and "authorization" in seen.headers]
        address = f"{hub.url}/ada/model/resolve/main/{path.name}"
        moved = httpx2.get(address, headers={"authorization": f"Bearer {api.token}"})
        assert httpx2.get(moved.headers["location"]).content == path.read_bytes()
        leaked = httpx2.get(moved.headers["location"], headers={"authorization": f"Bearer {api.token}"})
        assert leaked.status_code == 400


def test_files_are_listed_by_pages_described_and_deleted(api, hub, tmp_path):
    hub.page_size = 1
    path = weights(tmp_path)
    commit(api, path)
    listed = {file.path: file for file in api.list_repo_tree(NAME, recursive=True)}
    assert list(listed) == [".gitattributes", "model.safetensors", "notes.txt"]
    assert api.get_paths_info(NAME, "model.safetensors")[0].lfs == listed["model.safetensors"].lfs
    assert listed["model.safetensors"].lfs.size == 250_000
    api.create_commit(NAME, [CommitOperationDelete("model.safetensors")], commit_message="without")
    assert api.list_repo_files(NAME) == [".gitattributes", "notes.txt"]


def test_the_client_survives_a_500_and_a_connection_that_breaks(api, hub, tmp_path):
    path = weights(tmp_path, 1_000_000)
    hub.fault(method="PUT", status=500)
    hub.fault(method="POST", path="/preupload/", received=0)
    commit(api, path)
    assert [seen.status for seen in hub.sent("PUT")] == [500, 200]
    assert [seen.status for seen in hub.sent("POST", "/preupload/")] == [None, 200]
    hub.fault(method="GET", path="/object/", sent=300_000)
    hub.fault(method="GET", path="/object/", nth=2, seconds=0.001)
    folder = Path(api.snapshot_download(NAME, cache_dir=tmp_path / "cache"))
    assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(hub.sent("GET", "/object/")) == 2
    address = f"{hub.storage_url}{hub.sent('GET', '/object/')[0].path}?X-Amz-Signature={hub.sign()}"
    rest = httpx2.get(address, headers={"range": "bytes=300000-"})
    assert (rest.status_code, rest.content) == (206, path.read_bytes()[300_000:])


@pytest.mark.slow
def test_the_hf_command_uploads_and_downloads(api, hub, tmp_path):
    path = weights(tmp_path)
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": api.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    hf = [str(Path(sys.executable).with_name("hf"))]
    environment = os.environ | variables | {"HF_HOME": str(tmp_path / "home")}
    for command in (["upload", NAME, str(path)], ["download", NAME, "--local-dir", str(tmp_path / "copy")]):
        done = subprocess.run(hf + command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
