"""Checks a repository on the Hub: its files, the code it runs, and that it loads without this package."""

import filecmp
import glob
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers.utils import logging

from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import PROJECTOR, remote_code_files, temporary_folder
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..processing_ms_resampler import MSResamplerProcessor
from .client import check_repository_name, hub_errors, patiently
from .code import code_problem
from .inspect import check_content, is_pickle
from .plan import Plan, hashes_at, same_content, size
from .staging import check_checkpoint, is_ours

# A processor needs one of each.
PROCESSOR_FILES = (
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer.json", "tokenizer.model", "vocab.json"),
)
STRANGER = Path(__file__).parent / "stranger.py"


def verify(repository: str, *, allow_code: str | None = None) -> None:
    """Downloads ORG/NAME[@REVISION] to a temporary folder and checks it; none of its code runs.

    Prints the commit and the hash of its code. Raises ValueError if a file should not be there, is missing or damaged,
    differs from the Hub's hash, or refers to code of another repository; and if its code is neither this package's nor
    has the hash `allow_code`.
    """
    with temporary_folder("ms-resampler-verify") as place:
        download_checked(repository, place / "files", allow_code)


def pull(repository: str, folder: Path | str | None = None, *, allow_code: str | None = None) -> Path:
    """Downloads ORG/NAME[@REVISION] into a new folder (default: NAME), and keeps it if `verify` accepts it.

    An interrupted download resumes.
    """
    folder = Path(folder or repository.partition("@")[0].rpartition("/")[2])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder.")
    partial = folder.with_name(f"{folder.name}.partial")
    download_checked(repository, partial, allow_code)
    partial.replace(folder)
    print(f"It is in {folder}.")
    return folder


def download_checked(repository: str, folder: Path, allow_code: str | None) -> None:
    """Downloads a repository into a folder and checks it; files that exist already are not downloaded again."""
    name, _, revision = repository.partition("@")
    check_repository_name(name)
    with hub_errors(name, "read"):
        api = HfApi()
        commit = patiently(api.repo_info, name, revision=revision or "main").sha
        assert commit is not None
        hashes = hashes_at(api, name, commit)
        hashes.pop(".gitattributes", None)
        strangers = [file for file in hashes if not is_ours(file)]
        if strangers:
            raise ValueError(
                f"{name} has files that do not belong to a checkpoint: {', '.join(strangers)}. Nothing was downloaded."
            )
        download(api, name, commit, hashes, local_dir=folder)
    for file in folder.iterdir():
        if file.name not in hashes:  # the client's cache, and files of an earlier download of another revision
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    check_files(name, folder, hashes)
    check_checkpoint(folder, name)
    if problem := code_problem(folder):
        raise ValueError(f"{problem[0]} of {name} {problem[1]}.")
    total = sum((folder / file).stat().st_size for file in hashes)
    print(f"{name} at {commit}: {len(hashes)} files of {size(total)}, all with the hashes that the Hub has for them.")
    if check_code(name, folder, allow_code) and (problem := misfit(folder)):
        raise ValueError(f"{problem[0]} of {name} {problem[1]}.")


def download(api: HfApi, name: str, commit: str, files: Iterable[str], **place: Path) -> Path:
    """Downloads files of a commit; retries missing ones after a transient failure."""
    patterns = [glob.escape(file) for file in files]
    with hub_errors(name, "read"):
        return Path(patiently(api.snapshot_download, name, revision=commit, allow_patterns=patterns, **place))


def check_files(name: str, folder: Path, hashes: dict[str, str]) -> None:
    """Raises ValueError for files whose content does not match their hash or their name."""
    received = {file: (folder / file).is_file() and same_content(folder / file, hashes[file]) for file in hashes}
    different = [file for file, same in received.items() if not same]
    if different:
        raise ValueError(f"{', '.join(different)} of {name} came with other content than the Hub states: try again.")
    for file in hashes:
        if is_pickle(folder / file):
            raise ValueError(f"{file} of {name} is a pickle or an archive, which can run code where it is opened.")
        try:
            check_content(folder / file)
        except ValueError as error:
            raise ValueError(f"{file} of {name} is damaged ({error}), as it was published.") from error


def misfit(folder: Path) -> tuple[str, str] | None:
    """Builds model and processor with the package's code; returns the file that makes this fail, and why.

    The weights are not read: the model is built on PyTorch's meta device.
    """
    for names in PROCESSOR_FILES:
        if not any((folder / name).is_file() for name in names):
            return names[0], "is missing"
    try:
        with quiet():
            MSResamplerProcessor.from_pretrained(folder)
            model: Any = MSResamplerForConditionalGeneration
            if (folder / PROJECTOR).is_file():
                with torch.device("meta"):
                    model = model(MSResamplerConfig.from_pretrained(folder)).model
                parts = dict(model.named_children())
                trained = torch.nn.ModuleDict({name: parts[name] for name in ("projector", "fusion") if name in parts})
                trained.load_state_dict(projector_state(folder / PROJECTOR), assign=True)
                return None
            if getattr(MSResamplerConfig.from_pretrained(folder), "quantization_config", None):
                return None  # only the quantizer knows the names of its tensors
            options: dict[str, Any] = {"device_map": {"": "meta"}, "output_loading_info": True}
            _, found = model.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        return "config.json", f"and its files do not make a model ({' '.join(str(error).split())[:300]})"
    wrong = [*sorted(found["missing_keys"]), *(name for name, *_ in sorted(found["mismatched_keys"]))]
    if wrong:
        return "config.json", f"asks for weights that are missing or of another size: {', '.join(wrong[:5])}"
    return None


def projector_state(file: Path) -> dict[str, torch.Tensor]:
    """The weights of a projector, and of the pre-fusion beside it, by their names in the base model."""
    return {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' reports and progress bars; errors are read from its return values."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_code(name: str, folder: Path, allowed: str | None) -> bool:
    """Prints a line that compares the repository's code with this package's; returns whether they are equal.

    Raises ValueError if they differ, unless `allowed` is the hash of the repository's code (at least 16 digits).
    """
    ours = {file.name: hash_of(file) for file in remote_code_files()}
    theirs = {file.name: hash_of(file) for file in folder.glob("*.py")}
    found = code_hash(theirs)
    if theirs == ours:
        print(f"Code: sha256 {found[:16]}, the same as this package's.")
        return True
    other = [file for file in sorted(ours | theirs) if ours.get(file) != theirs.get(file)]
    told = f"while this package's is {code_hash(ours)[:16]}; they differ in {', '.join(other)}."
    print(f"Code: sha256 {found[:16]}, {told}")
    if not (allowed and len(allowed) >= 16 and found.startswith(allowed.lower())):
        raise ValueError(
            f"{name} runs code that is not this package's: read {', '.join(file for file in other if file in theirs)} "
            f"on its page, and accept it with --allow-code {found}."
        )
    return False


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
    folder = download(api, name, commit, plan.sizes, cache_dir=home / "hub")
    different = [file for file in plan.sizes if not same_bytes(folder / file, plan.staged / file)]
    if different:
        raise ValueError(f"{', '.join(different)} came back different from what was sent")
    if answer_of_a_stranger(name, revision=commit, hf_home=home) != answer:
        raise ValueError("loaded from there, it answers differently")


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files exist and are equal."""
    return one.is_file() and filecmp.cmp(one, other, shallow=False)


def answer_of_a_stranger(checkpoint: str, *, revision: str = "", hf_home: Path | None = None) -> bytes:
    """Loads a folder, or a cached repository, in an offline process without this package.

    Returns its logits and its answer through the Auto classes, as bytes. Raises ValueError with the process's last
    line of output if the checkpoint cannot be loaded or does not answer.
    """
    with temporary_folder("ms-resampler-stranger") as place:
        result, home = place / "result.safetensors", str(hf_home or place)
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
