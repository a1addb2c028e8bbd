"""What a Hub keeps: content-addressed objects on disk; repositories of commits, branches, tags and pull requests."""

import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Objects:
    """Files named by the SHA-256 of their content; one is there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def __contains__(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def add(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        with tempfile.NamedTemporaryFile(dir=self.folder.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, self.path(sha256))
        return sha256

    async def receive(self, chunks: AsyncIterator[bytes], expected: str) -> bool:
        """Stores a stream if its hash is the expected one; leaves nothing behind if it breaks off."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.folder.parent, delete=False) as file:
            try:
                async for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            except BaseException:
                os.unlink(file.name)
                raise
        if digest.hexdigest() != expected:
            os.unlink(file.name)
            return False
        os.replace(file.name, self.path(expected))
        return True


@dataclass(frozen=True)
class File:
    """A file of a commit: `lfs` ones are kept as a pointer in git."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    def described(self, path: str) -> dict:
        """As the tree and paths-info routes tell it."""
        told = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.lfs:
            told["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return told

    @property
    def pointer_size(self) -> int:
        return len(lfs_pointer(self.sha256, self.size))


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    files: dict[str, File]

    @property
    def id(self) -> str:
        told = [self.parent, self.title, sorted((path, file.sha256) for path, file in self.files.items())]
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, dict] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    stages: list[str] = field(default_factory=lambda: ["RUNNING"])

    def commit(self, branch: str, title: str, files: dict[str, File]) -> str:
        """Puts a commit on a branch or pull request; returns its id."""
        made = Commit(self.branches.get(branch), title, files)
        self.commits[made.id] = made
        self.branches[branch] = made.id
        return made.id

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or (short) id names."""
        found = self.branches.get(revision) or self.tags.get(revision)
        if found is None and len(revision) >= 7:
            found = next((commit for commit in self.commits if commit.startswith(revision)), None)
        return found

    def files(self, revision: str) -> dict[str, File]:
        commit = self.resolve(revision)
        assert commit is not None, revision
        return self.commits[commit].files

    def history(self, revision: str) -> list[str]:
        """The ids from a revision to the first commit."""
        found, commit = [], self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit].parent
        return found
