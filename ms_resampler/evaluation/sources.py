"""Where a task's records come from: a data set on the Hub, or a local folder in the official release's layout."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..folders import datasets_cache
from .samples import Columns, DataError, Picture, Problem, Sample, picture_file

Record = Mapping[str, Any]


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub.

    splits: the release's name of a split -> its name there. configs: the configuration, if it has several.
    revision: the commit to load, where one is known from public records; the one that was loaded is recorded.
    picture_config: the configuration of a separate table of pictures, if there is one; the column `picture_id` refers
    to its column `id`.
    """

    repo: str
    splits: Mapping[str, str]
    config: str | None = None
    revision: str = "main"
    picture_config: str | None = None
    picture_id: str = ""


@dataclass(frozen=True)
class Loaded:
    """A task's samples, the records that could not be used, and the source."""

    samples: list[Sample]
    problems: list[Problem]
    source: Mapping[str, Any] = field(default_factory=dict)


def usable(
    records: Iterator[Record | Problem], build: Callable[[Columns], Sample], source: Record, group_size: int = 1
) -> Loaded:
    """Builds samples from records; a record that cannot be used is a problem with its place and reason.

    So are the other samples of its group, if fewer than `group_size` are left. Raises DataError, with the first reason,
    if no record can be used.
    """
    samples: dict[str, Sample] = {}
    problems: list[Problem] = []
    for number, record in enumerate(records):
        if isinstance(record, Problem):
            problems.append(record)
            continue
        try:
            sample = build(Columns(record))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            problems.append(
                Problem(
                    f"record {number}",
                    "unusable record",
                    f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error),
                )
            )
            continue
        if sample.id in samples:
            problems.append(Problem(sample.id, "repeated id", "Only the first sample with this id is used."))
        else:
            samples[sample.id] = sample
    sizes = Counter(sample.group or sample.id for sample in samples.values())
    for sample in list(samples.values()):
        if sizes[sample.group or sample.id] < group_size:
            problems.append(Problem(sample.id, "incomplete group", "Another question of its group cannot be used."))
            del samples[sample.id]
    if not samples:
        reason = problems[0].message if problems else "there are no records"
        raise DataError(f"Nothing of {source['place']} can be used: {reason}")
    return Loaded(list(samples.values()), problems, source)


# The Hub -----------------------------------------------------------------------------------------------------------


def hub_records(place: str, data: HubData, split: str, key: Callable[[Record], str] | None) -> tuple[Iterator, dict]:
    """A data set's rows, pictures unopened, and what was loaded; `place` is its name on the Hub or a copy's folder.

    Raises DataError if there is no such split.
    """
    name = data.splits.get(split)
    if name is None:
        raise DataError(f"{data.repo} has no split {split!r}; it has {', '.join(data.splits)}.")
    rows = load_rows(place, data.config, name, data.revision)
    source = {"place": place, "config": data.config, "split": name, "revision": commit_of(place, data.revision)}
    if data.picture_config is None:
        return rows_with_pictures(rows, place, key), source
    pictures = load_rows(place, data.picture_config, name, data.revision)
    places = {identifier: index for index, identifier in enumerate(pictures["id"])}

    def joined() -> Iterator[Record | Problem]:
        for row in rows:
            identifier = row[data.picture_id]
            if identifier in places:
                yield row | {"image": row_picture(pictures, places[identifier], "image", f"{place} {identifier}")}
            else:
                yield Problem(str(row.get("id")), "no picture", f"There is no picture {identifier!r}.")

    return joined(), source


def load_rows(place: str, config: str | None, split: str, revision: str) -> Any:
    """A split of a data set with undecoded pictures. Raises DataError if it cannot be loaded."""
    import datasets

    cache = datasets_cache(place)
    revision_there = None if Path(place).is_dir() else revision
    try:
        rows = datasets.load_dataset(place, config, split=split, revision=revision_there, cache_dir=cache)
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        raise DataError(
            f"The split {split!r} of {place} ({config or 'default'}, revision {revision}) cannot be loaded: {sentence}"
        ) from error
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def commit_of(place: str, revision: str) -> str | None:
    """The commit of a Hub data set's revision; None for a folder, or if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if Path(place).is_dir():
        return None
    try:
        return HfApi().dataset_info(place, revision=revision).sha
    except (HfHubHTTPError, OSError):
        return None


def rows_with_pictures(rows: Any, place: str, key: Callable[[Record], str] | None) -> Iterator[Record]:
    """Rows whose picture columns hold lazily read pictures: one, a list, or None."""
    import datasets

    columns = [name for name, feature in rows.features.items() if is_picture_column(feature)]
    there = {name: rows.data.column(name).is_valid().to_pylist() for name in columns}
    for index, row in enumerate(rows.remove_columns(columns)):
        row["row"] = str(index)
        identifier = f"{place} {key(row) if key else index}"
        for name in columns:
            if not there[name][index]:
                row[name] = None
            elif isinstance(rows.features[name], datasets.Image):
                row[name] = row_picture(rows, index, name, identifier if name == "image" else f"{identifier} {name}")
            else:
                count = len(rows[index][name])
                row[name] = [row_picture(rows, index, name, f"{identifier} {i}", i) for i in range(count)]
        yield row


def is_picture_column(feature: Any) -> bool:
    """Whether a column holds a picture or a list of pictures."""
    import datasets

    return isinstance(feature, datasets.Image) or isinstance(getattr(feature, "feature", None), datasets.Image)


def row_picture(rows: Any, index: int, column: str, key: str, place: int | None = None) -> Picture:
    """The picture in a cell."""

    def load() -> Any:
        cell = rows[index][column]
        cell = cell if place is None else cell[place]
        if cell["bytes"] is None and not cell["path"]:
            raise ValueError("The cell holds no picture.")
        return cell["bytes"] or Path(cell["path"])

    return Picture(key, load)


# Local folders -----------------------------------------------------------------------------------------------------


def one_of(folder: Path, *names: str) -> Path:
    """The first of some files or folders that exists; names may have wildcards. Raises DataError if none does."""
    for name in names:
        if found := sorted(folder.glob(name)):
            return found[0]
    raise DataError(f"{folder} has no {' or '.join(names)}.")


def read_json(path: Path) -> Any:
    """A JSON file. Raises DataError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=Columns)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def known_split(split: str, names: Mapping[str, str]) -> str:
    """The name of a split in a release's files. Raises DataError if there is no such split."""
    if split not in names:
        raise DataError(f"There is no split {split!r}; the splits are {', '.join(names)}.")
    return names[split]


def read_jsonl(path: Path) -> Iterator[Any]:
    """The lines of a JSONL file. Raises DataError, with the line, if one is damaged."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line, object_hook=Columns)
            except ValueError as error:
                raise DataError(f"{path}, line {number}, is not valid JSON: {error}") from error


def read_tsv(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a tab-separated table, whose cells may hold whole pictures."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t")


def picture_in(folder: Path, *names: str) -> Picture:
    """The picture with the first of some names that exists; if none does, opening it raises the error."""
    return picture_file(next((folder / name for name in names if (folder / name).is_file()), folder / names[0]))


def is_blank(value: Any) -> bool:
    """Whether a table cell is empty: None, NaN, or their spellings in tables."""
    return value is None or value != value or (isinstance(value, str) and value.lower() in ("", "nan", "none"))


def strings(value: Any) -> list[str]:
    """A list of strings, also from the text of a Python list or a single string."""
    import ast

    if isinstance(value, str) and value.startswith("["):
        value = ast.literal_eval(value)
    return [str(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else [str(value)]
