"""What a conversion does with every weight of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .weights import Output


@dataclass(frozen=True)
class Row:
    """A line of the plan: a weight's name in the source and in the result, its shape, and what happens to it."""

    source: str
    target: str
    shape: tuple[int, ...]
    what: str


@dataclass(frozen=True)
class Plan:
    """A conversion: a row for every weight, the weights to write, and a function that writes the other files.

    `layout` is the source's, `name` that of the weights' file without its suffix, `note` a sentence to add.
    """

    layout: str
    rows: list[Row]
    outputs: list[Output]
    write_settings: Callable[[Path], None]
    name: str = "model"
    note: str = ""

    @property
    def bytes(self) -> int:
        """Size of the weights to write."""
        return sum(output.bytes for output in self.outputs)

    def table(self) -> str:
        """Every weight, its old and its new name, and what happens to it; a summary in the last line."""
        cells = [
            (row.what, row.source or "-", row.target or "-", "x".join(map(str, row.shape)) or "1") for row in self.rows
        ]
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(cell, widths, strict=True)).rstrip() for cell in cells]
        return "\n".join([*lines, self.summary("to write")])

    def summary(self, written: str) -> str:
        """How many weights are copied, changed, new and unused, and how much is `written`."""
        counts = {what: sum(row.what == what for row in self.rows) for what in ("as it is", "changed", "new", "unused")}
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"From {self.layout} layout: {told}; {self.bytes / 1e6:,.1f} MB {written}. {self.note}".rstrip()
