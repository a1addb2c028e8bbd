"""Opening training data: JSON, JSON lines, tables; paths that stay inside; and the order of an epoch."""

import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from labelled_records import turns
from tiny_models import picture, tiny_processor
from torch.utils.data import DataLoader

from ms_resampler.training import records as module
from ms_resampler.training.collate import ConversationCollator
from ms_resampler.training.conversations import BadRecord, conversation_of, images_of
from ms_resampler.training.order import epoch_order
from ms_resampler.training.records import open_records


def rows_of(count: int = 7) -> list[dict]:
    """Records with no, one and two images in turn, and words of all kinds."""
    rows = []
    for number in range(count):
        images = [f"sub/{number}_{n}.png" for n in range(number % 3)]
        said = [
            {"from": "human", "value": "<image>\n" * len(images) + f'Wie groß ist [{number}], \\ "{{🐈" ?'},
            {"from": "gpt", "value": "ein Wort, " * (1 + number * 5) + "}]"},
        ]
        image = images[0] if len(images) == 1 else images
        rows.append({"id": f"r{number}", "conversations": said} | ({"image": image} if images else {}))
    return rows


def save(path, rows, form):
    text = {
        "list": lambda: json.dumps(rows, ensure_ascii=False),
        "pretty": lambda: json.dumps(rows, indent=2),
        "lines": lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "lines, blank": lambda: "\n\n".join(json.dumps(row) for row in rows) + "\n\n",
        "lines, with a mark": lambda: "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "with a mark": lambda: "\ufeff" + json.dumps(rows, ensure_ascii=False),
    }[form]()
    path.write_text(text, encoding="utf-8")
    return path


def expected(row, folder):
    return row | {"folder": folder}


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("form", ["list", "pretty", "lines", "lines, blank", "with a mark", "lines, with a mark"])
def test_json_comes_back_record_by_record(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    rows = rows_of()
    path = save(tmp_path / ("data.jsonl" if "lines" in form else "data.json"), rows, form)
    records = open_records(path)
    assert len(records) == len(rows)
    assert [records[index] for index in range(len(rows))] == [expected(row, tmp_path) for row in rows]
    assert records[-1] == records[len(rows) - 1]
    assert records.modality.tolist() == ["image" in row for row in rows]
    assert (np.diff(records.lengths()[[1, 4]]) > 0).all()
    with pytest.raises(IndexError):
        records[len(rows)]


def test_the_file_is_not_held_in_memory(tmp_path):
    row = rows_of(1)[0]
    row["conversations"][1]["value"] = "word " * 2000
    path = save(tmp_path / "data.json", [row] * 3000, "list")
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    records = open_records(path)
    assert records[2999]["conversations"] == row["conversations"]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1e6
    assert peak < 20e6


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[{"id": 1}, {"id": ]', "no JSON in record 2"),
        ('[{"id": 1}, {"id": 2', "no JSON in record 2"),
        ('[{"id": 1}', "ends in the middle, after record 1"),
        ('{"id": "1\n"}', "no JSON in record 1"),
        ("[" * 100_000, "no JSON in record 1: its brackets are too deep"),
        ('[{"id": ' + "1" * 5000 + "}]", "no JSON in record 1: Exceeds the limit"),
        ('[{"id": 1}] {"id": 2}', "has more after the end of its list: see record 2"),
        ('{"data": [{"id": 1}], "version": 1', "no JSON after its list"),
        ('{"data": [{"id": 1}], "test": [{"id": 2}]}', "has another list, 'test'"),
        (b"\x1f\x8b rest", "cannot be unpacked"),
        ("\ufeff[]".encode("utf-16")[:-1], "is not complete text in UTF-16"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, sentence):
    path = tmp_path / "data.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[")):
        open_records(path)


def packed(text):
    return gzip.compress(text.encode())


ROWS = rows_of(3)
LIST, LINES = json.dumps(ROWS, ensure_ascii=False), "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
FILES = {
    "UTF-16": ("data.json", ("\ufeff" + LIST).encode("utf-16-le")),
    "UTF-16, big-endian": ("data.jsonl", ("\ufeff" + LINES).encode("utf-16-be")),
    "UTF-16 without a mark": ("data.json", LIST.encode("utf-16-le")),
    "UTF-32": ("data.json", LIST.encode("utf-32")),
    "ndjson": ("data.ndjson", LINES),
    "jsonl.gz": ("data.jsonl.gz", packed(LINES)),
    "json.gz in UTF-16": ("data.json.gz", gzip.compress(LIST.encode("utf-16"))),
    "packed without a name": ("data.json", packed(LIST)),
    "upper case": ("DATA.JSON", LIST),
    "lines in a .json": ("data.json", LINES),
    "a list in a .jsonl": ("data.jsonl", LIST),
    "carriage returns": ("data.jsonl", LINES.replace("\n", "\r")),
    "Windows": ("data.jsonl", LINES.replace("\n", "\r\n") + "\r\n"),
    "in an object": ("data.json", f'{{"data": {LIST}}}'),
    "in an object, with more": (
        "data.json",
        f'{{"v": "1.0", "n": 3,\n"data": {LIST}, "info": {{"by": ["me"]}} }}\n',
    ),
}


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("form", FILES)
def test_files_are_read_as_people_have_them(form, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    name, stored = FILES[form]
    (tmp_path / name).write_bytes(stored if isinstance(stored, bytes) else stored.encode())
    records = open_records(tmp_path / name)
    assert [records[index] for index in range(len(records))] == [expected(row, tmp_path) for row in ROWS]
    assert records.modality.tolist() == [False, True, True]


def problems_of(path):
    """The sentence about each record, None for a good one."""
    records, found = open_records(path), []
    for index in range(len(records)):
        try:
            found.append(conversation_of(records[index]) and None)
        except BadRecord as error:
            found.append(str(error))
    return found


def test_a_line_that_is_no_record_is_a_bad_record(tmp_path):
    good = [json.dumps(rows_of(1)[0]), json.dumps(rows_of(1)[0])]
    bad = ['{"id": 1', '{"id" 2}', "[" * 99_999, '{"id": ' + "9" * 5000 + "}", "5", "null", '["a"]', '"a"', "}{"]
    for number, line in enumerate(bad):
        (tmp_path / f"{number}.jsonl").write_text("\n".join([good[0], line, good[1]]))
        before, problem, after = problems_of(tmp_path / f"{number}.jsonl")
        assert before is after is None
        assert problem.startswith("Record number 2 is no JSON")


def test_latin_1_says_how_to_convert_it(tmp_path):
    rows = [row | {"id": f"r{n}"} for n, row in enumerate([rows_of(1)[0], {"conversations": turns(("gpt", "ok"))}])]
    text = json.dumps(rows, ensure_ascii=False).replace("🐈", "").encode("latin-1")
    (tmp_path / "data.json").write_bytes(text)
    problem, fine = problems_of(tmp_path / "data.json")
    assert problem.startswith("Record r0 has a character that is none")
    assert "iconv -f LATIN1 -t UTF-8" in problem
    assert fine is None


@pytest.mark.slow
def test_a_copy_of_a_packed_file_goes_with_the_process(tmp_path):
    (tmp_path / "data.jsonl.gz").write_bytes(packed(LINES))
    code = (
        "import os; from ms_resampler.training.records import open_records; "
        f"open_records({str(tmp_path / 'data.jsonl.gz')!r})[0]; assert os.listdir(os.environ['TMPDIR'])"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "tmp").mkdir()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_error_early_in_a_large_file_does_not_read_it_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    path = tmp_path / "data.json"
    path.write_bytes(b'[{"id" 1}, ' + b'{"id": 2}, ' * 1000 + b"\xff]")  # the end would raise another error
    with pytest.raises(ValueError, match="no JSON in record 1"):
        open_records(path)


@pytest.mark.parametrize(
    ("source", "images", "sentence"),
    [
        ("missing.json", None, "No such file"),
        ("notes.txt", None, "has an unknown file type"),
        ("damaged.parquet", None, "damaged.parquet cannot be read as a table: "),
        ("empty", None, "empty cannot be read as a table: "),
        ("no such place", None, "neither a file or folder nor the name of a Hub repository"),
        ("data.json", "nowhere", "There is no folder of images"),
    ],
)
def test_sources_that_are_none(tmp_path, source, images, sentence):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "data.json", rows_of(), "list")
    source = source if " " in source else tmp_path / source
    with pytest.raises((ValueError, OSError), match=sentence):
        open_records(source, images)


# --- Tables


def stored(seed):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder of parquet, in LLaVA's columns, with a record whose image is no image."""
    import datasets

    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "conversations": datasets.List(turn),
    }
    rows = [
        {"id": row["id"], "conversations": row["conversations"], "images": [stored(n) for n in range(number % 3)]}
        for number, row in enumerate(rows_of())
    ]
    rows[4]["images"] = [{"bytes": b"nothing", "path": None}]
    folder = tmp_path_factory.mktemp("table")
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    made.to_parquet(folder / "train-00000-of-00001.parquet")
    made.save_to_disk(folder.parent / "on disk")
    return folder, rows


@pytest.mark.parametrize("kind", ["folder", "file", "on disk"])
def test_tables_give_the_same_records(table, kind):
    folder, rows = table
    source = {
        "folder": folder,
        "file": folder / "train-00000-of-00001.parquet",
        "on disk": folder.parent / "on disk",
    }[kind]
    records = open_records(source)
    assert len(records) == len(rows)
    assert records.modality.tolist() == [bool(row["images"]) for row in rows]
    for record, row in zip((records[index] for index in range(len(rows))), rows, strict=True):
        assert record["id"] == row["id"]
        assert record["conversations"] == row["conversations"]
        assert images_of(record) == [image["bytes"] for image in row["images"]]
    batch = ConversationCollator(tiny_processor(), max_length=2000)([records[2]])
    pixels = tiny_processor().image_processor([picture(0), picture(1)])["pixel_values"]
    assert torch.equal(batch["pixel_values"], torch.tensor(np.array(pixels)))
    with pytest.raises(BadRecord, match="Record r4 cannot be read"):
        ConversationCollator(tiny_processor(), max_length=2000)([records[4]])


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_give_every_record_once(table, workers):
    folder, rows = table
    stream = open_records(folder, streaming=True)
    loaded = list(DataLoader(stream, batch_size=None, num_workers=workers))
    assert sorted(record["id"] for record in loaded) == [row["id"] for row in rows]
    by_id = {record["id"]: record for record in loaded}
    assert images_of(by_id["r2"]) == [image["bytes"] for image in rows[2]["images"]]
    assert by_id["r2"]["conversations"] == rows[2]["conversations"]


def test_folders_of_one_name_are_read_as_they_are(tmp_path):
    """`datasets` alone gives the first one's rows for the second."""
    import datasets

    read = []
    for place in ("one", "two"):
        folder = tmp_path / place / "data"
        folder.mkdir(parents=True)
        turns = [{"from": "human", "value": place}, {"from": "gpt", "value": "yes"}]
        datasets.Dataset.from_list([{"id": place, "conversations": turns}]).to_parquet(folder / "train.parquet")
        configs = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet"
        (folder / "README.md").write_text(f"---\n{configs}\n---\n")
        read += [record["id"] for record in map(open_records(folder).__getitem__, range(1))]
    assert read == ["one", "two"]


# --- Order


class Described:
    """What epoch_order wants to know of records."""

    def __init__(self, count, seed=0):
        generator = np.random.default_rng(seed)
        self.modality = generator.random(count) < 0.7
        self._lengths = generator.integers(10, 2000, count)

    def __len__(self):
        return len(self.modality)

    def lengths(self):
        return self._lengths


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 64, 1001])
def test_an_epoch_is_every_record_once_and_the_same_again(grouped, count):
    records = Described(count)
    for epoch in range(3):
        order = epoch_order(records, 8, seed=1, epoch=epoch, grouped=grouped, begun=epoch * count % 8)
        assert sorted(order) == list(range(count))
        assert order == epoch_order(records, 8, seed=1, epoch=epoch, grouped=grouped, begun=epoch * count % 8)
    if count > 5:
        orders = [epoch_order(records, 8, seed, epoch, grouped) for seed in (1, 2) for epoch in (0, 1)]
        assert len(set(map(tuple, orders))) == 4


def test_batches_of_a_whole_run_are_alike_in_modality_and_length():
    records, size, epochs = Described(5003), 16, 3
    run = []
    for epoch in range(epochs):
        run += epoch_order(records, size, seed=0, epoch=epoch, grouped=True, begun=epoch * len(records) % size)
    batches = [run[start : start + size] for start in range(0, len(run), size)]
    mixed = [batch for batch in batches if len(set(records.modality[batch])) > 1]
    assert len(mixed) <= 3 * epochs
    spread = np.mean([np.ptp(records.lengths()[batch]) for batch in batches])
    shuffled = epoch_order(records, size, seed=0, epoch=0)
    shuffled = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    assert spread < np.mean([np.ptp(records.lengths()[batch]) for batch in shuffled]) / 10
    means = [records.lengths()[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means[1:-1], means[2:])[0, 1]) < 0.2  # the batches themselves come in no order
