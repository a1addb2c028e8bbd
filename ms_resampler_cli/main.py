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

# Name: module and help, one line each.
COMMANDS = {
    "demo": ("ms_resampler_cli.demo", "open a page on which you ask about a picture and see where the model looked"),
    "chat": ("ms_resampler.chat", "ask about one or several pictures, here in the terminal"),
    "export": ("ms_resampler.hub_upload.export", "copy a checkpoint with its code into a folder that loads anywhere"),
    "init": ("ms_resampler.init_command", "assemble a model from a vision tower and a language model"),
    "data": ("ms_resampler.training.check", "check training data before training on them"),
    "convert": ("ms_resampler.conversion.command", "bring a LLaVA-style checkpoint, or take yours to LLaVA's layout"),
    "card": ("ms_resampler.hub_upload.card", "write a checkpoint's model card from its results, or check it"),
    "push": ("ms_resampler.hub_upload.push", "publish a checkpoint, its code and its card on the Hub"),
    "push-space": ("ms_resampler.hub_upload.push_space", "publish the demo of a published checkpoint as a Space"),
    "pull": ("ms_resampler.hub_upload.pull", "download a checkpoint from the Hub, checked"),
    "verify": ("ms_resampler.hub_upload.verify", "check a checkpoint on the Hub: files, hashes, whose code it runs"),
    "train": ("ms_resampler.training.command", "run a training recipe, and measure what it made"),
    "merge": ("ms_resampler.training.merge", "fold a run's adapters into a whole model"),
    "plan": ("ms_resampler.training.plan", "tell what a recipe takes of memory and time, before it runs"),
    "study": ("ms_resampler.study.command", "train every projector under the same conditions, and compare them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = " ".join(["ms-resampler", *argv[:1]])
    try:
        arguments = build_parser(argv).parse_args(argv)
        return import_module(COMMANDS[arguments.command][0]).run(arguments)
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
    for name, (module, help_line) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        if name in argv:
            import_module(module).add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
