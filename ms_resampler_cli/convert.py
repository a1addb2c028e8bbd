"""`ms-resampler convert`: converts another checkpoint to ours, or ours to transformers' LLaVA layout."""

import argparse
from pathlib import Path

from .arguments import assignment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `convert`."""
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub repository of the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the result")
    parser.add_argument("--projector", metavar="TYPE", help="another projector (default: the checkpoint's)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="FIELD=VALUE",
        help="a field of the new projector, its value as JSON: visual_tokens=144; repeatable",
    )
    parser.add_argument("--tower", metavar="ID", help="folder or repository of the tower, if the checkpoint lacks it")
    parser.add_argument("--llm", metavar="ID", help="of the language model, if the checkpoint lacks it")
    parser.add_argument(
        "--to",
        choices=["llava", "projector"],
        default="ours",
        help="write transformers' LLaVA (if the projector is an MLP), or the projector alone",
    )
    after = parser.add_mutually_exclusive_group()
    after.add_argument(
        "--verify", action="store_true", help="compare the logits of source and result on the same input"
    )
    after.add_argument("--dry-run", action="store_true", help="print what would happen to every weight; write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Plans and writes the conversion; shows the plan or compares the result if requested."""
    from transformers.utils import logging

    from ms_resampler.conversion.comparison import largest_difference
    from ms_resampler.conversion.convert import plan_conversion, write
    from ms_resampler.progress import progress

    if arguments.verify and arguments.to == "projector":
        raise ValueError("A projector alone does not run: there is nothing to --verify.")
    logging.set_verbosity_error()
    plan = plan_conversion(
        arguments.source,
        to=arguments.to,
        projector=dict(arguments.set) | ({"projector_type": arguments.projector} if arguments.projector else {}),
        tower=arguments.tower,
        llm=arguments.llm,
    )
    if arguments.dry_run:
        print(f"{plan.table()}\nNothing was written (--dry-run).")
        return 0
    with progress(total=plan.bytes, unit="B", unit_scale=True, desc="Converting") as bar:
        write(plan, arguments.out, bar.update)
    print(plan.summary("written"))
    if arguments.verify:
        difference, scale = largest_difference(arguments.source, arguments.out)
        print(f"Logits of source and result differ by at most {difference:.1e} (of {scale:.1e}).")
    return 0
