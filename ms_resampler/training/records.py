"""Opens training data: LLaVA's JSON and JSON lines, and tables that `datasets` reads, here or on the Hub.

Whatever they are, a record comes out in LLaVA's form (training/data.py) with its images as paths or bytes: they are
opened when a batch is made, so that one that cannot be is known by its record's id.
"""

import codecs
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

CHUNK_BYTES = 1 << 20
CHARACTERS_A_TOKEN, TOKENS_AN_IMAGE = 4, 144  # for lengths, which need only be right in proportion
READ_TOGETHER = 32  # rows of a stream
BETWEEN = re.compile("[\\s,\ufeff]*")  # the mark of UTF-8, too, which some editors put in front


def open_records(
    source: str | Path, images: str | Path | None = None, split: str = "train", streaming: bool = False
) -> "JsonRecords | TableRecords | StreamedRecords":
    """The records of a .json or .jsonl file, of a folder or file of parquet or arrow tables, or of a Hub repository.

    `images` is the folder that image paths are relative to: by default the one that the file is in. `split` and
    `streaming` are for tables; a stream has no length. Raises ValueError or OSError if the source cannot be read or
    names an image outside of the folder.
    """
    path = Path(source)
    folder = Path(images) if images is not None else path if path.is_dir() else path.parent
    if images is not None and not folder.is_dir():
        raise ValueError(f"There is no folder of images {str(images)!r}.")
    if path.suffix in (".json", ".jsonl") and not path.is_dir():
        if streaming:
            raise ValueError(f"{source} is read record by record as it is: leave streaming to tables.")
        return JsonRecords(path, folder)
    rows = open_table(str(source), split, streaming)
    return StreamedRecords(rows, folder) if streaming else TableRecords(rows, folder)


class CountedRecords(Dataset):
    """Records of which it is known how many there are, about how long each is, and (`modality`) if it has images."""

    modality: np.ndarray
    _lengths: np.ndarray

    def _describe(self, records: Iterable[dict[str, Any]]) -> None:
        described = [describe(record) for record in records]
        self._lengths = np.array([length for length, _ in described], dtype=np.int64)
        self.modality = np.array([has_image for _, has_image in described], dtype=bool)

    def __len__(self) -> int:
        return len(self.modality)

    def lengths(self) -> np.ndarray:
        """About how many tokens each record has."""
        return self._lengths


class JsonRecords(CountedRecords):
    """The records of a JSON list or of JSON lines. Only their places in the file are kept, and read from there.

    Opening reads the file once. Raises ValueError, with the number of the record, if it is no such file.
    """

    def __init__(self, path: Path, images: Path):
        self.path = path
        self.images = images
        places: list[tuple[int, int]] = []
        self._describe(self._scan(places))
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def _scan(self, places: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        size, name = self.path.stat().st_size, self.path.name
        with tqdm(total=size, unit="B", unit_scale=True, desc=name, delay=2) as progress:
            for number, (start, end, row) in enumerate(scan_json(self.path), start=1):
                places.append((start, end))
                progress.update(end - progress.n)
                yield as_record(row, number, self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._places[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            return as_record(json.loads(file.read(end - start)), range(1, len(self) + 1)[index], self.images)


class TableRecords(CountedRecords):
    """The rows of a `datasets.Dataset`, with columns `id`, `image` or `images`, and `conversations` or `messages`."""

    def __init__(self, rows: Any, images: Path):
        self.rows = rows.with_format("arrow")  # which leaves images as they are stored
        self.images = images
        texts = self.rows.select_columns([name for name in rows.column_names if not name.startswith("image")])
        self._describe(as_record(row, 0, images) for table in texts.iter(batch_size=1000) for row in table.to_pylist())

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = range(1, len(self) + 1)[index]
        return as_record(self.rows[index].to_pylist()[0], number, self.images)


class StreamedRecords(IterableDataset):
    """The rows of a `datasets.IterableDataset` as they come; workers of a DataLoader share them out.

    Rows without an id are named by their place among those that a worker or part reads.
    """

    def __init__(self, rows: Any, images: Path):
        self.rows = rows.decode(False)
        self.images = images

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows, start=1):
            yield as_record(row, number, self.images)

    def part(self, index: int, parts: int, seed: int, buffer: int) -> Iterator[dict[str, Any]]:
        """One of `parts` that share out the rows, shuffled `buffer` at a time; it starts over without end.

        A part reads shards of its own if `parts` divides their number, or else all of them and keeps its share of the
        rows. Raises ValueError if it has none.
        """
        from datasets.distributed import split_dataset_by_node

        number = 0
        for again in itertools.count():
            shuffled = self.rows.shuffle(seed=seed + again, buffer_size=buffer)
            rows = split_dataset_by_node(shuffled, index, parts)
            before = number
            for batch in rows.iter(batch_size=READ_TOGETHER):  # plain iteration would share out once more
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    yield as_record(dict(zip(batch, values, strict=True)), f"{number} of part {index}", self.images)
            if number == before:
                raise ValueError(f"The stream has no rows for {parts} devices times workers: take fewer of them.")


def open_table(source: str, split: str, streaming: bool) -> Any:
    """A split of the tables in a folder, in a file or on the Hub, by `datasets`."""
    import datasets  # not everybody's data need it

    path = Path(source)
    if (path / "state.json").is_file():
        table = datasets.load_from_disk(source)
        return table.to_iterable_dataset() if streaming else table
    if (path / "dataset_dict.json").is_file():
        return open_table(str(path / split), split, streaming)
    if path.is_file():
        kind = path.suffix.removeprefix(".")
        if kind not in ("parquet", "arrow"):
            raise ValueError(f"{source} is of no kind that is read here: .json, .jsonl, .parquet or .arrow.")
        return datasets.load_dataset(kind, data_files=source, split="train", streaming=streaming)
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ValueError(f"{source!r} is neither a file or folder nor the name of a Hub repository.")
    return datasets.load_dataset(source, split=split, streaming=streaming)


def scan_json(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The byte range and the value of each record of a JSON list, or of JSON objects one after the other (lines).

    Raises ValueError, with the number of the record, if the file is damaged.
    """
    text, offset, number, in_list, closed = "", 0, 0, False, False  # `offset` is that of the text in hand, in bytes
    for chunk in text_chunks(path):
        text, done = text + chunk, 0
        while (place := BETWEEN.match(text, done).end()) < len(text):  # type: ignore[union-attr]
            if (number, in_list, text[place]) == (0, False, "[") or (in_list and text[place] == "]"):
                in_list, closed = not in_list, in_list
                offset, done = offset + bytes_of(text[done : place + 1]), place + 1
                continue
            try:
                record, end = json.JSONDecoder().raw_decode(text, place)
            except json.JSONDecodeError as error:
                if chunk and may_go_on(error, len(text)):
                    break
                raise ValueError(f"{path} is no JSON in record {number + 1}: {error.msg}.") from error
            number += 1
            if closed or not isinstance(record, dict):
                raise ValueError(f"{path} is no list of JSON objects, nor lines of them: see record {number}.")
            start = offset + bytes_of(text[done:place])
            offset, done = start + bytes_of(text[place:end]), end
            yield start, offset, record
        text = text[done:]
    if in_list:
        raise ValueError(f"{path} ends in the middle, after record {number}: its list is not closed.")


def text_chunks(path: Path) -> Iterator[str]:
    """The text of a file, piece by piece, and "" at its end. Raises ValueError if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text, near byte {file.tell()}.") from error
            if text or not chunk:
                yield text
            if not chunk:
                return


def bytes_of(text: str) -> int:
    """How many bytes a text has in the file."""
    return len(text.encode())


def may_go_on(error: json.JSONDecodeError, length: int) -> bool:
    """Whether a text may be the beginning of JSON: one that only breaks off fails at its end, or in a string."""
    return error.pos >= length - 16 or error.msg.startswith("Unterminated string")


def as_record(row: dict[str, Any], number: int | str, folder: Path) -> dict[str, Any]:
    """A row in LLaVA's form: `messages` become `conversations`, image paths are in the folder, every row has an id."""
    record = row | {"id": f"number {number}" if row.get("id") is None else row["id"]}
    if record.get("conversations") is None and isinstance(record.get("messages"), (list, tuple)):
        record["conversations"] = [turn_of(message) for message in record.pop("messages")]
    images = record.pop("images", None) or record.get("image")
    images = images if isinstance(images, (list, tuple)) else [images]
    record["image"] = [located(image, folder, record["id"]) for image in images if image] or None
    return record


def turn_of(message: Any) -> Any:
    """A chat message as a turn; what is none stays as it is, to be refused with its record's id."""
    if not isinstance(message, dict):
        return message
    said = message.get("content")
    if isinstance(said, (list, tuple)) and all(isinstance(part, dict) for part in said):
        said = "".join("<image>" if part.get("type") == "image" else part.get("text") or "" for part in said)
    return {"from": message.get("role"), "value": said}


def located(image: Any, folder: Path, record_id: Any) -> Any:
    """An image's path in the folder, or its bytes. Raises ValueError for a path that leads out of the folder."""
    if isinstance(image, dict):  # as `datasets` stores one
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str):
        return image
    path = folder / image
    if "://" in image or not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"Record {record_id} names the image {image!r}: a path must stay within the folder of images.")
    return path


def describe(record: dict[str, Any]) -> tuple[int, bool]:
    """About how many tokens a record has, and whether it shows an image; of a malformed one, what can be told."""
    turns = record.get("conversations")
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    texts = [value for value in values if isinstance(value, str)]
    images = sum(text.count("<image>") for text in texts)
    return sum(map(len, texts)) // CHARACTERS_A_TOKEN + images * TOKENS_AN_IMAGE, images > 0
