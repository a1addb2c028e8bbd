"""`ms-resampler verify`: what a repository holds, and whose code it runs, before anything of it is loaded."""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .client import check_repository_name, hub_errors, large_file_transfer, patiently
from .inspect import check_content, is_pickle
from .plan import hashes_at, same_content, size
from .staging import is_ours, remote_code_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `verify`."""
    parser.add_argument("repository", metavar="ORG/NAME[@REVISION]", help="what to check (default revision: main)")


def run(arguments: argparse.Namespace) -> int:
    """Downloads the revision to a place of its own, checks it, and says what it found."""
    with tempfile.TemporaryDirectory(prefix="ms-resampler-verify-") as place:
        download_checked(arguments.repository, Path(place))
    return 0


def download_checked(repository: str, folder: Path) -> None:
    """Downloads ORG/NAME[@REVISION] into a folder; files that are there already are not fetched again.

    Prints the commit and the code's hash. Raises ValueError if a file should not be there, is not what the Hub says it
    is, or if the configuration sends its readers to another repository for code.
    """
    name, _, revision = repository.partition("@")
    check_repository_name(name)
    with hub_errors(name):
        api = HfApi()
        commit = patiently(api.repo_info, name, revision=revision or "main").sha
        assert commit is not None
        hashes = hashes_at(api, name, commit)
        hashes.pop(".gitattributes", None)
        check_names(name, hashes)
        with large_file_transfer(api, name):
            api.snapshot_download(name, revision=commit, local_dir=folder, allow_patterns=list(hashes))
    check_files(name, folder, hashes)
    check_code_references(name, folder)
    total = sum((folder / file).stat().st_size for file in hashes)
    print(f"{name} at {commit}: {len(hashes)} files of {size(total)}, all with the hashes that the Hub has for them.")
    print(compare_code(folder))


def check_names(name: str, files: Iterable[str]) -> None:
    """Raises ValueError for files that no checkpoint of ours has."""
    strangers = [file for file in files if not is_ours(file)]
    if strangers:
        raise ValueError(
            f"{name} holds what no checkpoint of ours does: {', '.join(strangers)}. Nothing was downloaded."
        )


def check_files(name: str, folder: Path, hashes: dict[str, str]) -> None:
    """Raises ValueError for files whose content is not the one of the hash, or not what the file's name says."""
    different = [file for file, expected in hashes.items() if not same_content(folder / file, expected)]
    if different:
        raise ValueError(f"{', '.join(different)} of {name} came with another content than the Hub says: try again.")
    for file in hashes:
        if is_pickle(folder / file):
            raise ValueError(f"{file} of {name} is a pickle, which can run code where it is opened.")
        check_content(folder / file)


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
    ours = {file.name: file for file in remote_code_files()}
    theirs = {file.name: file for file in folder.glob("*.py")}
    told = f"Code: sha256 {code_hash(theirs.values())[:16]}, "
    if code_hash(theirs.values()) == code_hash(ours.values()):
        return told + "the same as this package's."
    other = [name for name in sorted(ours | theirs) if not same(ours.get(name), theirs.get(name))]
    return told + f"while this package's is {code_hash(ours.values())[:16]}; they differ in {', '.join(other)}."


def same(one: Path | None, other: Path | None) -> bool:
    """Whether two files are both there, with the same content."""
    return one is not None and other is not None and one.read_bytes() == other.read_bytes()


def code_hash(files: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of files."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
