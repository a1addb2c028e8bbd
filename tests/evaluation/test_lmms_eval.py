"""lmms-eval finds the model by an entry point, and its results are ours.

lmms-eval demands torchvision, which the project does without: where it is not installed, a stub of the interface that
it documents stands for it. The comparisons with lmms-eval itself run where it is: pip install --no-deps lmms_eval, and
then what its import asks for.
"""

import importlib
import json
import random
import re
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from scene_suite import make_scene_suite, scene_model

from ms_resampler.evaluation import Options, evaluate, metrics

REAL = find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not REAL, reason="lmms_eval is not installed")


WORDS = """
yes no the a an two ten none dont isnt he'd 1,000 3.5 10% 12 cat dog. -red, (b) B A C. Answer answer is so = Z
can't O'Clock oclock 2/3 x-ray hello? 1e5 .5 1.25e-3 :) A. (A) D, theyre it's 'ow'sat $5 100,000 50% 0 0.0 -3
"""


def random_text(rng: random.Random, longest: int = 6) -> str:
    return "".join(
        rng.choice(WORDS.split()) + rng.choice([" ", " ", "", ". ", ", ", "\n", "\t "])
        for _ in range(rng.randint(0, longest))
    )


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module, over lmms-eval or over a stub of what it documents."""
    if not REAL:
        for name, members in stub().items():
            module = types.ModuleType(name)
            module.__dict__.update(members)
            monkeypatch.setitem(sys.modules, name, module)
    name = "ms_resampler.evaluation.lmms_eval_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def stub() -> dict[str, dict]:
    class Model:
        def __init__(self):
            self.cache_hook, self.task_dict = types.SimpleNamespace(add_partial=lambda *_: None), {}

    @dataclass
    class Instance:
        request_type: str
        arguments: tuple
        idx: int
        metadata: dict = field(default_factory=dict)
        args = property(lambda self: self.arguments)

    @dataclass(frozen=True)
    class Manifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None

    parts = {"api.model": {"lmms": Model}, "api.instance": {"Instance": Instance},
             "models.registry_v2": {"ModelManifest": Manifest}}  # fmt: skip
    return {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {}} | {
        f"lmms_eval.{k}": v for k, v in parts.items()
    }


def test_the_entry_point_names_the_class(adapter):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, function = project["project"]["entry-points"]["lmms_eval.models"]["ms_resampler"].split(":")
    manifest = getattr(importlib.import_module(module), function)()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert issubclass(
        getattr(importlib.import_module(module), name), importlib.import_module("lmms_eval.api.model").lmms
    )


def test_batched_requests_get_the_evaluators_replies(adapter, tmp_path):
    suite, model = make_scene_suite(tmp_path / "suite", 6), scene_model(tmp_path / "model")
    evaluate(model, [suite], tmp_path / "ours", Options(visual_tokens=(3, 3), batch_size=5))
    ours = [json.loads(line)["reply"] for line in (tmp_path / "ours/scenes.jsonl").read_text().splitlines()]
    documents = [json.loads(line) for line in suite.read_text().splitlines()]
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    requests = [
        instance(
            "generate_until",
            (document["question"], {"max_new_tokens": 128, "until": ["\n\n"]}, visual(suite), n, "scenes", "test"),
            0,
            {"task": "scenes", "doc_id": n, "repeats": 1},
        )
        for n, document in enumerate(documents)
    ]
    wrapped = adapter.MSResamplerForLmmsEval(pretrained=model, visual_tokens="3x3", batch_size=4, device="cpu")
    wrapped.task_dict = {"scenes": {"test": documents}}
    assert wrapped.generate_until(requests) == ours
    with pytest.raises(ValueError, match="does not know slices"):
        adapter.MSResamplerForLmmsEval(pretrained=model, slices=4)


def visual(suite: Path):
    return lambda document: [Image.open(suite.parent / document["image"])]


TASK = """
task: pope
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{documents}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 128, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
metadata: {{version: 0.0}}
"""


@needs_lmms_eval
@pytest.mark.slow
def test_lmms_eval_runs_a_local_task_with_our_numbers(tmp_path):
    suite, model = make_scene_suite(tmp_path / "suite", 12), scene_model(tmp_path / "model")
    lines = [line for line in suite.read_text().splitlines() if json.loads(line)["kind"] == "yes/no"]
    suite.write_text("\n".join(lines))
    ours = evaluate(model, [suite], tmp_path / "ours", Options(visual_tokens=9))["tasks"]["scenes"]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "pope_local.yaml").write_text(TASK.format(documents=suite).replace("task: pope", "task: scenes_local"))
    (tasks / "utils.py").write_text(
        f"from PIL import Image\ndef to_visual(doc):\n    return [Image.open('{suite.parent}/' + doc['image'])]\n"
    )
    plugin = tmp_path / "plugin/ms_resampler_plugin-0.dist-info"  # what an installed package brings
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: ms-resampler-plugin\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(
        "[lmms_eval.models]\nms_resampler = ms_resampler.evaluation.lmms_eval_model:manifest\n"
    )
    arguments = (
        f"--model ms_resampler --model_args pretrained={model},visual_tokens=9 --tasks scenes_local --batch_size 4"
    )
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *arguments.split(), "--include_path", str(tasks), "--output_path",
         str(tmp_path / "theirs"), "--log_samples", "--device", "cpu"],
        env={**__import__("os").environ, "PYTHONPATH": ":".join([str(plugin.parent), *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    results = json.loads(next((tmp_path / "theirs").rglob("*_results.json")).read_text())
    theirs = results["results"]["scenes_local"]["exact_match,none"]
    assert 0.5 < theirs == pytest.approx(ours["value"] / 100)


@needs_lmms_eval
def test_vqa_accuracy_is_that_of_lmms_eval():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    rng, reference = random.Random(0), EvalAIAnswerProcessor()
    for _ in range(5000):
        text = random_text(rng)
        assert metrics.evalai_normalise(text) == reference(text)
        answers = [rng.choice([random_text(rng, 2), "dog", "two", "the dog", "2"]) for _ in range(10)]
        reply = rng.choice([text, *answers])
        document = {"question_id": 1, "answers": list(answers)}
        assert metrics.textvqa_accuracy(reply, answers) == pytest.approx(
            textvqa_process_results(document, [reply])["exact_match"]
        )
        if len({re.sub(r"\s", " ", answer).strip() for answer in answers}) > 1:
            rows = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)]
            theirs = vqav2_process_results({"question_id": 1, "answers": rows}, [reply])["exact_match"]
            assert metrics.vqa_accuracy(reply, answers) == pytest.approx(theirs)


@needs_lmms_eval
def test_mmmu_parsing_is_that_of_lmms_eval():
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    rng = random.Random(0)
    mmmu_mcq_utils.random = types.SimpleNamespace(choice=lambda letters: None)  # where it would guess
    for _ in range(5000):
        text = random_text(rng)
        options = [
            rng.choice(["cat", "dog", "red", "a dog"]) + rng.choice(["", " x"]) for _ in range(rng.randint(2, 5))
        ]
        letters = [chr(65 + index) for index in range(len(options))]
        named = dict(zip(letters, options, strict=True))
        theirs = mmmu_mcq_utils.parse_mmmu_multi_choice_response(text, letters, named)
        assert metrics.mmmu_letter(text, options) == theirs
        truths = rng.choice([["12"], ["cat", "dog"], ["A"], ["3.5"], ["100000"]])
        assert metrics.mmmu_open_match(text, truths) == eval_open(truths, parse_open_response(text))
