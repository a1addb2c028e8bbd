"""The small model's card: what it can do, of what it is made, and what it cannot do."""

from pathlib import Path
from typing import Any

from ..folders import RECORD, write_whole
from ..hub_upload.card import read_json, write_card

NOTES = Path(__file__).with_name("notes.md")
TITLE = "MS-Resampler small"
FIELDS = {"license": "apache-2.0", "language": "en", "base_model": ["HuggingFaceTB/SmolLM2-135M-Instruct"]}


def write_small_card(folder: Path) -> None:
    """Writes README.md of a folder with the small model and its record."""
    write_card(folder, TITLE, **FIELDS)
    path = folder / "README.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition("<!-- notes -->")
    _, end, after = rest.partition("<!-- /notes -->")
    assert end, "the card's template has no room for notes"
    write_whole(path, f"{before}{begin}\n{notes(read_json(folder / RECORD))}\n{end}{after}")


def notes(record: dict[str, Any]) -> str:
    """The card's text on abilities, sources and limits: notes.md with the record's numbers."""
    results, pictures = record["results"], record["pictures"]
    plain = results["plain questions"]
    drawings = [f"{name} {said}" for name, said in pictures["packages"].items()]
    return (
        NOTES.read_text(encoding="utf-8")
        .format(
            nouns=pictures["nouns"],
            questions=results["test-style"]["naming"]["samples"],
            table=results_table(record),
            plain=plain["base"]["of"],
            base=plain["base"]["right"],
            small=plain["small"]["right"],
            weights=", ".join(f"{part['package']} {part['version']}" for part in record["pretrained"]),
            drawings="; ".join(drawings),
        )
        .rstrip()
    )


def results_table(record: dict[str, Any]) -> str:
    """Accuracy by task, and blind, as Markdown."""
    results = record["results"]
    columns = [name for name in results if name.startswith("test-style")]
    heads = ["36 tokens", *(name.removeprefix("test-style, ") for name in columns[1:]), "most common answer"]
    lines = [f"| task | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for task, first in results[columns[0]].items():
        cells = [f"{of['value']:.1f} ({of['interval'][0]:.0f} to {of['interval'][1]:.0f})"
                 for of in (results[name][task] for name in columns)]  # fmt: skip
        lines.append(f"| {task} | {' | '.join(cells)} | {first['numbers']['guess']:.1f} |")
    return "\n".join(lines)
