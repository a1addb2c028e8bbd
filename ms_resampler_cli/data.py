"""`ms-resampler data check`: checks every record of a data set, before hours of training."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `data`."""
    check = parser.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "check",
        help="check every record as training would, and show the labels",
        description="Checks every record as training would: counts problems, and shows the labels.",
    )
    check.add_argument("source", help=".json, .jsonl, parquet or arrow, a folder of these, or a Hub repository")
    check.add_argument("--model", help="folder or Hub repository of the model to train (default: the embedded one)")
    check.add_argument("--images", metavar="DIR", help="folder of the images (default: that of the data)")
    check.add_argument("--split", default="train", help="split of a table (default: %(default)s)")
    check.add_argument("--streaming", action="store_true", help="read a table from the Hub without storing it")
    check.add_argument("--max-length", type=int, default=2048, metavar="N", help="longest record, in tokens (2048)")
    check.add_argument(
        "--truncate", action="store_true", help="shorten longer records, instead of counting them as bad"
    )
    check.add_argument("--plain", action="store_true", help="images and caption only, as for the recipe align")
    check.add_argument(
        "--bad-records", choices=["fatal", "skip"], default="fatal", help="skip: as training with --bad-records skip"
    )
    check.add_argument("--examples", type=int, default=2, metavar="N", help="records to show (default: %(default)s)")
    check.add_argument("--html", type=Path, metavar="FILE", help="also show them on a page")
    check.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report and the examples; the exit code is 2 if training would stop at a record, or has none."""
    if arguments.html is not None and not arguments.html.parent.is_dir():
        raise ValueError(f"There is no folder {str(arguments.html.parent)!r} for the page.")
    from ms_resampler.training.data_check import check_data
    from ms_resampler.training.label_view import coloured_text, page

    report = check_data(
        arguments.source,
        model=arguments.model,
        images=arguments.images,
        split=arguments.split,
        streaming=arguments.streaming,
        max_length=arguments.max_length,
        truncate=arguments.truncate,
        plain=arguments.plain,
        bad_records=arguments.bad_records,
        examples=arguments.examples,
        workers=arguments.workers,
    )
    print(report)
    for example in report.examples:
        print(f"\n{coloured_text(example)}")
    if arguments.html is not None:
        arguments.html.write_text(page(arguments.source, str(report), report.examples), encoding="utf-8")
        print(f"\nThe examples are in {arguments.html}.")
    return 0 if report.trainable else 2
