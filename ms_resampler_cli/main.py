"""The command `ms-resampler`.

A command is a module beside this one with `add_arguments(parser)` and `run(arguments) -> exit code`. It imports the
library in `run`, so that the parser of all commands is built in milliseconds and needs no extra.

Exit codes: 0 done, 1 an unexpected error, 2 wrong usage or bad input, 130 interrupted.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

from . import (
    card,
    chat,
    convert,
    data,
    demo,
    evaluate,
    export,
    init,
    merge,
    pictures,
    plan,
    pull,
    push,
    push_space,
    small,
    study,
    train,
    verify,
)
from .errors import sentence_for

# The module and the help line of each command.
COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "demo": (demo, "open a page on which you ask about a picture and see where the model looked"),
    "chat": (chat, "ask about one or several pictures, here in the terminal"),
    "export": (export, "copy a checkpoint with its code into a folder that loads anywhere"),
    "init": (init, "assemble a model from a vision tower and a language model"),
    "small": (small, "build a small model of real parts, which answers about pictures of common things"),
    "data": (data, "check training data before training on them"),
    "convert": (convert, "convert a LLaVA-style checkpoint to this format, or yours to LLaVA's"),
    "card": (card, "write a checkpoint's model card from its results, or check it"),
    "push": (push, "publish a checkpoint, its code and its card on the Hub"),
    "push-space": (push_space, "publish the demo of a published checkpoint as a Space"),
    "pull": (pull, "download a checkpoint from the Hub and check it"),
    "verify": (verify, "check a checkpoint on the Hub: files, hashes and code"),
    "train": (train, "train a model with a recipe"),
    "merge": (merge, "merge a run's adapters into a whole model"),
    "evaluate": (evaluate, "score models on public benchmarks and suites of your own"),
    "pictures": (pictures, "build a suite of questions about pictures from free packages"),
    "plan": (plan, "estimate the memory and time of a recipe"),
}
if (Path(__file__).parents[1] / "research" / "study").is_dir():  # in a checkout, not in an installed package
    COMMANDS["study"] = study, "train every projector under the same conditions, and compare them"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if not sys.stderr.isatty():  # libraries' bars would fill a log file
        for library in ("HUB", "DATASETS"):
            os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
    command, _ = COMMANDS[arguments.command]
    try:
        return command.run(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        sentence = sentence_for(error, arguments.command)
        if sentence is None:
            raise
        if arguments.debug:
            traceback.print_exc()
        print(f"ms-resampler {arguments.command}: {sentence}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="ms-resampler", description="The multi-scope visual resampler.")
    parser.add_argument("--version", action="version", version=metadata.version("ms-resampler"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help_line) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        module.add_arguments(command)
        # Also accepted after the command, without a default that would override the first.
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show errors with a traceback"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
