"""Training on a stream: who reads what, exact resume, bad records, and what a stream cannot do."""

import json

import pytest
from killed_runs import assert_same_weights, finish, kill_at, start_run
from tiny_runs import losses_of, make_shards, make_start, options_in, small
from torch.utils.data import DataLoader, get_worker_info

from ms_resampler.training.order import StreamSchedule
from ms_resampler.training.records import open_records
from ms_resampler.training.run import train
from ms_resampler_cli import main as cli


@pytest.fixture(scope="module")
def shards(start):
    """Four shards of six records."""
    return make_shards(start, start / "shards", 4)


def schedule_of(start, source, devices=1, workers=0, **changes):
    recipe = small("align", steps=24, workers=workers, shuffle_buffer=4, **changes)
    return StreamSchedule(open_records(source, start / "images", streaming=True), recipe, devices, device_batch=2)


def ids_of(schedule, positions):
    return [schedule[position][0]["id"] for position in positions]


@pytest.mark.parametrize(("devices", "workers"), [(1, 0), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("shards", [1, 3, 4, 12])
def test_all_parts_together_read_every_record_once(shards, devices, workers, start, tmp_path):
    source = make_shards(start, tmp_path / "shards", shards)
    ids = ids_of(schedule_of(start, source, devices, workers), range(24))
    assert sorted(ids) == sorted(f"r{number}" for number in range(24))
    assert ids != [f"r{number}" for number in range(24)]


def test_the_order_follows_from_the_seed_and_starts_anew_at_the_end(start, shards):
    schedule = schedule_of(start, shards, workers=2)
    ids = ids_of(schedule, range(48))
    assert sorted(ids[:24]) == sorted(ids[24:])
    assert ids[:24] != ids[24:]
    assert ids_of(schedule, reversed(range(48))) == ids[::-1]
    assert ids_of(schedule_of(start, shards, workers=2, seed=1), range(24)) != ids[:24]


def test_a_worker_reads_its_part_and_no_other(start, shards):
    def look(samples):
        return [record["id"] for record, _ in samples], list(get_worker_info().dataset._open)

    schedule = schedule_of(start, shards, workers=2)
    batches = list(DataLoader(schedule, batch_size=2, num_workers=2, collate_fn=look))
    assert [opened for _, opened in batches] == [[0], [1]] * 24
    assert [name for ids, _ in batches for name in ids] == ids_of(schedule, range(96))


def test_rows_without_an_id_have_one_of_their_own(start, tmp_path):
    rows = [{"conversations": [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": "b"}]} for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = ids_of(schedule_of(start, tmp_path, workers=2), range(8))
    assert sorted(ids) == [f"number {n} of part {part}" for n in range(1, 5) for part in (0, 1)]


def test_more_parts_than_records_are_refused(start, tmp_path):
    source = make_shards(make_start(tmp_path, records=2), tmp_path / "shards", 1)
    with pytest.raises(ValueError, match="no rows for 8 devices times workers"):
        ids_of(schedule_of(start, source, devices=4, workers=2), range(16))


def test_a_stream_from_the_hub(start, shards, hub, monkeypatch, tmp_path):
    import datasets
    from huggingface_hub import HfApi

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.url, token=hub.add_user("ada"))
    api.create_repo("ada/data", repo_type="dataset")
    api.upload_folder(repo_id="ada/data", repo_type="dataset", folder_path=shards)
    schedule = schedule_of(start, "ada/data", devices=2)
    assert ids_of(schedule, range(24)) == ids_of(schedule_of(start, shards, devices=2), range(24))
    options = options_in(start, tmp_path, data="ada/data", streaming=True)
    train(small("instruct", steps=2), **options)
    with pytest.raises(ValueError, match="Bad split: validation"):
        train(small("instruct", steps=2), **options | {"split": "validation"})


def test_bad_records_of_a_stream_are_counted_and_named(start, tmp_path):
    source = make_shards(start, tmp_path / "shards", 1)
    file = next(source.iterdir())
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["image"] = "missing.png"
    rows[5]["conversations"][1]["value"] = " "
    file.write_text("\n".join(map(json.dumps, rows)))
    options = options_in(start, tmp_path / "run", data=str(source), streaming=True)
    with pytest.raises(ValueError, match=r"Record r[05] has "):
        train(small("instruct", steps=6), **options)
    options = options | {"out": tmp_path / "skipping"}
    result = train(small("instruct", steps=6, bad_records="skip"), **options)
    record = json.loads((result / "training_record.json").read_text())
    assert record["skipped"]["first"].keys() == {"r0", "r5"}
    assert record["data"]["parts"] == 1
    assert not record["recipe"]["group_by_modality"]


CHANGES = {"steps": 12, "save_steps": 3, "workers": 2, "shuffle_buffer": 4, "token_budgets": [1, 4, 9]}


@pytest.mark.slow
def test_a_run_over_a_stream_that_is_killed_ends_with_the_same_weights(start, shards, tmp_path):
    options = {"data": str(shards), "streaming": True}
    finish(start_run(start, tmp_path / "unbroken", CHANGES, options))
    assert "epoch" not in (tmp_path / "unbroken" / "log.jsonl").read_text()
    out = tmp_path / "run"
    log = out / "log.jsonl"
    for lines in (4, 9):
        run = start_run(start, out, CHANGES, options)
        kill_at(run, out, lambda lines=lines: log.exists() and len(log.read_text().splitlines()) > lines)
    finish(start_run(start, out, CHANGES, options))
    assert_same_weights(out, tmp_path / "unbroken")
    assert len(set(losses_of(tmp_path / "unbroken"))) == 12


def test_a_stream_that_was_shared_out_otherwise_is_not_gone_on_with(start, shards, tmp_path):
    options = options_in(start, tmp_path, data=str(shards), streaming=True, device_batch=2)
    train(small("instruct", steps=1), **options)
    with pytest.raises(ValueError, match="another device batch size"):
        train(small("instruct", steps=1), **options | {"device_batch": 4})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["shards", "--streaming"], "A stream has no length, so epochs are undefined: give the number of steps"),
        (["data.json", "--streaming", "--steps", "2"], "use streaming for tables only"),
        (
            ["shards", "--streaming", "--steps", "2", "--shuffle-buffer", "0"],
            "shuffle_buffer must be at least 1, got 0",
        ),
        (["shards", "--streaming", "--steps", "2", "--split", "nothing"], "nothing"),
    ],
)
def test_what_a_stream_cannot_do(arguments, sentence, start, shards, tmp_path, capsys):
    source, *others = arguments
    command = ["train", "instruct", "--model", str(start / "start"), "--data", str(start / source)]
    assert cli.main([*command, "--out", str(tmp_path / "run"), *others]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
