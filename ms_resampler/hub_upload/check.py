"""Checks what is on the Hub: its files, whose code it runs, and what a stranger's process answers with it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from .client import check_repository_name, hub_errors, large_file_transfer, patiently
from .inspect import check_content, is_pickle
from .plan import Plan, hashes_at, same_content, size
from .staging import is_ours, remote_code_files

STRANGER = Path(__file__).parent / "stranger.py"


def verify(repository: str) -> None:
    """Downloads ORG/NAME[@REVISION] to a temporary folder and checks it; nothing of it is loaded.

    Prints the commit and the hash of its code. Raises ValueError if a file should not be there, is not what the Hub
    says it is, or if the configuration sends its readers to another repository for code.
    """
    with TemporaryDirectory(prefix="ms-resampler-verify-") as place:
        download_checked(repository, Path(place))


def pull(repository: str, folder: Path | str | None = None) -> Path:
    """Downloads ORG/NAME[@REVISION] into a new folder (default: NAME), and keeps it if `verify` would.

    A download that was killed goes on where it stopped.
    """
    folder = Path(folder or repository.partition("@")[0].rpartition("/")[2])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder.")
    partial = folder.with_name(f"{folder.name}.partial")
    download_checked(repository, partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes on what it has fetched
    partial.replace(folder)
    print(f"It is in {folder}.")
    return folder


def download_checked(repository: str, folder: Path) -> None:
    """Downloads a repository into a folder and checks it; files that are there already are not fetched again."""
    name, _, revision = repository.partition("@")
    check_repository_name(name)
    with hub_errors(name):
        api = HfApi()
        commit = patiently(api.repo_info, name, revision=revision or "main").sha
        assert commit is not None
        hashes = hashes_at(api, name, commit)
        hashes.pop(".gitattributes", None)
        strangers = [file for file in hashes if not is_ours(file)]
        if strangers:
            raise ValueError(
                f"{name} holds what no checkpoint of ours does: {', '.join(strangers)}. Nothing was downloaded."
            )
        with large_file_transfer(api, name):
            api.snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=list(hashes))
    check_files(name, folder, hashes)
    check_code_references(name, folder)
    total = sum((folder / file).stat().st_size for file in hashes)
    print(f"{name} at {commit}: {len(hashes)} files of {size(total)}, all with the hashes that the Hub has for them.")
    print(compare_code(folder))


def check_files(name: str, folder: Path, hashes: dict[str, str]) -> None:
    """Raises ValueError for files whose content is not the one of the hash, or not what the file's name says."""
    different = [file for file, expected in hashes.items() if not same_content(folder / file, expected)]
    if different:
        raise ValueError(f"{', '.join(different)} of {name} came with another content than the Hub says: try again.")
    for file in hashes:
        if is_pickle(folder / file):
            raise ValueError(f"{file} of {name} is a pickle, which can run code where it is opened.")
        try:
            check_content(folder / file)
        except ValueError as error:
            raise ValueError(f"{file} of {name} is damaged ({error}): it was published so.") from error


def check_code_references(name: str, folder: Path) -> None:
    """Raises ValueError unless every class that the configurations name is in the repository itself."""
    for file in sorted(folder.glob("*config.json")):
        for reference in code_references(json.loads(file.read_text(encoding="utf-8"))):
            if "--" in reference:
                raise ValueError(f"{file.name} of {name} sends its readers to another repository: {reference}.")
            if not (folder / f"{reference.partition('.')[0]}.py").is_file():
                raise ValueError(f"{file.name} of {name} names code that is not there: {reference}.")


def code_references(config: Any) -> Iterator[str]:
    """Every class that an `auto_map` of a configuration names, however deep: "module.Class" or "repo--module.Class"."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "auto_map":
                for named in value.values():
                    yield from filter(None, named if isinstance(named, list) else [named])
            else:
                yield from code_references(value)
    elif isinstance(config, list):
        for value in config:
            yield from code_references(value)


def compare_code(folder: Path) -> str:
    """One line on the repository's code beside this package's."""
    ours = {file.name: hash_of(file) for file in remote_code_files()}
    theirs = {file.name: hash_of(file) for file in folder.glob("*.py")}
    told = f"Code: sha256 {code_hash(theirs)[:16]}, "
    if theirs == ours:
        return told + "the same as this package's."
    other = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    return told + f"while this package's is {code_hash(ours)[:16]}; they differ in {', '.join(other)}."


def hash_of(file: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def code_hash(hashes: dict[str, str]) -> str:
    """SHA-256 of the names and hashes of files."""
    lines = "".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def check_published(api: HfApi, plan: Plan, commit: str, home: Path, answer: bytes) -> None:
    """Downloads a commit into an empty cache; compares its files and its logits with the staged ones, bit by bit."""
    name = plan.remote.name
    problem = f"{name} has the commit {commit[:8]}, without a tag"
    with large_file_transfer(api, name):
        folder = Path(
            api.snapshot_download(name, revision=commit, cache_dir=home / "hub", allow_patterns=[*plan.sizes])
        )
    different = [file for file in plan.sizes if not same_bytes(folder / file, plan.staged / file)]
    if different:
        raise ValueError(f"{problem}: {', '.join(different)} came back different from what was sent.")
    if answer_of_a_stranger(name, revision=commit, hf_home=home) != answer:
        raise ValueError(f"{problem}: loaded from there, it answers differently.")


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are there and equal."""
    if not one.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        return all(first.read(2**20) == block for block in iter(lambda: second.read(2**20), b""))


def answer_of_a_stranger(checkpoint: str, *, revision: str = "", hf_home: Path | None = None) -> bytes:
    """Loads a folder, or a repository out of a cache, in a process that has neither this package, nor the network.

    Returns its logits and its answer through the Auto classes, as bytes. Raises ValueError with the process's last
    words if the checkpoint cannot be loaded or does not answer.
    """
    with TemporaryDirectory(prefix="ms-resampler-stranger-") as place:
        result, home = Path(place, "result.safetensors"), str(hf_home or place)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-P", str(STRANGER), checkpoint, revision, str(result)],
            env=kept | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            cwd=place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ValueError(f"It does not load without this package: {last}")
        return result.read_bytes()
