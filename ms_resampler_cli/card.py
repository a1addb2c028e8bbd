"""`ms-resampler card`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `card`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the card and the results disagree")
    parser.add_argument("--title", help="what the model is called (default: as before, or after the folder)")
    parser.add_argument("--license", help="licence of the weights, as the Hub abbreviates it: apache-2.0, mit, ...")
    parser.add_argument("--base-model", action="append", metavar="REPO", help="what it was made from; may be repeated")
    parser.add_argument("--dataset", action="append", metavar="REPO", help="what it was trained on; may be repeated")


def run(arguments: argparse.Namespace) -> int:
    """Writes or checks DIR/README.md."""
    from ms_resampler.hub_upload.card import check_card, write_card

    folder = arguments.folder
    if arguments.check:
        check_card(folder)
        print(f"{folder / 'README.md'} agrees with the results.")
        return 0
    given = {"license": arguments.license, "base_model": arguments.base_model, "datasets": arguments.dataset}
    write_card(folder, arguments.title, **{field: value for field, value in given.items() if value})
    print(f"{folder / 'README.md'} is written.")
    return 0
