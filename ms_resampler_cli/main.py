"""The command `ms-resampler`. A subcommand is a module that is imported when it runs, not before.

This is no part of the package ms_resampler, whose import takes transformers and seconds: `demo` does without it.

Such a module offers `add_arguments(parser)` and `run(arguments) -> exit code`, and its name goes into COMMANDS.
What is wrong with the input it raises as ValueError or OSError: that becomes one sentence on stderr.

Exit codes: 0 done, 1 an unexpected error, 2 wrong usage or bad input, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

# Name and help, one line each; `push-space` is the module push_space beside this one.
COMMANDS = {
    "demo": "open a page on which you ask about a picture and see where the model looked",
    "chat": "ask about one or several pictures, here in the terminal",
    "export": "copy a checkpoint with its code into a folder that loads anywhere",
    "init": "assemble a model from a vision tower and a language model",
    "data": "check training data before training on them",
    "convert": "bring a LLaVA-style checkpoint, or take yours to LLaVA's layout",
    "card": "write a checkpoint's model card from its results, or check it",
    "push": "publish a checkpoint, its code and its card on the Hub",
    "push-space": "publish the demo of a published checkpoint as a Space",
    "pull": "download a checkpoint from the Hub, checked",
    "verify": "check a checkpoint on the Hub: files, hashes, whose code it runs",
    "train": "run a training recipe, and measure what it made",
    "merge": "fold a run's adapters into a whole model",
    "plan": "tell what a recipe takes of memory and time, before it runs",
    "evaluate": "score models on public benchmarks and suites of your own",
    "study": "train every projector under the same conditions, and compare them",
}


def module_of(command: str) -> str:
    """The module of a command."""
    return f"ms_resampler_cli.{command.replace('-', '_')}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = " ".join(["ms-resampler", *argv[:1]])
    try:
        arguments = build_parser(argv).parse_args(argv)
        return import_module(module_of(arguments.command)).run(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        print(f"{command} needs {error.name}: pip install 'ms-resampler[demo,train,eval,push]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        sentence = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"{command}: {sentence}", file=sys.stderr)
        return 2


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of those that `argv` names: the others stay unimported."""
    parser = argparse.ArgumentParser(prog="ms-resampler", description="The multi-scope visual resampler.")
    parser.add_argument("--version", action="version", version=metadata.version("ms-resampler"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_line in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        if name in argv:
            import_module(module_of(name)).add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
