"""The suite of pictures: its truth from the pixels, its splits, its files, and the packages that it is made of."""

import base64
import hashlib
import json
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from picture_packages import COLOURS, make_packages, topology
from PIL import Image
from scipy.ndimage import center_of_mass, label

from ms_resampler.evaluation import Options, evaluate, report
from ms_resampler.evaluation.suite import suite_tasks
from ms_resampler.pictures import TASKS, build_pictures
from ms_resampler.pictures.packages import PACKAGES, Package, package_folder
from ms_resampler.pictures.scenes import unevenness
from ms_resampler.pictures.sources import LOOKS, SPLITS, Shelf, is_held_out, read_regions
from ms_resampler.pictures.tasks import NTH, draw_sheet
from ms_resampler.training.conversations import messages_in
from ms_resampler.training.records import open_records
from ms_resampler_cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return make_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def shelf(packages):
    return Shelf(packages)


@pytest.fixture(scope="module")
def suite(packages, tmp_path_factory):
    out = tmp_path_factory.mktemp("suite") / "pictures"
    build_pictures(out, questions=12, train_questions=12, packages=packages)
    return out


def lines_of(suite, split, task):
    return [json.loads(line) for line in (suite / split / f"{task}.jsonl").read_text().splitlines()]


def sheets(task, shelf, split="test", count=25):
    return [draw_sheet(task, shelf, SPLITS[split], 3, index) for index in range(count)]


def blobs(image, noun):
    """The centres (row, column) of the connected patches of a noun's colour, which no ground has."""
    near = np.abs(np.asarray(image).astype(int) - COLOURS[noun]).max(-1) <= 3
    found, count = label(near)
    return center_of_mass(near, found, range(1, count + 1))


def named_in(text):
    """The nouns of a question, in their order."""
    return [word for word in text.rstrip("?").replace(",", "").split() if word in COLOURS]


def right_option(asked):
    return asked.options[ord(asked.answer) - 65]


# Truth, from the pixels ----------------------------------------------------------------------------------------------


def test_presence_is_what_the_pixels_show(shelf):
    for sheet in sheets("presence", shelf):
        for asked in sheet.questions:
            (noun,) = named_in(asked.question)
            assert (asked.answer == "yes") == bool(blobs(sheet.image, noun))
        assert {asked.answer for asked in sheet.questions} == {"yes", "no"}


def test_counts_are_those_of_the_pixels(shelf):
    for sheet in sheets("counting", shelf):
        one, *every = sheet.questions
        (noun,) = named_in(one.question)
        assert int(one.answer) == len(blobs(sheet.image, noun))
        for asked in every:
            assert int(asked.answer) == label(np.asarray(sheet.image)[..., 0] <= 3)[1]


def test_names_are_those_of_the_pixels(shelf):
    for sheet in sheets("naming", shelf):
        (asked,) = sheet.questions
        assert [option for option in asked.options if blobs(sheet.image, option)] == [right_option(asked)]
        assert len(set(asked.options)) == 4


def test_relations_are_those_of_the_pixels(shelf):
    seen = Counter()
    for sheet in sheets("relations", shelf):
        for asked in sheet.questions:
            a, b = named_in(asked.question)
            (place,), (other,) = blobs(sheet.image, a), blobs(sheet.image, b)
            down, across = place[0] - other[0], place[1] - other[1]
            true = {"left": across < 0, "right": across > 0, "above": down < 0, "below": down > 0}
            said = right_option(asked) if asked.options else asked.question
            (word,) = [word for word in true if word in said.split()]
            assert true[word] == (asked.answer != "no")
            if asked.options:
                assert (word in ("left", "right")) == (abs(across) > abs(down))
            seen[word] += 1
    assert len(seen) == 4


def test_maps_lie_as_the_outlines_do(shelf):
    seen = Counter()
    for sheet in sheets("maps", shelf):
        for asked in sheet.questions[:-1]:
            first, second = asked.question.removeprefix("Is ").removesuffix(" on this map?").split(f" {asked.asks} of ")
            axis = {"east": 1, "north": 2}[asked.asks]
            # Only what is in the picture counts, and a country at its edge is cut there: never past a neighbour.
            assert (asked.answer == "yes") == (int(first.split()[axis]) > int(second.split()[axis]))
            seen[asked.asks, asked.answer] += 1
    assert len(seen) == 4


def test_outlines_are_read_as_topojson_has_them():
    two = topology("countries", "Land")
    two["objects"]["countries"]["geometries"][0]["arcs"] = [[~0]]  # backwards
    regions = read_regions(two, "countries")
    assert regions[0].name == "Land 1 1"
    assert regions[0].rings[0].tolist() == [[-40, -40], [-40, -30], [-30, -30], [-30, -40], [-40, -40]]
    assert regions[1].rings[0].tolist() == [[-40, -30], [-30, -30], [-30, -20], [-40, -20], [-40, -30]]


def test_charts_and_records_tell_the_tables_numbers(shelf):
    """Row 7 of every made-up table holds 70."""
    for sheet in sheets("charts", shelf):
        value, largest, difference = sheet.questions
        assert float(value.answer) == 10 * int(value.question.rstrip("?").split()[-1])
        assert right_option(largest) == max(largest.options, key=lambda name: int(name.split()[-1]))
        high, low = difference.question.removesuffix("?").split(" larger than ")
        assert float(difference.answer) == 10 * (int(high.split()[-1]) - int(low.split()[-1])) > 0
        assert (value.tolerance == 0) == (sheet.meta["values"] == "printed")
    for sheet in sheets("documents", shelf):
        if sheet.meta["page"] == "record":
            asked = sheet.questions[0]
            assert float(asked.answer) == 10 * int(asked.question.split("“")[1].split("”")[0].split()[-1])


def test_lines_of_pages_are_those_of_the_pixels(shelf):
    """Every line has the colour of its first word."""
    seen = Counter()
    for sheet in sheets("pages", shelf):
        there = sorted((found[0][0], noun) for noun in COLOURS if (found := blobs(sheet.image, noun)))
        nouns = [noun for _, noun in there]
        nth = dict(zip(NTH, nouns, strict=False))
        for asked in sheet.questions:
            seen[asked.asks] += 1
            if asked.asks == "is there":
                word = asked.question.split("“")[1].split("”")[0]
                assert (asked.answer == "yes") == (word in nouns)
            else:
                (noun,) = [noun for place, noun in nth.items() if f"the {place} line" in asked.question]
                line = sheet.questions[0].answer
                text = {"line": line, "first word": asked.answer, "number": f"{noun} on page {asked.answer}"}[
                    asked.asks
                ]
                assert f"{noun} on page {line.split()[-1]}".startswith(text)
        assert len(nouns) > 1
    assert len(seen) == 4


def test_pages_are_left_out_without_the_manuals(packages, tmp_path, monkeypatch, capsys):
    root = tmp_path / "packages"
    shutil.copytree(packages, root, ignore=shutil.ignore_patterns("mpich-doc"))
    monkeypatch.setenv("PATH", "")
    sizes = ["--questions", "1", "--train-questions", "0", "--packages", str(root)]
    assert main(["pictures", str(tmp_path / "out"), *sizes]) == 0
    assert "Left out, since apt-get cannot fetch Debian 12's manuals here: pages" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("pages*"))
    assert main(["pictures", str(tmp_path / "asked"), "--tasks", "pages", *sizes]) == 2
    assert "The task pages needs Debian's packages of manuals" in capsys.readouterr().err


# Unevenness ----------------------------------------------------------------------------------------------------------


def test_unevenness_is_the_share_of_the_busiest_quarter():
    noise = np.random.default_rng(0).integers(0, 256, (336, 336), dtype=np.uint8)
    corner = np.full_like(noise, 128)
    corner[:150, :150] = noise[:150, :150]
    assert unevenness(Image.fromarray(noise)) == pytest.approx(0.25, abs=0.03)
    assert unevenness(Image.fromarray(corner)) > 0.99
    assert unevenness(Image.new("RGB", (336, 336), "red")) == 0


def test_small_things_are_on_plain_grounds_and_corners_are_crowded(shelf):
    by_layout = defaultdict(list)
    for sheet in sheets("presence", shelf, count=40):
        by_layout[sheet.meta["layout"]].append(sheet)
    assert by_layout.keys() == {"full", "corner", "margin", "small"}
    for sheet in by_layout["small"]:
        assert sheet.meta["ground"] == "plain"
        assert sheet.meta["cover"] < 0.06
    for sheet in by_layout["corner"]:
        rows, columns = np.nonzero(np.asarray(sheet.image)[..., 0] <= 3)
        assert len(set(rows > 168)) == len(set(columns > 168)) == 1
    mean = {layout: np.mean([sheet.meta["unevenness"] for sheet in found]) for layout, found in by_layout.items()}
    assert mean["small"] > mean["full"]


# Splits and files ----------------------------------------------------------------------------------------------------


def test_every_line_is_one_that_the_evaluator_takes(suite):
    for split in ("test", "test-concept", "test-style"):
        loaded = {task.name: task.load() for task in suite_tasks(suite / split)}
        assert loaded.keys() == TASKS.keys() - ({"scenes"} if split != "test" else set())
        for found in loaded.values():
            assert len(found.samples) == 12
            assert not found.problems
            for sample in found.samples:
                assert {"asks", "unevenness", "detail"} <= sample.meta.keys()
                Image.open(sample.pictures[0].load()).load()


def test_splits_hold_out_contents_and_looks(shelf, suite):
    for name, split in SPLITS.items():
        for task in ("presence", "naming", "counting"):
            for sheet in sheets(task, shelf, name, 8):
                asked = [noun for q in sheet.questions for noun in [*named_in(q.question), *(q.options or [])]]
                assert {is_held_out(noun) for noun in asked} == {split.new_content}
                assert set(sheet.meta["style"]) <= set(split.looks("styles"))
        for task, field, kind in (("words", "font", "fonts"), ("cards", "deck", "decks"), ("charts", "plot", "plots")):
            assert {sheet.meta[field] for sheet in sheets(task, shelf, name, 8)} <= set(split.looks(kind))
    for looks in LOOKS.values():
        assert not set(looks["train"]) & set(looks["new"])
    assert "fluent-emoji-3d" in LOOKS["styles"]["new"]
    words = {s: {q.answer for x in sheets("words", shelf, s) for q in x.questions if q.asks == "read"} for s in SPLITS}
    assert words["train"]
    assert not words["train"] & words["test-concept"]


def test_training_records_ask_as_the_evaluator_does(suite):
    records = open_records(suite / "train/train.json")
    assert len(records) == 12 * len(TASKS)
    instructions = ("single word or phrase.", "from the given choices directly.")
    for record in records:
        user, assistant = messages_in(record)
        assert user["content"][0]["type"] == "image"
        assert user["content"][-1]["text"].endswith(instructions)
        assert assistant["content"]
        assert (suite / "train" / record["image"]).is_file()


def hashes(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}


def test_a_seed_decides_everything_and_another_changes_it(packages, tmp_path):
    tasks = ["presence", "words"]
    for out, seed in (("one", 1), ("again", 1), ("other", 2)):
        build_pictures(tmp_path / out, tasks, questions=3, train_questions=3, seed=seed, packages=packages)
    one, again, other = (hashes(tmp_path / out) for out in ("one", "again", "other"))
    assert one == again
    pictures = [path for path in one if path.suffix == ".jpg"]
    assert all(one[path] != other.get(path) for path in pictures)
    more = tmp_path / "more"
    build_pictures(more, tasks, questions=5, train_questions=0, seed=1, packages=packages)
    assert not (more / "train").exists()
    assert lines_of(more, "test", "words")[:3] == lines_of(tmp_path / "one", "test", "words")


def test_the_report_has_the_most_common_answers_score(suite, tmp_path):
    class Answerer:
        def encode(self, pictures):
            return pictures

        def answer(self, prompts, pictures, max_new_tokens):
            return ["yes"] * len(prompts)

        def visual_tokens(self, encoded):
            return 1

    evaluate(Answerer(), [suite / "test"], tmp_path / "run", Options())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for name, task in summary["tasks"].items():
        counts = defaultdict(Counter)
        for line in lines_of(suite, "test", name):
            answer = line["answer"][0] if isinstance(line["answer"], list) else line["answer"]
            counts[line["kind"], line["meta"]["asks"]][answer] += 1
        best = sum(max(found.values()) for found in counts.values()) / 12
        assert task["numbers"]["guess"] == pytest.approx(100 * best)
    assert summary["tasks"]["presence"]["value"] == summary["tasks"]["presence"]["numbers"]["guess"] == 50
    assert "most common answer" in report([tmp_path / "run"])


def test_the_command_builds_and_refuses(packages, tmp_path, capsys):
    command = ["pictures", str(tmp_path / "out"), "--packages", str(packages), "--tasks"]
    sizes = ["--questions", "2", "--train-questions", "0"]
    assert main([*command, "cards", *sizes]) == 0
    assert "test-style: 2 questions about" in capsys.readouterr().out
    assert (tmp_path / "out/contact_sheet.png").is_file()
    assert main([*command, "cards", *sizes]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*command, "juggling", *sizes]) == 2
    assert "There is no task 'juggling'; the tasks are presence," in capsys.readouterr().err


# Packages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An `npm` that packs one archive, which is pinned; other packages are unknown to it."""
    source = tmp_path / "package"
    source.mkdir()
    (source / "package.json").write_text(json.dumps({"version": "1.0.0"}))
    with tarfile.open(tmp_path / "known-1.0.0.tgz", "w:gz") as archive:
        archive.add(source, "package")
    digest = base64.b64encode(hashlib.sha512((tmp_path / "known-1.0.0.tgz").read_bytes()).digest()).decode()
    npm = tmp_path / "bin/npm"
    npm.parent.mkdir()
    known = f'known@*) cp {tmp_path}/known-1.0.0.tgz "$5";;'
    npm.write_text(f'#!/bin/sh\ncase "$3" in {known} *) echo "404 $3" >&2; exit 1;; esac')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    monkeypatch.setitem(PACKAGES, "known", Package("1.0.0", "MIT", f"sha512-{digest}"))
    monkeypatch.setitem(PACKAGES, "absent", Package("1.0.0", "MIT", f"sha512-{digest}"))
    return tmp_path / "root"


def test_a_package_is_fetched_once_and_checked(registry, monkeypatch):
    folder = package_folder("known", registry)
    assert json.loads((folder / "package.json").read_text())["version"] == "1.0.0"
    monkeypatch.setenv("PATH", "")
    assert package_folder("known", registry) == folder
    (folder / "package.json").write_text(json.dumps({"version": "2.0.0"}))
    with pytest.raises(ValueError, match=r"is version 2\.0\.0; the suite is made of 1\.0\.0: remove the folder"):
        package_folder("known", registry)


def test_what_cannot_be_fetched_or_is_another_archive_is_refused(registry, monkeypatch):
    with pytest.raises(OSError, match=r"npm cannot fetch absent@1\.0\.0: 404 absent@1\.0\.0"):
        package_folder("absent", registry)
    monkeypatch.setitem(PACKAGES, "known", Package("1.0.0", "MIT", "sha512-x"))
    with pytest.raises(ValueError, match="is not the pinned one: its hash differs"):
        package_folder("known", registry)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError, match="There is no npm to fetch known with"):
        package_folder("known", registry)
    assert not (registry / "known").exists()


def test_the_page_has_the_stored_results_and_every_task():
    command = [sys.executable, str(ROOT / "docs/make_pictures_table.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
    page = (ROOT / "docs/pictures.md").read_text()
    for task in TASKS:
        assert len(re.findall(rf"^\| {task} \|", page, flags=re.MULTILINE)) == 2
    assert f"fetches {len(PACKAGES) - 1} packages" in page  # noto-v1 is for the small model
