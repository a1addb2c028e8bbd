"""Published results as printed in papers and repositories, with their sources."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("published_numbers.csv")


@dataclass(frozen=True)
class PublishedRow:
    """A method's row: its budget, its language model, its numbers by benchmark as printed, and where they are printed.

    A number with an asterisk has another protocol, which the source names: MME's total instead of perception.
    """

    method: str
    tokens: str
    llm: str
    trained: str
    numbers: dict[str, str]
    source: str

    @property
    def budget(self) -> int:
        """Visual tokens a picture."""
        found = re.match(r"\d+", self.tokens)
        return int(found[0]) if found else 0


def published_rows() -> list[PublishedRow]:
    """All rows."""
    with FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    about = ("method", "tokens", "llm", "trained", "source")
    return [PublishedRow(**{name: row.pop(name) for name in about}, numbers=row) for row in rows]


def comparable_rows(budget: float | None) -> list[PublishedRow]:
    """The rows of LLaVA-1.5 itself, and those of the published budget that is nearest to one."""
    rows = published_rows()
    budgets = sorted({row.budget for row in rows})
    nearest = min(budgets, key=lambda other: abs(other - (budget or 576)))
    return [row for row in rows if row.budget in (576, nearest)]
