"""`ms-resampler convert`: another checkpoint as a model folder of ours, or ours in transformers' LLaVA layout."""

import argparse
from pathlib import Path
from typing import Any

from ..init_command import assignment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `convert`."""
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub repository of the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="where to put the result: a new folder")
    parser.add_argument("--projector", metavar="TYPE", help="another projector (default: the one that it has)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="FIELD=VALUE",
        help="a field of the new projector, its value as JSON: visual_tokens=144; repeatable",
    )
    parser.add_argument("--tower", metavar="ID", help="folder or repository of the tower that the checkpoint lacks")
    parser.add_argument("--llm", metavar="ID", help="of the language model that it lacks")
    parser.add_argument(
        "--to",
        choices=["llava", "projector"],
        help="ours as transformers' LLaVA, if its projector is an MLP; or its projector alone",
    )
    parser.add_argument("--verify", action="store_true", help="run source and result on the same input, and compare")
    parser.add_argument("--dry-run", action="store_true", help="print what would become of every weight; write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Plans, shows or writes, and compares if asked to."""
    from tqdm import tqdm
    from transformers.utils import logging

    from .convert import convert, make_plan, table_text
    from .layouts import open_source
    from .source import local_folder

    logging.set_verbosity_error()
    folder = local_folder(arguments.source)
    if arguments.to == "llava":
        return run_to_llava(folder, arguments)
    if arguments.to == "projector":
        return run_to_projector(folder, arguments.out)
    fields: dict[str, Any] = dict(arguments.set)
    if arguments.projector:
        fields["projector_type"] = arguments.projector
    plan = make_plan(open_source(folder, fields, arguments.tower, arguments.llm))
    if arguments.dry_run:
        print(f"{table_text(plan)}\nNothing was written (--dry-run).")
        return 0
    total = sum(output.bytes for output in plan.outputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Converting") as bar:
        convert(plan, arguments.out, bar.update)
    print(table_text(plan).splitlines()[-1].replace("to write", "written"))
    if arguments.verify:
        report(folder, arguments.out)
    return 0


def run_to_llava(folder: Path, arguments: argparse.Namespace) -> int:
    """Ours in transformers' LLaVA layout."""
    from .to_llava import to_llava

    to_llava(folder, arguments.out)
    print(f"transformers' LLaVA: {arguments.out}")
    if arguments.verify:
        report(folder, arguments.out)
    return 0


def run_to_projector(folder: Path, out: Path) -> int:
    """The projector of ours, with the configuration, the processor and the code that it needs."""
    from ..folders import whole_folder
    from ..hub_upload.staging import PROJECTOR, stage_checkpoint

    with whole_folder(out) as place:
        stage_checkpoint(folder, place, projector_only=True)
    print(f"The projector alone: {out / PROJECTOR}")
    return 0


def report(folder: Path, out: Path) -> None:
    """Prints how far source and result are apart on the same picture and question."""
    from .verification import largest_difference

    difference, scale = largest_difference(folder, out)
    print(f"Logits of source and result differ by at most {difference:.1e} (of {scale:.1e}).")
