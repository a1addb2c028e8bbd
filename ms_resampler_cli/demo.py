"""`ms-resampler demo`: serves the Space app around a model, and opens it in the browser."""

import argparse
import sys
from importlib.util import find_spec, module_from_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `demo`."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    model.add_argument("--small", action="store_true", help="the small model of real parts, built on first use")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--compare",
        metavar="MODEL",
        help="a second folder or repository, to compare with "
        "(default for the embedded checkpoint: the same with one global scope; for --small: the embedded one)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")


def run(arguments: argparse.Namespace) -> int:
    """Runs the app until it ends or is interrupted."""
    if "ms_resampler" not in sys.modules:
        # Found but not imported: importing it would delay the start of the app's process by seconds.
        spec = find_spec("ms_resampler")
        assert spec is not None
        sys.modules["ms_resampler"] = module_from_spec(spec)
    from ms_resampler.demo import serve
    from ms_resampler.folders import EMBEDDED

    model, compare = arguments.model, arguments.compare
    if arguments.small:
        from ms_resampler.small import kept_small

        model, compare = kept_small(), compare or EMBEDDED
    return serve(
        model,
        revision=arguments.revision,
        compare=compare,
        host=arguments.host,
        port=arguments.port,
        browser=not arguments.no_browser,
    )
