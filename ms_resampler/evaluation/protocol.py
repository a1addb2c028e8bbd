"""The definition of a task: records, prompt, score and aggregation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .aggregation import Aggregation
from .samples import Columns, DataError, Outcome, Problem, Sample, Scored
from .sources import HubData, Loaded, Record, hub_records, usable


class Judge(Protocol):
    """A language model that grades or reads replies, for the benchmarks that need one.

    It is called with the task's name, the question, the truth, the options by letter (or None) and the reply. For
    MM-Vet it returns a grade such as "0.7", for MMBench the letter of the option that the reply means.
    """

    def __call__(self, *, task: str, question: str, truth: str, options: Mapping[str, str], reply: str) -> str: ...


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Fields:
        title: its name in tables, which is the column of the published rows.
        hub: where it is on the Hub.
        split: the split that is scored by default; published_split: the one that published rows are about.
        prompt: the prompt, with fields of the samples in braces; prompt_source: where it was published.
        records: the records of a split in a local folder of the official layout, each with a picture as `image`.
        build: the sample of a record, from a folder or from the Hub.
        score: the verdict on a reply. judge: the same with a judge, if `score` could not parse it.
        aggregation: the benchmark's numbers.
        group_size: how many samples of a group must be usable.
        picture_key: identifies the picture of a row, if the Hub's copy repeats pictures.
        place: a suite's file; None for other tasks.
        export: the file that the benchmark's server or script takes: its name and content.
    """

    name: str
    title: str
    hub: HubData | None
    split: str
    published_split: str | None
    prompt: str
    prompt_source: str
    records: Callable[[Path, str], Iterator[Record | Problem]]
    build: Callable[[Columns], Sample]
    score: Callable[[Sample, str], Outcome]
    aggregation: Aggregation
    group_size: int = 1
    judge: Callable[[Sample, str, Judge], Outcome] | None = None
    picture_key: Callable[[Record], str] | None = None
    export: Callable[[Sequence[Scored]], tuple[str, Any]] | None = None
    max_new_tokens: int = 128
    place: Path | None = None

    def load(self, split: str | None = None, place: str | Path | None = None) -> Loaded:
        """The samples of a split, from the Hub, from a folder in the official layout, or from a copy of the Hub's.

        Raises DataError if the folder, a file in it, the split or a column is missing.
        """
        split, place = split or self.split, self.place or place
        if place is not None and not Path(place).exists():
            raise DataError(f"There is no folder {str(place)!r}.")
        if self.hub is None or (place is not None and not is_hub_copy(Path(place))):
            source = {"place": str(place), "split": split}
            return usable(self.records(Path(str(place)), split), self.build, source, self.group_size)
        records, source = hub_records(str(place or self.hub.repo), self.hub, split, self.picture_key)
        return usable(records, self.build, source, self.group_size)


def is_hub_copy(folder: Path) -> bool:
    """Whether a folder is a copy of a Hub data set: a README.md and tables in the Parquet format."""
    return (folder / "README.md").is_file() and next(folder.rglob("*.parquet"), None) is not None


SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
LLAVA = "LLaVA-1.5 (arXiv 2310.03744), docs/Evaluation.md"
