"""Runs: what is asked and kept, what is resumed, what is said about everything that went wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openpyxl
import pytest
import torch
from releases import make_all, make_mmvet, make_pope, make_vizwiz
from scene_suite import make_scene_suite, scene_model
from tiny_models import asked, picture, tiny_model, tiny_processor

from ms_resampler import TINY
from ms_resampler.evaluation import TASKS, Options, evaluate, report
from ms_resampler.evaluation.answering import LocalModel
from ms_resampler_cli import main as cli


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A suite of 24 questions, and a model that can answer them."""
    folder = tmp_path_factory.mktemp("scenes")
    return make_scene_suite(folder / "suite", 8), scene_model(folder / "model")


@pytest.fixture(scope="module")
def alone(scenes, tmp_path_factory):
    """The finished run of one process."""
    out = tmp_path_factory.mktemp("alone")
    evaluate(scenes[1], [scenes[0]], out, Options(batch_size=3))
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(out, name="scenes"):
    """A task's lines without the times, which differ from run to run."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in lines(out / f"{name}.jsonl")]


class Counting:
    """An answerer that counts what it is asked, and can stop."""

    def __init__(self, reply="yes", stop_after=None):
        self.encoded, self.prompts, self.batches = [], [], []
        self.reply, self.stop_after = reply, stop_after

    def encode(self, pictures):
        contents = [Path(picture).read_bytes() if isinstance(picture, Path) else picture for picture in pictures]
        if any(len(content) < 100 for content in contents):
            raise ValueError("The picture cannot be read.")
        self.encoded += contents
        return contents

    def answer(self, prompts, pictures, max_new_tokens):
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise KeyboardInterrupt
        self.prompts += prompts
        self.batches.append(prompts)
        return [self.reply(prompt) if callable(self.reply) else self.reply for prompt in prompts]

    def visual_tokens(self, encoded):
        return 9


def test_the_embedded_model_answers_its_scenes(alone):
    summary = json.loads((alone / "summary.json").read_text())
    scenes = summary["tasks"]["scenes"]
    assert scenes["value"] > 80
    assert scenes["prompt"] == "{question}"
    assert scenes["prompt_source"] == "the model's own"
    assert (scenes["samples"], scenes["answered"], scenes["scored"], scenes["remarks"]) == (24, 24, 24, [])
    assert scenes["visual_tokens_per_picture"] == 36
    assert {"family: count", "kind: yes/no"} <= scenes["numbers"].keys()
    assert summary["settings"]["sha256"]


def test_replies_are_those_of_one_question_at_a_time(alone, scenes):
    """The processor prepares picture and text together, as for anybody who does not evaluate."""
    answerer = LocalModel.load(scenes[1], None, None, "cpu")
    for row in lines(alone / "scenes.jsonl")[:6]:
        inputs = asked(answerer.processor, row["prompt"], row["pictures"][0])
        with torch.inference_mode():
            ids = answerer.model.generate(**inputs, max_new_tokens=128, do_sample=False)
        text = answerer.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == row["reply"]


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip2_vision_model"])
def test_tokens_are_those_of_the_processor(tower):
    model, processor = tiny_model(tower), tiny_processor(tower)
    answerer = LocalModel(model, processor, budget=6)
    pictures = [torch.zeros(30, 40, 3, dtype=torch.uint8).numpy() + shade for shade in (10, 200)]
    encoded = answerer.encode(pictures)
    groups, prompts = [[0, 1], [], [1]], ["Which is lighter?", "Hello?", "A longer question about one picture"]
    ours = answerer.tokenize(prompts, [[encoded[n] for n in group] for group in groups])
    theirs = processor.apply_chat_template(
        [
            [{"role": "user", "content": [*[{"type": "image"}] * len(group), {"type": "text", "text": prompt}]}]
            for prompt, group in zip(prompts, groups, strict=True)
        ],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={
            "images": [[pictures[n] for n in group] for group in groups], "padding_side": "left", "visual_tokens": 6,
        },
    )  # fmt: skip
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    features = model.get_image_features(
        **{key: value for key, value in theirs.items() if key not in ("input_ids", "attention_mask")}, return_dict=True
    )
    for group, tokens in zip((0, 1, 1), features.pooler_output, strict=True):
        torch.testing.assert_close(encoded[group].tokens, tokens, rtol=1e-4, atol=1e-5)


def test_a_question_may_quote_the_image_token():
    model, processor = tiny_model(), tiny_processor()
    answerer = LocalModel(model, processor)
    encoded = answerer.encode([torch.zeros(30, 40, 3, dtype=torch.uint8).numpy()])
    assert len(answerer.answer(["What does <image> mean?"], [encoded], 3)) == 1


def test_pictures_are_encoded_once_and_batches_have_like_lengths(tmp_path):
    make_all(tmp_path / "data")
    answerer = Counting()
    evaluate(answerer, ["pope", "mme"], tmp_path / "out", Options(data=tmp_path / "data", batch_size=4))
    assert len(answerer.prompts) == 9 + 56
    assert len(answerer.encoded) == 2 + 28  # pictures, not questions
    assert max(map(len, answerer.batches)) == 4
    suite = tmp_path / "lengths.jsonl"
    record = {"image": [], "answer": "yes", "kind": "yes/no"}
    suite.write_text("\n".join(json.dumps(record | {"id": n, "question": "x" * (n * 7 % 64)}) for n in range(512)))
    answerer = Counting()
    evaluate(answerer, [suite], tmp_path / "lengths", Options(batch_size=8))
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in answerer.batches]
    assert len(answerer.prompts) == 512
    assert max(spread) <= 8  # of 64


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    make_all(tmp_path / "data")
    options = Options(data=tmp_path / "data", batch_size=2)
    answerer = Counting(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(answerer, ["pope"], tmp_path / "out", options)
    first = answerer.prompts
    path = next((tmp_path / "out/answers").glob("*.jsonl"))
    path.write_bytes(path.read_bytes()[:-20])  # the last line was cut off
    second = Counting()
    evaluate(second, ["pope"], tmp_path / "out", options)
    assert len(first) == 4
    assert len(second.prompts) == 9 - 3
    again = Counting()
    summary = evaluate(again, ["pope", "gqa"], tmp_path / "out", options)
    assert len(again.prompts) == 3  # GQA's alone
    assert summary["tasks"]["pope"]["answered"] == 9
    assert [len(lines(tmp_path / f"out/{name}.jsonl")) for name in ("pope", "gqa")] == [9, 3]


def test_a_run_is_not_resumed_with_other_settings(tmp_path):
    make_pope(tmp_path / "data/pope")
    answerer = Counting()
    evaluate(answerer, ["pope"], tmp_path / "out", Options(data=tmp_path / "data"))
    with pytest.raises(ValueError, match=r"visual_tokens = None, but this one has 9"):
        evaluate(answerer, ["pope"], tmp_path / "out", Options(data=tmp_path / "data", visual_tokens=9))


def test_everything_that_is_wrong_is_counted_and_named(tmp_path):
    data = tmp_path / "data"
    make_pope(data / "pope", ("random", "adversarial"))
    make_vizwiz(data / "vizwiz")
    make_mmvet(data / "mmvet")
    (data / "pope/val2014/COCO_val2014_000000210789.jpg").write_bytes(b"\xff\xd8 no picture")
    (data / "vizwiz/val/VizWiz_val_00000001.jpg").unlink()
    (data / "gqa").mkdir()
    answerer = Counting(reply="perhaps")
    summary = evaluate(answerer, ["pope", "vizwiz", "gqa", "mmvet"], tmp_path / "out", Options(data=data))
    tasks = summary["tasks"]
    assert {kind: found["count"] for kind, found in tasks["pope"]["problems"].items()} == {
        "missing split": 1, "unreadable picture": 2,
    }  # fmt: skip
    assert "random 3: The picture cannot be read." in tasks["pope"]["problems"]["unreadable picture"]["examples"]
    assert (tasks["pope"]["answered"], tasks["pope"]["not_parsed"]) == (4, 4)
    assert tasks["vizwiz"]["problems"]["unreadable picture"]["count"] == 1
    assert "VizWiz_val_00000001.jpg" in tasks["vizwiz"]["problems"]["unreadable picture"]["examples"][0]
    assert tasks["gqa"]["value"] is None
    assert "has no testdev_balanced_questions.json" in tasks["gqa"]["error"]
    assert tasks["mmvet"]["value"] is None
    assert "judge" in tasks["mmvet"]["remarks"][0]
    shown = report([tmp_path / "out"])
    assert shown.splitlines()[1].count("*") == 2  # POPE's and VizWiz's numbers
    for said in ("failed", "not scored", "2 x unreadable picture", "4 of 4 replies were not understood", "popular"):
        assert said in shown


def test_an_incomplete_group_takes_no_part(tmp_path):
    make_all(tmp_path / "data")
    folder = tmp_path / "data/mme/MME_Benchmark_release_version/count"
    (folder / "0001.jpg").write_bytes(b"")
    (folder / "0002.txt").write_text("Is there one question?\tYes\n")
    answerer = Counting(reply=lambda prompt: "yes" if "cat" in prompt else "no")
    mme = evaluate(answerer, ["mme"], tmp_path / "out", Options(data=tmp_path / "data"))["tasks"]["mme"]
    assert "count" not in mme["numbers"]
    assert mme["value"] == 9 * 200
    assert mme["problems"]["unusable record"]["examples"] == ["count/0002.txt: The file does not hold two questions."]


def test_a_judge_reads_what_the_rules_cannot(tmp_path):
    make_all(tmp_path / "data")
    asked = []

    def judge(*, task, question, truth, options, reply):
        asked.append((task, question, truth, options, reply))
        if task == "mmbench":
            return truth if question == "Which is right?" else "Z"
        return {"-1<AND>-5": "0.5", "cat<OR>kitten": "none at all"}[truth]

    answerer = Counting(reply="the second, I should say")
    options = Options(data=tmp_path / "data", judge=judge)
    tasks = evaluate(answerer, ["mmvet", "mmbench"], tmp_path / "out", options)["tasks"]
    assert tasks["mmbench"]["value"] == 50
    assert tasks["mmbench"]["not_parsed"] == 0
    assert tasks["mmvet"]["value"] == 50  # of the one that was graded
    assert tasks["mmvet"]["numbers"]["ability: math"] == 50
    assert tasks["mmvet"]["problems"]["judge"]["count"] == 1
    assert len(asked) == 2 + 6
    assert lines(tmp_path / "out/mmvet.jsonl")[0]["score"] == 0.5


def test_exports_have_the_servers_formats(tmp_path):
    make_all(tmp_path / "data")
    answerer = Counting(reply="=A, the dog.")
    splits = {"vqav2": "test-dev", "vizwiz": "test"}
    summary = evaluate(answerer, ["all"], tmp_path / "out", Options(data=tmp_path / "data", splits=splits))
    exports = tmp_path / "out/exports"

    def read(name):
        return json.loads((exports / name).read_text())

    assert read("vqav2_submission.json")[0] == {"question_id": 42000, "answer": "dog"}
    assert read("vizwiz_submission.json") == [{"image": "VizWiz_test_00000000.jpg", "answer": "dog"}]
    assert read("mmvet_predictions.json") == {"v1_0": "=A, the dog.", "v1_1": "=A, the dog."}
    assert read("docvqa_submission.json")[0] == {"questionId": 337, "answer": "=A, the dog."}
    assert read("testdev_balanced_predictions.json")[0] == {"questionId": "201307251", "prediction": "=a, the dog"}
    assert "submit" in summary["tasks"]["vqav2"]["remarks"][0]
    for name in ("mmbench", "mmbench_cn"):
        header, *rows = openpyxl.load_workbook(exports / f"{name}_submission.xlsx").active.iter_rows(values_only=True)
        assert header == ("index", "question", "A", "B", "C", "D", "answer", "split", "prediction")
        assert len(rows) == 6
        assert rows[0][-1] == "=A, the dog."  # a text, not a formula


def test_blind_runs_see_no_picture_and_limits_keep_groups_whole(tmp_path):
    make_all(tmp_path / "data")
    answerer = Counting()
    options = Options(data=tmp_path / "data", blind=True, limit=3)
    tasks = evaluate(answerer, ["mme", "mmbench"], tmp_path / "out", options)["tasks"]
    assert answerer.encoded == []
    assert [tasks[name]["scored"] for name in ("mme", "mmbench")] == [4, 4]
    assert "Only 4 samples were asked." in tasks["mme"]["remarks"]


def test_unknown_tasks_and_prompts_that_do_not_fit_are_refused(tmp_path, scenes):
    with pytest.raises(ValueError, match="no task 'popp'; there are ten, all, vqav2"):
        evaluate(TINY, ["popp"], tmp_path / "out")
    model = Path(scenes[1]).rename(tmp_path / "model")
    model.rename(scenes[1])
    prompts = Path(scenes[1]) / "evaluation_prompts.json"
    before = prompts.read_text()
    prompts.write_text(json.dumps({"scenes": "{question} {hint}"}))
    try:
        with pytest.raises(ValueError, match=r"does not fit: its fields are \{question\}, \{options\}"):
            evaluate(scenes[1], [scenes[0]], tmp_path / "out")
    finally:
        prompts.write_text(before)


def test_suite_files_refuse_what_they_do_not_know(tmp_path):
    record = {"id": 1, "image": "a.png", "question": "Is it?", "answer": "yes", "kind": "yes/no"}
    wrong = [
        record,
        record | {"id": 2, "colour": "red"},
        record | {"id": 3, "answer": "maybe"},
        record | {"id": 4, "kind": "essay"},
        record | {"id": 5, "kind": "choice", "options": ["a", "b"], "answer": "C"},
        record | {"id": 6, "kind": "number", "answer": "few"},
        {key: value for key, value in record.items() if key != "question"},
        record,
    ]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, wrong)) + "\nnot JSON\n")
    answerer = Counting()
    problems = evaluate(answerer, [tmp_path / "odd.jsonl"], tmp_path / "out")["tasks"]["odd"]["problems"]
    assert {kind: found["count"] for kind, found in problems.items()} == {
        "unusable record": 7, "repeated id": 1, "unreadable picture": 1,
    }  # fmt: skip


def test_lines_end_at_a_newline_alone(tmp_path):
    """Texts may hold what str.splitlines() takes for the end of a line."""
    text = "one\u2028two\x85three"
    record = {"id": 1, "image": [], "question": text, "answer": "yes", "kind": "yes/no"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    answerer = Counting(reply=text)
    for _ in range(2):  # the second run asks nothing again
        task = evaluate(answerer, [tmp_path / "odd.jsonl"], tmp_path / "out")["tasks"]["odd"]
        assert task["problems"] == {}
        assert len(answerer.prompts) == 1


def command(model, suite, out, *more, launcher=()):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = ["ms_resampler_cli.main", "evaluate", model, "--tasks", suite, "--out", out, "--batch-size", "3", *more]
    full = [sys.executable, "-m", *map(str, launcher), *(["-m"] if launcher else []), *map(str, arguments)]
    return subprocess.Popen(full, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_run_resumes_and_asks_nothing_twice(scenes, alone, tmp_path):
    answers = tmp_path / "model/answers/scenes.rank0.jsonl"
    process = command(scenes[1], scenes[0], tmp_path)
    while process.poll() is None and not (answers.is_file() and len(lines(answers)) >= 6):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(lines(answers))
    assert 6 <= before < 24
    done = command(scenes[1], scenes[0], tmp_path)
    output, errors = done.communicate()
    assert done.returncode == 0, errors
    assert "scenes" in output
    assert sorted(int(row["id"]) for row in lines(answers)) == list(range(24))
    assert results(tmp_path / "model") == results(alone)


@pytest.mark.slow
def test_two_processes_have_the_result_of_one(scenes, alone, tmp_path):
    configuration = Path(TINY).parents[1] / "training/launchers/ddp.yaml"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = ("accelerate.commands.launch", "--config_file", configuration, "--num_processes", "2",
                "--main_process_port", port)  # fmt: skip
    done = command(scenes[1], scenes[0], tmp_path, launcher=launcher)
    _, errors = done.communicate()
    assert done.returncode == 0, errors[-3000:]
    shares = [lines(tmp_path / f"model/answers/scenes.rank{rank}.jsonl") for rank in (0, 1)]
    assert min(map(len, shares)) > 0
    assert sum(map(len, shares)) == 24
    assert results(tmp_path / "model") == results(alone)
    ours, theirs = (
        json.loads((out / "summary.json").read_text())["tasks"]["scenes"] for out in (tmp_path / "model", alone)
    )
    times = {"seconds_per_question"}
    assert {k: v for k, v in ours.items() if k not in times} == {k: v for k, v in theirs.items() if k not in times}


def test_the_command_prints_the_table_and_says_what_failed(tmp_path, capsys, monkeypatch):
    make_all(tmp_path / "data")
    monkeypatch.setattr("ms_resampler.evaluation.run.the_answerer", lambda *_: Counting())
    arguments = ["evaluate", TINY, "--tasks", "ten", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    for title in (
        "VQAv2",
        "GQA",
        "VizWiz",
        "SQA-I",
        "TextVQA",
        "POPE",
        "MME-P",
        "MMB",
        "MMB-CN",
        "MM-Vet",
        "MQT-LLaVA",
    ):
        assert title in shown
    assert cli.main(["evaluate"]) == 2
    assert "Name a model to evaluate" in capsys.readouterr().err
    (tmp_path / "data/gqa/testdev_balanced_questions.json").unlink()
    assert cli.main([*arguments, "--tasks", "gqa", "--markdown"]) == 2
    assert "| failed" in capsys.readouterr().out


def test_the_command_evaluates_with_a_reducer(tmp_path, monkeypatch):
    make_all(tmp_path / "data")
    asked = []
    monkeypatch.setattr("ms_resampler.evaluation.run.the_answerer", lambda *given: asked.append(given) or Counting())
    arguments = ["evaluate", TINY, "--tasks", "gqa", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    settings = ["--reducer-option", "layer=3", "--reducer-option", "text_pivots=2"]
    for number, (more, reducer, name) in enumerate(
        [
            (["divprune", "--keep", "9"], {"reducer_type": "divprune", "keep": 9}, "divprune-9"),
            (["dart", "--keep", "9", *settings], {"reducer_type": "dart", "keep": 9, "layer": 3, "text_pivots": 2},
             "dart-9-layer3-text_pivots2"),
            (["sparsevlm", "--reducer-option", "counts=[9,4,2]"], {"reducer_type": "sparsevlm", "counts": [9, 4, 2]},
             "sparsevlm-counts9x4x2"),
        ]
    ):  # fmt: skip
        assert cli.main([*arguments, "--reducer", *more]) == 0
        (options,) = (one for one in asked[number] if isinstance(one, Options))
        assert options.reducer == reducer
        (written,) = (tmp_path / "out").glob(f"*-{name}/settings.json")
        assert json.loads(written.read_text())["reducer"] == options.reducer


def test_every_task_has_a_headline_that_its_numbers_hold(tmp_path):
    make_all(tmp_path / "data")
    answerer = Counting()
    tasks = evaluate(answerer, ["all"], tmp_path / "out", Options(data=tmp_path / "data"))["tasks"]
    assert tasks.keys() == TASKS.keys()
    for name, task in tasks.items():
        assert name == "mmvet" or task["numbers"][task["headline"]] == task["value"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("divprune", {"keep": 9}), ("fastv", {"keep": 9, "layer": 1}), ("visionzip", {"keep": 9}),
     ("mustdrop", {"layers": (0, 1), "thresholds": (0.03, 0.06)})],
)  # fmt: skip
def test_a_reduced_model_is_evaluated_as_it_answers(kind, settings):
    """Pictures are encoded once for all their questions, and replies are those of `generate` on the pixels."""
    projector = {"projector_type": "mlp", "visual_tokens": [6, 6]}
    model = tiny_model(text="llama", projector=projector, text_changes={"num_hidden_layers": 3})
    processor = tiny_processor(visual_tokens=[6, 6])
    answerer = LocalModel(model, processor, reducer={"reducer_type": kind, **settings})
    shown = [picture(0), picture(1)]
    encoded = answerer.encode(shown)
    if kind in ("divprune", "visionzip"):
        assert [answerer.visual_tokens(one) for one in encoded] == [9, 9]
    replies = answerer.answer(["What?", "Is it red?"], [encoded[:1], encoded], 6)
    for question, pictures, reply in (("What?", shown[:1], replies[0]), ("Is it red?", shown, replies[1])):
        inputs = asked(processor, question, *pictures)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == reply
