"""`ms-resampler push`: publishes a checkpoint, with its code and its card, in one commit and a tag."""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from .card import check_card, check_metadata, is_made_here, render_card
from .client import check_repository_name, hub_errors, patiently
from .inspect import check_folder, check_sizes
from .plan import Remote, as_visible_as, describe, look_at, make_plan, size
from .publish import check_published, choose_tag, publish, set_tag
from .secret_scan import check_secrets
from .staging import allowed_files, check_checkpoint, is_loaded, remote_code_files, stage_checkpoint
from .verification import answer_of_a_stranger

REFERENCE = re.compile(r"\w(?:[\w-]|[./](?=\w))*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `push`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("name", metavar="ORG/NAME", help="repository to publish to; made if there is none")
    parser.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="check, show the plan and the card, and send nothing")
    parser.add_argument("--message", help="what the commit says")
    parser.add_argument("--max-shard-size", metavar="SIZE", help='write the weights in shards of at most, say, "5GB"')
    parser.add_argument("--projector-only", metavar="BASE", help="only the projector's weights, as made for this model")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--revision", default="main", metavar="BRANCH", help="branch to publish to (default: main)")
    place.add_argument("--create-pr", action="store_true", help="propose it as a pull request, without a tag")
    parser.add_argument("--tag", help="tag for the commit (default: the next of v1, v2, ...)")


def run(arguments: argparse.Namespace) -> int:
    """Stages, verifies, shows, commits, verifies what was published, and tags it."""
    check_arguments(arguments)
    name, branch = arguments.name, arguments.revision
    with hub_errors(name), tempfile.TemporaryDirectory(prefix="ms-resampler-push-") as place:
        api, staged, home = HfApi(), Path(place, "staged"), Path(place, "home")
        remote = look_first(api, arguments)
        answer = prepare(arguments, staged)
        plan = make_plan(staged, remote, is_loaded, left_out(arguments.folder))
        print(describe(plan, branch), flush=True)
        if arguments.dry_run:
            print(f"\n{(staged / 'README.md').read_text(encoding='utf-8')}\nNothing was sent (--dry-run).")
            return 0
        tag = None if arguments.create_pr else choose_tag(plan, arguments.tag)
        message = arguments.message or f"Publish {arguments.folder.resolve().name}"
        commit, pull = publish(api, plan, staged, branch, message, create_pr=arguments.create_pr)
        print(f"Commit {commit[:8]}; loading it from there ...", flush=True)
        check_published(api, name, commit, staged, home, answer)
        if tag:
            set_tag(api, name, tag, commit)
        where = pull or f"{api.endpoint}/{name}/tree/{tag or commit}"
        print(f"Published: {where}" if plan.changes else f"Nothing has changed since it was published: {where}")
        return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be meant."""
    check_repository_name(arguments.name)
    if arguments.tag and arguments.create_pr:
        raise ValueError("A pull request gets no tag: leave out --tag, and set it when the request is merged.")
    if arguments.projector_only:
        check_repository_name(arguments.projector_only)
    for option, reference in (("--tag", arguments.tag), ("--revision", arguments.revision)):
        if reference and not REFERENCE.fullmatch(reference):
            raise ValueError(f"{option} {reference!r} is no name for git: use letters, digits, and - _ . / between.")


def look_first(api: HfApi, arguments: argparse.Namespace) -> Remote:
    """The repository's state, looked at before any long work; a dry run does without it where there is no network.

    Raises ValueError if what is asked for would show to everybody what should be private, or the other way round.
    """
    name = arguments.name
    try:
        if not arguments.dry_run:
            patiently(api.whoami)
        remote = look_at(api, name, arguments.revision)
    except (httpx2.TransportError, OfflineModeIsEnabled):
        if not arguments.dry_run:
            raise
        print(f"The Hub cannot be reached; the plan takes it that {name} does not exist yet.")
        remote = Remote(name)
    if not remote.exists and arguments.public and not arguments.dry_run:
        ask_for_consent(name)
    return as_visible_as(remote, arguments.public)


def ask_for_consent(name: str) -> None:
    """Asks a person at a terminal whether everybody may see this; elsewhere `--public` is the answer."""
    question = f"Everybody will see {name}. Publish it? [y/N] "
    if sys.stdin.isatty() and input(question).strip().lower() not in ("y", "yes"):
        raise ValueError("Nothing was sent.")


def prepare(arguments: argparse.Namespace, staged: Path) -> bytes:
    """Stages the folder and makes its card; returns what a stranger's process answers with what was staged."""
    folder, base = arguments.folder, arguments.projector_only
    check_checkpoint(folder)
    files = allowed_files(folder)
    check_folder(folder, files)
    for file in files:
        check_secrets(file)
    check_room(staged.parent, 2 * sum(file.stat().st_size for file in files))
    stage_checkpoint(folder, staged, max_shard_size=arguments.max_shard_size, projector_only=bool(base))
    check_sizes(staged.iterdir())
    put_card(folder, staged, arguments.name, base)
    return answer_of_a_stranger(str(staged))


def put_card(folder: Path, staged: Path, name: str, base: str | None) -> None:
    """Makes the card for this repository, unless the folder has one of another origin; checks either."""
    card = staged / "README.md"
    if not card.is_file() or is_made_here(card):
        if card.is_file():
            check_card(folder)
        metadata = {"base_model": base, "base_model_relation": "adapter"} if base else {}
        card.write_text(render_card(staged, repo=name, **metadata), encoding="utf-8")
    check_metadata(card)


def check_room(place: Path, needed: int) -> None:
    """Raises OSError if a disk has no room for so many bytes: what is staged, and what is downloaded again."""
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"{place} has {size(free)} free and {size(needed)} are needed: set TMPDIR to a place with more.")


def left_out(folder: Path) -> list[str]:
    """What is in the folder and is not published, for the publisher to see."""
    code = {file.name: file for file in remote_code_files()}
    left = []
    for file in sorted(set(folder.iterdir()) - set(allowed_files(folder))):
        if file.name not in code:
            left.append(f"{file.name}/" if file.is_dir() else file.name)
        elif file.read_bytes() != code[file.name].read_bytes():
            left.append(f"{file.name} (the package's own goes in its place)")
    return left
