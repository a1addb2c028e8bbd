"""`ms-resampler push`."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `push`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("name", metavar="ORG/NAME", help="repository to publish to; created if needed")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="check, show the plan and the card, and send nothing")
    parser.add_argument("--message", help="what the commit says")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="split the weights into shards of at most this size, such as 5GB"
    )
    parser.add_argument("--projector-only", metavar="BASE", help="publish only the projector's weights, for this model")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--revision", default="main", metavar="BRANCH", help="branch to publish to (default: main)")
    place.add_argument("--create-pr", action="store_true", help="open a pull request, without a tag")
    parser.add_argument("--tag", help="tag for the commit (default: the next of v1, v2, ...)")


def run(arguments: argparse.Namespace) -> int:
    """Publishes the folder; asks for confirmation at a terminal before making it public."""
    from ms_resampler.hub_upload.push import push_to_hub

    push_to_hub(
        arguments.folder,
        arguments.name,
        private=not arguments.public,
        dry_run=arguments.dry_run,
        message=arguments.message,
        max_shard_size=arguments.max_shard_size,
        projector_of=arguments.projector_only,
        branch=arguments.revision,
        create_pr=arguments.create_pr,
        tag=arguments.tag,
        confirm=is_confirmed,
    )
    return 0


def is_confirmed(question: str) -> bool:
    """The user's answer at the terminal; True without a terminal, since `--public` was given."""
    return not sys.stdin.isatty() or input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
