"""`ms-resampler verify`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `verify`."""
    parser.add_argument("repository", metavar="ORG/NAME[@REVISION]", help="what to check (default revision: main)")
    parser.add_argument("--allow-code", metavar="HASH", help="also accept code with this SHA-256, which verify prints")


def run(arguments: argparse.Namespace) -> int:
    """Checks a repository's files and code without running them."""
    from ms_resampler.hub_upload.check import verify

    verify(arguments.repository, allow_code=arguments.allow_code)
    return 0
