"""`ms-resampler push-space`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `push-space`."""
    parser.add_argument("name", metavar="ORG/SPACE", help="Space to publish to; created if needed")
    parser.add_argument("--model", required=True, metavar="ORG/NAME", help="published checkpoint to show")
    parser.add_argument("--model-revision", default="main", metavar="TAG", help="its tag, branch or commit")
    parser.add_argument("--public", action="store_true", help="make the Space public (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, and send nothing")
    parser.add_argument("--message", default="Publish the demo", help="what the commit says")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds to wait until it runs (default: 1800)")


def run(arguments: argparse.Namespace) -> int:
    """Publishes the demo, and waits until it runs."""
    from ms_resampler.hub_upload.space import push_space

    push_space(
        arguments.name,
        arguments.model,
        model_revision=arguments.model_revision,
        private=not arguments.public,
        dry_run=arguments.dry_run,
        message=arguments.message,
        timeout=arguments.timeout,
    )
    return 0
