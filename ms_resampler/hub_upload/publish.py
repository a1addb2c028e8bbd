"""Publishes in one commit and a tag, so that a repository is never half-published."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from .client import WAITS, hub_errors, is_transient, large_file_transfer, patiently, sentence
from .plan import Plan, Remote, hashes_at, same_content
from .secrets import redact


class Published(NamedTuple):
    """A commit, and the address of the pull request that proposes it, if one does."""

    commit: str
    pull_request: str | None = None


def publish(api: HfApi, plan: Plan, message: str, *, create_pr: bool = False) -> Published:
    """Creates repository and branch if needed, and makes one commit.

    The commit builds on the state that the plan was made for, and is refused if the state has changed.
    """
    remote, branch = plan.remote, plan.branch
    parent = remote.head if remote.exists else create(api, remote)
    if not remote.has_branch or (not remote.exists and branch != "main"):
        patiently(api.create_branch, remote.name, branch=branch, revision=parent, repo_type=remote.kind, exist_ok=True)
    if parent and not plan.changes:
        return Published(parent)
    additions = [CommitOperationAdd(name, str(plan.staged / name)) for name in plan.to_send]
    where: dict[str, Any] = {"repo_type": remote.kind, "revision": branch, "create_pr": create_pr}
    with large_file_transfer(api, remote.name, remote.kind):
        api.preupload_lfs_files(remote.name, additions, **where)
    operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in plan.removed)]
    options = where | {"commit_message": message, "parent_commit": parent}
    if create_pr:
        made = api.create_commit(remote.name, operations, **options)
        return Published(made.oid, made.pr_url)
    try:
        return Published(commit_once(api, plan, operations, options))
    except (HfHubHTTPError, httpx2.TransportError) as error:
        if not is_transient(error):
            raise
        known = redact(f"{sentence(error, remote.name, 'write to')} The commit may have been made all the same")
        raise ValueError(f"{known}: run the command again, which looks first.") from None


def create(api: HfApi, remote: Remote) -> str | None:
    """Creates a repository, and returns its initial commit."""
    visibility = "private" if remote.private else "public"
    more = {"space_sdk": "gradio"} if remote.kind == "space" else {}
    patiently(api.create_repo, remote.name, repo_type=remote.kind, visibility=visibility, exist_ok=True, **more)
    if patiently(api.repo_info, remote.name, repo_type=remote.kind).private not in (remote.private, None):
        raise ValueError(f"{remote.name} was not created {visibility}: nothing was sent to it.")
    return head_of(api, remote, "main")


def head_of(api: HfApi, remote: Remote, revision: str) -> str | None:
    """The commit of a branch or tag."""
    return patiently(api.repo_info, remote.name, repo_type=remote.kind, revision=revision).sha


def commit_once(api: HfApi, plan: Plan, operations: list[Any], options: dict[str, Any]) -> str:
    """Commits; after a failed request, checks whether the commit exists before trying again."""
    remote = plan.remote
    for wait in WAITS:
        try:
            return api.create_commit(remote.name, operations, **options).oid
        except (HfHubHTTPError, httpx2.TransportError) as error:
            if not is_transient(error):
                raise
        time.sleep(wait)
        head = head_of(api, remote, plan.branch)
        if head and head != options["parent_commit"] and is_published(api, plan, head):
            return head
    return api.create_commit(remote.name, operations, **options).oid


def is_published(api: HfApi, plan: Plan, commit: str) -> bool:
    """Whether a commit contains every staged file, and none that was to be removed."""
    hashes = hashes_at(api, plan.remote.name, commit, plan.remote.kind)
    whole = all(name in hashes and same_content(plan.staged / name, hashes[name]) for name in plan.states)
    return whole and not set(plan.removed) & set(hashes)


def choose_tag(plan: Plan, wanted: str | None) -> str:
    """The tag to set: the requested one, the one that the commit has already, or the next of v1, v2, ...

    Raises ValueError if the requested tag belongs to another commit.
    """
    tags, unchanged = plan.remote.tags, not plan.changes
    if wanted in tags and not (unchanged and tags[wanted] == plan.remote.head):
        raise ValueError(f"{plan.remote.name} has a tag {wanted} already, for something else: choose another --tag.")
    if wanted:
        return wanted
    here = [name for name, commit in tags.items() if unchanged and commit == plan.remote.head]
    numbers = [int(name[1:]) for name in tags if re.fullmatch(r"v\d+", name)]
    return here[0] if here else f"v{max(numbers, default=0) + 1}"


@contextmanager
def standing(name: str, stands: str, remedy: str) -> Iterator[None]:
    """A failure after the commit does not undo it: the error says what was published and how to continue."""
    try:
        with hub_errors(name):
            yield
    except KeyboardInterrupt:
        print(f"{stands}. The commit stands: {remedy}.", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"{stands}: {str(error).rstrip('.')}. The commit stands: {remedy}.") from error


def set_tag(api: HfApi, name: str, tag: str, commit: str) -> None:
    """Tags a commit, and checks the tag."""
    patiently(api.create_tag, name, tag=tag, revision=commit, exist_ok=True)
    if patiently(api.repo_info, name, revision=tag).sha != commit:
        raise ValueError(f"{name} has a tag {tag} already, for something else: choose another --tag.")
