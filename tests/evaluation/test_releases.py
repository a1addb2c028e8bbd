"""Every benchmark's records, read in the layout of its official release and in that of its copy on the Hub."""

import json
import re
import shutil

import pytest
from releases import MAKERS, make_mmbench, make_pope, mmmu_rows, parquet, pixels, put, stored, ten

from ms_resampler.evaluation import TASKS
from ms_resampler.evaluation.samples import DataError
from ms_resampler.evaluation.sources import is_blank


def load(name, folder, split=None):
    MAKERS[name](folder)
    return TASKS[name].load(split, folder)


def prompts_of(name, loaded):
    return [TASKS[name].prompt.format_map(sample.fields) for sample in loaded.samples]


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

# The first sample as it is asked, and the truth that the metric sees.
FIRST = {
    "vqav2": ("What colour is the sky?" + SHORT, ten("blue", "light blue", "blue")),
    "gqa": ("Is it overcast?" + SHORT, "no"),
    "vizwiz": (
        "Ok. There is another picture I hope it is a better one.\nWhen the provided information is insufficient, "
        "respond with 'Unanswerable'." + SHORT,
        ten("unsuitable image", "suitable", "unanswerable"),
    ),
    "scienceqa": (
        "Which is farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona" + LETTER,
        {"letter": "A", "count": 3},
    ),
    "textvqa": (
        "what is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL" + SHORT,
        ten("nous les gosses", "dakota", "dakota digital"),
    ),
    "pope": ("Is there a snowboard in the image?" + SHORT, "yes"),
    "mme": ("Is there a cat?" + SHORT, "yes"),
    "mmbench": (
        "Which is right?\nA. this one\nB. that one\nC. neither\nD. both" + LETTER,
        {"letter": "B", "options": {"A": "this one", "B": "that one", "C": "neither", "D": "both"}},
    ),
    "mmbench_cn": (
        "Which is right?\nA. this one\nB. that one\nC. neither\nD. both\n请直接回答选项字母。",
        {"letter": "B", "options": {"A": "this one", "B": "that one", "C": "neither", "D": "both"}},
    ),
    "mmvet": ("What is x in the equation?", "-1<AND>-5"),
    "seed": ("How many are there?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER, "A"),
    "mmmu": (
        "<image 1> What is the cost?\n\n(A) $6\n(B) $7\n(C) it's $8\n" + LETTER,
        {"answers": ["B"], "options": ["$6", "$7", "it's $8"]},
    ),
    "ai2d": ("Which stage?\nA. A\nB. B\nC. C\nD. D" + LETTER, "C"),
    "chartqa": ("How many food item is shown?\nAnswer the question with a single word.", "14"),
    "docvqa": ("What is the date?" + SHORT, ["1/8/93", "1/8/1993"]),
    "ocrbench": ("what is written in the image?", {"answers": ["CENTRE"], "dataset": "IIIT5K"}),
}


@pytest.mark.parametrize("name", TASKS)
def test_official_release(name, tmp_path):
    loaded = load(name, tmp_path)
    assert not loaded.problems
    prompt, truth = FIRST[name]
    assert prompts_of(name, loaded)[0] == prompt
    assert loaded.samples[0].truth == truth
    for sample in loaded.samples:
        assert sample.pictures
        for picture in sample.pictures:
            content = picture.load()
            assert isinstance(content, str | bytes) or content.is_file()


def test_a_right_reply_scores_and_a_wrong_one_does_not(tmp_path):
    right = {"vqav2": "Blue.", "gqa": "No.", "vizwiz": "Unanswerable", "scienceqa": "A", "textvqa": "Dakota Digital",
             "pope": "Yes", "mme": "Yes", "mmbench": "B", "mmbench_cn": "B. that one", "seed": "A", "mmmu": "(B)",
             "ai2d": "C.", "chartqa": "14.5", "docvqa": "1/8/93", "ocrbench": "The centre"}  # fmt: skip
    for name, reply in right.items():
        sample, score = load(name, tmp_path / name).samples[0], TASKS[name].score
        assert score(sample, reply).score > 0.9, name
        assert score(sample, "no idea, not one").score == 0, name
        assert score(sample, "").score <= (name == "pope"), name  # POPE takes silence for yes


def test_the_oddities_of_the_releases(tmp_path):
    def by_id(name):
        return {sample.id: sample for sample in load(name, tmp_path / name).samples}

    assert list(by_id("scienceqa")) == ["4", "5"]  # with a picture, in the split
    assert by_id("scienceqa")["5"].fields["context"] == "Context: Look at the picture.\n"
    assert by_id("textvqa")["34603"].fields["ocr"] == ""
    assert by_id("mmbench")["252"].fields["hint"] == "Look at it.\n"
    assert [by_id("mmbench")[str(241 + k * 1_000_000)].truth["letter"] for k in range(4)] == ["B", "A", "D", "C"]
    assert [sample.group for sample in by_id("mmbench").values()] == ["241"] * 4 + ["252"] * 2
    mmmu = by_id("mmmu")
    assert len(mmmu["validation_Accounting_2"].pictures) == 2
    assert mmmu["validation_Accounting_3"].truth == {"answers": ["1,000", "one thousand"], "options": None}
    ai2d = by_id("ai2d")
    assert [sample.pictures[0].key.split("/")[-2] for sample in ai2d.values()] == ["abc_images", "images"]
    assert "is it so?" not in str(by_id("mme")).lower()
    assert {sample.fields["question"] for sample in by_id("mme").values()} == {"Is there a cat?", "Is there a dog?"}
    assert by_id("seed")["102_1"].meta == {"data": "video", "kind": "Action Recognition"}
    assert len({sample.id for sample in by_id("pope").values()}) == 9  # ids repeat from split to split


def test_rotated_rows_share_a_picture(tmp_path):
    loaded = load("mmbench", tmp_path)
    assert len({picture.key for sample in loaded.samples for picture in sample.pictures}) == 2
    contents = {sample.group: {p.load() for p in sample.pictures} for sample in loaded.samples}
    assert all(len(content) == 1 and len(next(iter(content))) > 64 for content in contents.values())


def test_rotations_are_made_where_the_table_has_none(tmp_path):
    make_mmbench(tmp_path / "given")
    make_mmbench(tmp_path / "bare", circular=False)
    given, bare = (
        {sample.id: (sample.truth, sample.fields) for sample in TASKS["mmbench"].load(None, tmp_path / part).samples}
        for part in ("given", "bare")
    )
    assert given == bare


@pytest.mark.parametrize(("name", "split"), [("vqav2", "test-dev"), ("vizwiz", "test")])
def test_splits_without_public_answers(name, split, tmp_path):
    loaded = load(name, tmp_path, split)
    assert loaded.samples
    assert all(sample.truth is None for sample in loaded.samples)


@pytest.mark.parametrize("name", ["vqav2", "mmmu"])
def test_a_split_that_a_release_does_not_have_is_named(name, tmp_path):
    with pytest.raises(DataError, match="There is no split 'train'; the splits are val"):
        load(name, tmp_path, "train")


def test_one_bad_row_costs_its_own_sample_alone(tmp_path):
    make_mmbench(tmp_path, circular=False)
    (table,) = tmp_path.glob("*.tsv")
    lines = table.read_text().split("\n")
    lines[1:2] = [lines[1].replace("\tB\t", "\tE\t"), "x" + lines[1]]
    table.write_text("\n".join(lines))
    found = TASKS["mmbench"].load(None, tmp_path)
    assert {problem.id for problem in found.problems} == {"241", "line 3"}
    assert {sample.group for sample in found.samples} == {"252"}

    MAKERS["textvqa"](tmp_path)
    (tokens,) = tmp_path.glob("TextVQA_Rosetta*.json")
    data = json.loads(tokens.read_text())
    tokens.write_text(json.dumps(data | {"data": data["data"][1:]}))
    found = TASKS["textvqa"].load(None, tmp_path)
    assert [problem.id for problem in found.problems] == ["34602"]
    assert [sample.id for sample in found.samples] == ["34603"]


# The Hub's copies: tables with the columns and types that they have there.

HUB = {
    "pope": [
        {"id": "0", "question_id": "1", "question": "Is there a snowboard?", "answer": "yes", "category": "random",
         "image_source": "COCO_1", "image": stored(pixels(1))},
        {"id": "1", "question_id": "1", "question": "Is there a car?", "answer": "no", "category": "popular",
         "image_source": "COCO_1", "image": stored(pixels(1))},
    ],
    "vqav2": [
        {"question_type": "what", "multiple_choice_answer": "net", "image_id": 262148, "answer_type": "other",
         "answers": [{"answer": "net", "answer_confidence": "maybe", "answer_id": n} for n in range(1, 11)],
         "question_id": 262148000, "question": "Where is it?", "image": stored(pixels(2))},
    ],
    "vizwiz": [
        {"question_id": "VizWiz_val_00000000", "image": stored(pixels(3)), "question": "What is it?",
         "answers": ten("unanswerable"), "category": "unanswerable"},
    ],
    "scienceqa": [
        {"image": stored(pixels(4)), "question": "Which?", "choices": ["this", "that"], "answer": 1, "hint": "",
         "task": "closed choice", "grade": "grade2", "subject": "x", "topic": "x", "category": "x", "skill": "x",
         "lecture": "", "solution": ""},
    ],
    "textvqa": [
        {"image_id": "003a", "question_id": 34602, "question": "what is it?", "question_tokens": ["what"],
         "image": stored(pixels(5)), "image_width": 4, "image_height": 4, "flickr_original_url": "x",
         "flickr_300k_url": "x", "answers": ten("a"), "image_classes": ["x"], "set_name": "val",
         "ocr_tokens": ["A", "B"]},
    ],
    "mme": [
        {"question_id": "count/0001.png", "image": stored(pixels(6)),
         "question": f"Is there a {thing}? Please answer yes or no.",
         "answer": answer, "category": "count"} for thing, answer in (("cat", "Yes"), ("dog", "No"))
    ],
    "mmbench": [
        {"index": 241, "question": "Which?", "hint": "nan", "answer": "A", "A": "x", "B": "y", "C": "nan", "D": "nan",
         "category": "c", "image": stored(pixels(7)), "source": "s", "L2-category": "l", "comment": "nan",
         "split": "dev"},
    ],
    "mmvet": [
        {"question_id": "v1_0", "image": stored(pixels(8)), "image_source": "x", "question": "What?", "answer": "cat",
         "capability": "ocr,math"},
    ],
    "seed": [
        {"answer": "B", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "data_id": "clip",
         "data_type": "video", "question": "How many?", "question_id": "7", "question_type_id": 10,
         "image": [stored(pixels(n)) for n in range(5)], "segment": ["1", "2"]},
    ],
    "mmmu": mmmu_rows(),
    "ai2d": [{"question": "Which?", "options": ["a", "b"], "answer": "1", "image": stored(pixels(9))}],
    "chartqa": [{"type": "human_test", "question": "How many?", "answer": "14", "image": stored(pixels(10))}],
    "docvqa": [
        {"questionId": "337", "question": "What?", "question_types": ["form"], "image": stored(pixels(11)), "docId": 1,
         "ucsf_document_id": "x", "ucsf_document_page_no": "1", "answers": ["a", "b"], "data_split": "val"},
    ],
    "ocrbench": [
        {"dataset": "IIIT5K", "question": "what?", "question_type": "Regular", "answer": ["CENTRE"],
         "image": stored(pixels(12))},
    ],
}  # fmt: skip


def hub_copy(folder, tables):
    """A data set's repository: {(configuration, split): (rows, picture columns)}."""
    entries = ["---", "configs:"]
    for config in dict.fromkeys(config for config, _ in tables):
        entries += [f"- config_name: {config}", "  data_files:"]
        for (name, split), (rows, pictures) in tables.items():
            if name == config:
                parquet(folder / f"{config}/{split}-00000-of-00001.parquet", rows, pictures)
                entries += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    put(folder / "README.md", "\n".join([*entries, "---", ""]))
    return folder


def make_hub_copy(name, folder):
    hub = TASKS[name].hub
    rows = HUB[name]
    pictures = tuple(
        column for column in rows[0] if column.startswith("image") and isinstance(rows[0][column], dict | list)
    )
    pictures = (
        tuple(f"image_{n}" for n in range(1, 8)) if name == "mmmu" else tuple(p for p in pictures if p == "image")
    )
    return hub_copy(folder, {(hub.config or "default", hub.splits[TASKS[name].split]): (rows, pictures)})


@pytest.mark.parametrize("name", HUB)
def test_copy_on_the_hub(name, tmp_path):
    loaded = TASKS[name].load(None, make_hub_copy(name, tmp_path / name))
    assert not loaded.problems
    assert len(loaded.samples) == len(HUB[name])
    prompts_of(name, loaded)
    for sample in loaded.samples:
        assert sample.truth is not None
        assert all(isinstance(picture.load(), bytes) for picture in sample.pictures)
    if name in ("pope", "mme"):
        assert len({sample.pictures[0].key for sample in loaded.samples}) == 1
    if name == "seed":
        assert loaded.samples[0].pictures[0].load() == pixels(2)


def test_folders_of_one_name_and_changed_folders_are_read_as_they_are(tmp_path):
    def answers(place, answer):
        rows = [{**HUB["pope"][0], "answer": answer}]
        hub_copy(tmp_path / place / "pope", {("default", "test"): (rows, ("image",))})
        return [sample.truth for sample in TASKS["pope"].load(None, tmp_path / place / "pope").samples]

    assert [answers("one", "Yes"), answers("two", "No"), answers("one", "no")] == [["yes"], ["no"], ["no"]]


def test_gqa_on_the_hub_joins_its_two_tables(tmp_path):
    about = {"question": "Is it?", "answer": "no", "types": {"structural": "verify"}}
    questions = [{"id": "1", "imageId": "n1", **about}, {"id": "2", "imageId": "n2", **about}]
    tables = {
        ("testdev_balanced_instructions", "testdev"): (questions, ()),
        ("testdev_balanced_images", "testdev"): ([{"id": "n1", "image": stored(pixels(1))}], ("image",)),
    }
    loaded = TASKS["gqa"].load(None, hub_copy(tmp_path / "gqa", tables))
    assert [sample.id for sample in loaded.samples] == ["1"]
    assert loaded.samples[0].pictures[0].load() == pixels(1)
    assert [(problem.id, problem.kind) for problem in loaded.problems] == [("2", "no picture")]


def test_the_benchmarks_that_have_a_known_commit_are_pinned_to_it():
    pinned = {name for name, task in TASKS.items() if re.fullmatch("[0-9a-f]{40}", task.hub.revision)}
    assert pinned == {"vqav2", "gqa", "textvqa", "pope", "mme", "docvqa", "mmmu"}
    assert {task.hub.revision for name, task in TASKS.items() if name not in pinned} == {"main"}


# What is not as it should be is named.


def test_a_question_of_a_pair_that_cannot_be_used_leaves_out_the_other(tmp_path):
    damaged = [
        {**HUB["mme"][0], "question_id": f"existence/{n}.jpg", "question": question, "answer": answer}
        for n, answers in enumerate((("Yes", "No"), ("Yes", "Perhaps")))
        for question, answer in zip(("Is there a cat?", "Is there a dog?"), answers, strict=True)
    ]
    loaded = TASKS["mme"].load(None, hub_copy(tmp_path / "mme", {("default", "test"): (damaged, ("image",))}))
    assert {sample.group for sample in loaded.samples} == {"existence/0.jpg"}
    assert len(loaded.samples) == 2
    assert [problem.kind for problem in loaded.problems] == ["unusable record", "incomplete group"]
    assert loaded.problems[1].id == "existence/1.jpg Is there a cat?"


def test_a_renamed_column_is_named_with_those_that_there_are(tmp_path):
    make_pope(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace('"text"', '"prompt"'))
    with pytest.raises(DataError, match=r"no column 'text'; there are .*label, prompt, question_id"):
        TASKS["pope"].load(None, tmp_path)


def test_a_missing_split_is_a_problem_and_the_others_are_used(tmp_path):
    make_pope(tmp_path, ("random", "adversarial"))
    loaded = TASKS["pope"].load(None, tmp_path)
    assert len(loaded.samples) == 6
    assert [(problem.id, problem.kind) for problem in loaded.problems] == [("popular", "missing split")]


@pytest.mark.parametrize("name", TASKS)
def test_an_empty_folder_is_an_error_that_names_it(name, tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        TASKS[name].load(None, tmp_path)


def test_a_split_that_the_hub_does_not_have(tmp_path):
    folder = make_hub_copy("pope", tmp_path / "pope")
    with pytest.raises(DataError, match=r"no split 'popular'; it has test"):
        TASKS["pope"].load("popular", folder)
    shutil.rmtree(folder / "default")
    parquet(folder / "default/train-00000-of-00001.parquet", HUB["pope"], ("image",))
    with pytest.raises(DataError, match="'test'"):
        TASKS["pope"].load(None, folder)


def test_damaged_records_are_counted_and_the_rest_is_used(tmp_path):
    load("chartqa", tmp_path)
    path = tmp_path / "test/test_human.json"
    rows = json.loads(path.read_text())
    put(path, [*rows, {"imgname": "x.png", "query": "No label?"}])
    load_again = TASKS["chartqa"].load(None, tmp_path)
    assert len(load_again.samples) == 3
    assert [problem.kind for problem in load_again.problems] == ["unusable record"]
    assert "no column 'label'" in load_again.problems[0].message
    put(path, "[{")
    with pytest.raises(DataError, match=r"test_human.json is not valid JSON"):
        TASKS["chartqa"].load(None, tmp_path)


@pytest.mark.parametrize("value", [None, float("nan"), "nan", "None", ""])
def test_blank_cells(value):
    assert is_blank(value)
