"""Opens training data: JSON and JSON lines, and tables that `datasets` reads, local or on the Hub.

Records are returned as stored, with an id and the folder of their images. They are parsed when a batch is made
(conversations.py), so that errors name a bad record by its id.
"""

import atexit
import codecs
import gzip
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from ..folders import datasets_cache
from ..progress import progress
from .conversations import BadRecord, messages_in

CHUNK_BYTES = 1 << 20
CHARACTERS_A_TOKEN, TOKENS_AN_IMAGE = 4, 144  # for lengths, of which only the proportions matter
READ_TOGETHER = 32  # rows of a stream
BETWEEN = re.compile("[\\s,\ufeff]*")  # also UTF-8's byte order mark, which some editors write
LINE = re.compile(r"[^\r\n]*")
# The start of a list, or of an object in which it comes after fields of one value each: {"version": "1.0", "data": [
START = re.compile(
    r'\[|\{(?:\s*"\w+"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,)*\s*"(?:data|records|examples|samples|rows)"\s*:\s*\['
)
LINES = (".jsonl", ".ndjson")


def open_records(
    source: str | Path, images: str | Path | None = None, split: str = "train", streaming: bool = False
) -> "JsonRecords | TableRecords | StreamedRecords":
    """The records of a .json, .jsonl or .ndjson file (also gzipped), of a folder or file of parquet or arrow tables, or
    of a Hub repository.

    `images` is the folder that image paths are relative to, by default that of the file. `split` and `streaming` are
    for tables; a stream has no length. Raises ValueError or OSError if the source cannot be read; problems of single
    records appear when a batch is made.
    """
    path = Path(source)
    folder = Path(images) if images is not None else path if path.is_dir() else path.parent
    if images is not None and not folder.is_dir():
        raise ValueError(f"There is no folder of images {str(images)!r}.")
    if names_json(path) and not path.is_dir():
        if streaming:
            raise ValueError(f"{source} is read record by record anyway: use streaming for tables only.")
        return JsonRecords(path, folder)
    rows = open_table(str(source), split, streaming)
    return StreamedRecords(rows, folder) if streaming else TableRecords(rows, folder)


class CountedRecords(Dataset):
    """Records with a known number, approximate lengths, and (`modality`) whether each has images."""

    modality: np.ndarray
    _lengths: np.ndarray

    def _describe(self, records: Iterable[dict[str, Any]]) -> None:
        described = [describe(record) for record in records]
        self._lengths = np.array([length for length, _ in described], dtype=np.int64)
        self.modality = np.array([has_image for _, has_image in described], dtype=bool)

    def __len__(self) -> int:
        return len(self.modality)

    def lengths(self) -> np.ndarray:
        """The approximate number of tokens of each record."""
        return self._lengths


class JsonRecords(CountedRecords):
    """The records of a JSON list or of JSON lines; only their positions in the file are kept in memory.

    Opening reads the file once. Raises ValueError, with the number of the record, if it cannot be parsed.
    """

    def __init__(self, path: Path, images: Path):
        self.path = in_utf8(path)
        self.images = images
        places: list[tuple[int, int]] = []
        self._describe(self._scan(places))
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def _scan(self, places: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        size, name = self.path.stat().st_size, self.path.name
        with progress(total=size, unit="B", unit_scale=True, desc=name, delay=2) as bar:
            for number, (start, end, row) in enumerate(scan_json(self.path), start=1):
                places.append((start, end))
                bar.update(end - bar.n)
                yield as_record(row, number, self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._places[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read(end - start).decode("utf-8", "surrogateescape")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            row = NoJson(reason(error))
        return as_record(row, range(1, len(self) + 1)[index], self.images)


class TableRecords(CountedRecords):
    """The rows of a `datasets.Dataset`, with columns `id`, `image` or `images`, and `conversations` or `messages`."""

    def __init__(self, rows: Any, images: Path):
        self.rows = rows.with_format("arrow")  # leaves images as stored
        self.images = images
        texts = self.rows.select_columns([name for name in rows.column_names if not name.startswith("image")])
        self._describe(as_record(row, 0, images) for table in texts.iter(batch_size=1000) for row in table.to_pylist())

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = range(1, len(self) + 1)[index]
        return as_record(self.rows[index].to_pylist()[0], number, self.images)


class StreamedRecords(IterableDataset):
    """The rows of a `datasets.IterableDataset` in order, divided among the workers of a DataLoader.

    Rows without an id are named by their position among those that a worker or part reads.
    """

    def __init__(self, rows: Any, images: Path):
        self.rows = rows.decode(False)
        self.images = images

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows, start=1):
            yield as_record(row, number, self.images)

    def part(self, index: int, parts: int, seed: int, buffer: int) -> Iterator[dict[str, Any]]:
        """An endless iterator over one of `parts` equal parts of the rows, shuffled `buffer` at a time.

        A part reads shards of its own if `parts` divides their number; otherwise it reads all shards and keeps its
        share of the rows. Raises ValueError if it has none.
        """
        from datasets.distributed import split_dataset_by_node

        number = 0
        for again in itertools.count():
            shuffled = self.rows.shuffle(seed=seed + again, buffer_size=buffer)
            rows = split_dataset_by_node(shuffled, index, parts)
            before = number
            for batch in rows.iter(batch_size=READ_TOGETHER):  # plain iteration would divide the rows again
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    yield as_record(dict(zip(batch, values, strict=True)), f"{number} of part {index}", self.images)
            if number == before:
                raise ValueError(f"The stream has no rows for {parts} devices times workers: use fewer of them.")


def open_table(source: str, split: str, streaming: bool) -> Any:
    """A split of the tables in a folder, in a file or on the Hub, by `datasets`."""
    import datasets  # optional dependency

    path = Path(source)
    if (path / "dataset_dict.json").is_file():
        return open_table(str(path / split), split, streaming)
    kind = path.suffix.removeprefix(".").lower()
    if path.is_file() and kind not in ("parquet", "arrow"):
        kinds = ".json, .jsonl or .ndjson (also with .gz), .parquet or .arrow"
        raise ValueError(f"{source} has an unknown file type; known are {kinds}.")
    if not path.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ValueError(f"{source!r} is neither a file or folder nor the name of a Hub repository.")
    try:
        if (path / "state.json").is_file():
            table = datasets.load_from_disk(source)
            return table.to_iterable_dataset() if streaming else table
        if path.is_file():
            return datasets.load_dataset(kind, data_files=source, split="train", streaming=streaming)
        return datasets.load_dataset(source, split=split, streaming=streaming, cache_dir=datasets_cache(source))
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        why = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"{source} cannot be read as a table: {why}") from error


@dataclass(frozen=True)
class NoJson:
    """A line of a file that is not JSON, with the reason."""

    why: str


def scan_json(path: Path) -> Iterator[tuple[int, int, Any]]:
    """The byte range and the value of each record of a JSON list, or of consecutive JSON objects (lines).

    A list may be the field `data` of one object. A line that is not JSON yields a NoJson, since later lines may be
    good. Raises ValueError, with the number of the record, if a list is damaged or the file is not JSON.
    """
    text, offset, number = "", 0, 0  # `offset` is the byte position of the current text
    in_list = in_object = closed = False
    chunks = text_chunks(path)
    for chunk in chunks:
        text, done = text + chunk, 0
        while (place := BETWEEN.match(text, done).end()) < len(text):  # type: ignore[union-attr]
            head = START.match(text, place) if number == 0 and not in_list else None
            if head or (in_list and text[place] == "]"):
                end = head.end() if head else place + 1
                in_list, closed, in_object = not in_list, in_list, in_object or text[place] == "{"
                offset, done = offset + bytes_of(text[done:end]), end
                if closed and in_object:
                    check_rest(path, text[end:] + "".join(chunks))
                    return
                continue
            try:
                record, end = json.JSONDecoder().raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                if chunk and may_go_on(error, len(text)):
                    break
                if in_list or closed or (number == 0 and not names_json(path, LINES)):
                    raise ValueError(f"{path} is no JSON in record {number + 1}: {reason(error)}.") from error
                end = LINE.match(text, place).end()  # type: ignore[union-attr]
                if chunk and end == len(text):
                    break
                record = NoJson(reason(error))
            number += 1
            if closed:
                raise ValueError(f"{path} has more after the end of its list: see record {number}.")
            start = offset + bytes_of(text[done:place])
            offset, done = start + bytes_of(text[place:end]), end
            yield start, offset, record
        text = text[done:]
    if in_list:
        raise ValueError(f"{path} ends in the middle, after record {number}: its list is not closed.")


def check_rest(path: Path, text: str) -> None:
    """Raises ValueError if an object continues after its list of records with another list, or not as JSON."""
    try:
        fields = json.loads("{" + text.lstrip("\ufeff\r\n\t ,"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON after its list: {reason(error)}.") from error
    if others := [name for name, value in fields.items() if isinstance(value, list) and dict in map(type, value)]:
        raise ValueError(f"{path} has another list, {others[0]!r}: put each into a separate file.")


def text_chunks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in chunks, and "" at its end; invalid bytes are kept and refused in their record."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            text = decoder.decode(chunk, final=not chunk)
            if text or not chunk:
                yield text
            if not chunk:
                return


def bytes_of(text: str) -> int:
    """The number of bytes of a text in the file."""
    return len(text.encode("utf-8", "surrogateescape"))


def may_go_on(error: Exception, length: int) -> bool:
    """Whether a text may be the beginning of JSON: truncated JSON fails at its end, or in a string."""
    if not isinstance(error, json.JSONDecodeError):  # numbers of too many digits, brackets too deep
        return False
    return error.pos >= length - 16 or error.msg.startswith("Unterminated string")


def reason(error: Exception) -> str:
    """Why a text cannot be read as JSON."""
    if isinstance(error, RecursionError):
        return "its brackets are too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def names_json(path: Path, endings: tuple[str, ...] = (".json", *LINES)) -> bool:
    """Whether a file's name has one of these suffixes, optionally with .gz."""
    return path.name.lower().removesuffix(".gz").endswith(endings)


def in_utf8(path: Path) -> Path:
    """The file itself, or a temporary copy if it is gzipped or UTF-16."""
    with path.open("rb") as file:
        opened: Any = gzip.open if file.read(2) == b"\x1f\x8b" else open
    try:
        with opened(path, "rb") as file:
            encoding = encoding_of(file.read(4))
        if opened is open and encoding == "utf-8":
            return path
        folder = Path(tempfile.mkdtemp(prefix="ms-resampler-data-"))
        atexit.register(remove_own, folder, os.getpid())
        copy, errors = folder / path.name, "surrogateescape" if encoding == "utf-8" else "strict"
        with (
            opened(path, "rt", encoding=encoding, errors=errors, newline="") as source,
            copy.open("w", encoding="utf-8", errors="surrogateescape", newline="") as target,
        ):
            shutil.copyfileobj(source, target, CHUNK_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}.") from error
    except UnicodeError as error:
        raise ValueError(f"{path} is not complete text in {encoding.upper()}: {error}.") from error
    return copy


def encoding_of(start: bytes) -> str:
    """The encoding of JSON that starts with these four bytes: Latin letters and brackets are ASCII in all of them."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if start[:1] == b"\0":
        return "utf-16-be"
    return "utf-16-le" if start[1:2] == b"\0" else "utf-8"


def remove_own(folder: Path, process: int) -> None:
    """Removes a folder, but not in forks of the process that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def as_record(row: Any, number: int | str, folder: Path) -> dict[str, Any]:
    """A row with an id and the folder of its paths; a value that is not a row is refused later."""
    if isinstance(row, dict):
        return row | {"id": f"number {number}" if row.get("id") is None else row["id"], "folder": folder}
    record = {"id": f"number {number}"}
    why = f"is no JSON: {row.why}." if isinstance(row, NoJson) else "is no JSON object."
    return record | {"problem": BadRecord("no JSON", record, why)}


def describe(record: dict[str, Any]) -> tuple[int, bool]:
    """The approximate number of tokens of a record, and whether it has an image; (0, False) for a bad one."""
    try:
        messages = messages_in(record)
    except Exception:  # training reports what is wrong
        return 0, False
    parts = [part for message in messages for part in message["content"]]
    images = sum(part["type"] == "image" for part in parts)
    characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
    return characters // CHARACTERS_A_TOKEN + images * TOKENS_AN_IMAGE, images > 0
