"""What a push would change: the staged files compared with those of the repository."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from .client import patiently


@dataclass(frozen=True)
class Remote:
    """The state of a repository: `head` is the commit to build on, `hashes` are those of its files' contents.

    `private` is None if the server does not report it.
    """

    name: str
    kind: str = "model"
    exists: bool = False
    private: bool | None = True
    has_branch: bool = True
    head: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def look_at(api: HfApi, name: str, branch: str, kind: str = "model") -> Remote:
    """The state of a repository's branch, or of main without it; an invisible repository counts as new."""
    try:
        about = patiently(api.repo_info, name, repo_type=kind)
        has_branch = True
        try:
            about = patiently(api.repo_info, name, revision=branch, repo_type=kind)
        except RevisionNotFoundError:
            has_branch = False
    except RepositoryNotFoundError:
        return Remote(name, kind)
    refs = patiently(api.list_repo_refs, name, repo_type=kind)
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    hashes = hashes_at(api, name, about.sha, kind) if about.sha else {}
    return Remote(name, kind, True, about.private, has_branch, about.sha, hashes, tags)


def as_visible_as(remote: Remote, private: bool) -> Remote:
    """The repository, if its visibility is as requested.

    Raises ValueError if a private push would be public, or the other way round.
    """
    if not remote.exists or remote.private is None:
        return replace(remote, private=private)
    if remote.private != private:
        found, remedy = ("private", "leave out --public") if remote.private else ("public", "give --public")
        raise ValueError(f"{remote.name} exists and is {found}: {remedy}, or change it on its settings page.")
    return remote


def hashes_at(api: HfApi, name: str, commit: str, kind: str = "model") -> dict[str, str]:
    """SHA-256 of every large file of a commit, git's hash of the others."""
    entries = patiently(lambda: list(api.list_repo_tree(name, recursive=True, revision=commit, repo_type=kind)))
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def same_content(file: Path, remote_hash: str) -> bool:
    """Whether a file has the content of a remote hash, of either kind."""
    with file.open("rb") as opened:
        if len(remote_hash) == 64:
            return hashlib.file_digest(opened, "sha256").hexdigest() == remote_hash
        return sha.git_hash(opened.read()) == remote_hash


@dataclass(frozen=True)
class Plan:
    """What a push does with each file of the folder `staged`, and with those of the repository.

    `left_out` files are not sent; `kept` are the repository's files that this package did not write.
    """

    staged: Path
    remote: Remote
    branch: str
    sizes: dict[str, int]
    states: dict[str, str]
    removed: list[str]
    kept: list[str]
    left_out: list[str]

    @property
    def to_send(self) -> list[str]:
        return [name for name, state in self.states.items() if state != "same"]

    @property
    def changes(self) -> bool:
        return bool(self.to_send or self.removed)


def make_plan(
    staged: Path, remote: Remote, branch: str, may_remove: Callable[[str], bool], left_out: Iterable[str] = ()
) -> Plan:
    """Compares a staged folder with a repository; its other files are removed if `may_remove` allows it."""
    files = {str(file.relative_to(staged)): file for file in sorted(staged.rglob("*")) if file.is_file()}
    states = {name: state_of(file, remote.hashes.get(name)) for name, file in files.items()}
    others = [name for name in remote.hashes if name not in files and name != ".gitattributes"]
    removed = [name for name in others if may_remove(name)]
    kept = [name for name in others if not may_remove(name)]
    sizes = {name: file.stat().st_size for name, file in files.items()}
    return Plan(staged, remote, branch, sizes, states, removed, kept, list(left_out))


def state_of(file: Path, remote_hash: str | None) -> str:
    """Whether a file is new to the repository, changed, or the same."""
    if remote_hash is None:
        return "new"
    return "same" if same_content(file, remote_hash) else "changed"


def describe(plan: Plan) -> str:
    """The plan as text, shown before anything is sent."""
    remote = plan.remote
    state = "new repository" if not remote.exists else f"at {(remote.head or '')[:8]}"
    lines = [f"{remote.name} ({'private' if remote.private else 'public'}, {state}), branch {plan.branch}:"]
    lines += [f"  {state:8s} {size(plan.sizes[name]):>9s}  {name}" for name, state in plan.states.items()]
    lines += [f"  {'remove':8s} {'':>9s}  {name}" for name in plan.removed]
    lines += [f"  {'kept':8s} {'':>9s}  {name} (not from here)" for name in plan.kept]
    to_send = sum(plan.sizes[name] for name in plan.to_send)
    lines.append(f"{len(plan.sizes)} files of {size(sum(plan.sizes.values()))}; to send: {size(to_send)}.")
    if plan.left_out:
        lines.append(f"Stays here: {', '.join(plan.left_out)}.")
    return "\n".join(lines)


def size(count: int) -> str:
    """A readable number of bytes: "23.1 MB"."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
