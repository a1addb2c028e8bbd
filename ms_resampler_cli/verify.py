"""`ms-resampler verify`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `verify`."""
    parser.add_argument("repository", metavar="ORG/NAME[@REVISION]", help="what to check (default revision: main)")


def run(arguments: argparse.Namespace) -> int:
    """Says what a repository holds and whose code it runs, before anything of it is loaded."""
    from ms_resampler.hub_upload.check import verify

    verify(arguments.repository)
    return 0
