"""Publishes a checkpoint, with its code and its card, in one commit and a tag."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from ..folders import temporary_folder
from .card import add_card
from .check import answer_of_a_stranger, check_published, misfit
from .client import check_repository_name, hub_errors, patiently
from .code import code_problem
from .inspect import inspect_files, inspect_source
from .personal import personal_notes
from .plan import Remote, as_visible_as, describe, look_at, make_plan, size
from .publish import choose_tag, publish, set_tag, standing
from .secrets import find_secret
from .staging import allowed_files, check_checkpoint, is_loaded, left_out, stage_checkpoint

REFERENCE = re.compile(r"\w(?:[\w-]|[./](?=\w))*")


def push_to_hub(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    message: str | None = None,
    max_shard_size: str | None = None,
    projector_of: str | None = None,
    branch: str = "main",
    create_pr: bool = False,
    tag: str | None = None,
    confirm: Callable[[str], bool] = lambda question: True,
) -> str | None:
    """Publishes a checkpoint folder on the Hub, in one commit and a tag, and returns its address.

    Stages the folder's allowed files and the package's code, inspects them, makes the card, and loads the result in
    another process; after the commit it is downloaded and loaded again, and only then tagged. A dry run prints what it
    would do and returns None. `max_shard_size` ("5GB") splits the weights; `projector_of` publishes only the
    projector's, for the model of that name; `confirm` is called before a public repository is created. Raises
    ValueError if a check fails; a failure before the commit publishes nothing.
    """
    folder = Path(folder)
    message = message or f"Publish {folder.resolve().name}"
    check_names(repo_id, projector_of, branch, tag, create_pr)
    if max_shard_size and not re.fullmatch(r"\d+ ?[KMGT]B", max_shard_size.strip(), re.IGNORECASE):
        raise ValueError(f"--max-shard-size {max_shard_size!r} is not a size: give one such as 500MB or 5GB.")
    if find_secret(message.encode()):
        raise ValueError("Nothing was sent. The message looks like a secret: give another --message.")
    with hub_errors(repo_id), temporary_folder("ms-resampler-push") as place:
        api, home = HfApi(), place / "home"
        remote = as_visible_as(look_first(api, repo_id, branch, dry_run), private)
        if not (remote.exists or private or dry_run or confirm(f"Everybody will see {repo_id}. Publish it?")):
            raise ValueError("Nothing was sent.")
        staged = stage(folder, place / "staged", max_shard_size, projector_of)
        staged = add_card(inspect(staged), folder, repo_id, projector_of)
        answer = answer_of_a_stranger(str(staged))
        plan = make_plan(staged, remote, branch, is_loaded, left_out(folder))
        print(describe(plan), flush=True)
        for note in personal_notes(file for file in staged.iterdir() if file.suffix != ".py"):
            print(f"Everybody with read access sees {note}.")
        if dry_run:
            print(f"\n{(staged / 'README.md').read_text(encoding='utf-8')}\nNothing was sent (--dry-run).")
            return None
        tag = None if create_pr else choose_tag(plan, tag)
        made = publish(api, plan, message, create_pr=create_pr)
        print(f"Commit {made.commit[:8]}; loading it from there ...", flush=True)
        with standing(repo_id, *what_stands(repo_id, made.commit, tag)):
            check_published(api, plan, made.commit, home, answer)
            if tag:
                set_tag(api, repo_id, tag, made.commit)
        address = made.pull_request or f"{api.endpoint}/{repo_id}/tree/{tag or made.commit}"
        print(f"Published: {address}" if plan.changes else f"Nothing has changed since it was published: {address}")
        return address


def what_stands(repo_id: str, commit: str, tag: str | None) -> tuple[str, str]:
    """The state after a failure that follows the commit, and what to do about it."""
    if tag is None:
        return f"{repo_id} has the commit {commit[:8]} as a pull request", "look at it before you merge it"
    again = "run the push again, which sends only what is missing, checks it and tags it"
    by_hand = f"`hf repos tag create {repo_id} {tag} --revision {commit}`"
    return f"{repo_id} has the commit {commit[:8]}, without a tag", f"{again}, or tag it unchecked with {by_hand}"


def check_names(repo_id: str, projector_of: str | None, branch: str, tag: str | None, create_pr: bool) -> None:
    """Raises ValueError for names that the Hub or git does not allow, and for a pull request with a tag."""
    check_repository_name(repo_id)
    if projector_of:
        check_repository_name(projector_of)
    if tag and create_pr:
        raise ValueError("A pull request gets no tag: leave out --tag, and set it when the request is merged.")
    for option, reference in (("--tag", tag), ("--revision", branch)):
        if reference and not REFERENCE.fullmatch(reference):
            raise ValueError(f"{option} {reference!r} is not a git name: use letters, digits, and - _ . / between.")


def look_first(api: HfApi, name: str, branch: str, dry_run: bool) -> Remote:
    """The repository's state, read before any long work; a dry run works without a network."""
    try:
        if not dry_run:
            patiently(api.whoami)
        return look_at(api, name, branch)
    except (httpx2.TransportError, OfflineModeIsEnabled):
        if not dry_run:
            raise
        print(f"The Hub cannot be reached; the plan assumes that {name} does not exist yet.")
        return Remote(name)


def stage(folder: Path, target: Path, max_shard_size: str | None, projector_of: str | None) -> Path:
    """Stages a folder without links or pickles, if the disk has room for it and for the download to check."""
    inspect_source(folder)
    check_checkpoint(folder)
    needed = 2 * sum(file.stat().st_size for file in allowed_files(folder))
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(
            f"{target.parent} has {size(free)} free and {size(needed)} are needed: set TMPDIR to a place with more."
        )
    return stage_checkpoint(folder, target, max_shard_size=max_shard_size, projector_only=bool(projector_of))


def inspect(staged: Path) -> Path:
    """The staged folder, if no file speaks against publishing it, all code is its own, and its weights fit."""
    inspect_files(staged.iterdir())
    if problem := code_problem(staged) or misfit(staged):
        raise ValueError(f"Nothing was sent. {' '.join(problem)}.")
    return staged
