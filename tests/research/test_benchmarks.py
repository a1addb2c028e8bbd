"""The benchmarks count what the peers' publications and original code add up to."""

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen2Config

from ms_resampler.reducers_ms_resampler import REDUCERS
from ms_resampler.training.recipes import RECIPES
from ms_resampler.training.step_time import milliseconds, peak_memory
from research.benchmarks.loading import table as loading_table
from research.benchmarks.model import (
    QWEN,
    TOWER,
    VICUNA,
    WORDS,
    contenders,
    make_models,
    make_prompt,
    make_recorded_run,
    make_run,
    measure_prompts,
    shapes,
    token_times,
    uncounted_placeholders,
    weight_bytes,
)
from research.benchmarks.model import prompt_table as model_table
from research.benchmarks.preprocessing import measure as measure_preprocessing
from research.benchmarks.prior_form import FORMS, error
from research.benchmarks.prior_form import main as measure_prior_forms
from research.benchmarks.projectors import (
    PUBLISHED,
    SUITE,
    Setting,
    along,
    arguments,
    chosen,
    cost,
    draw,
    measure,
    summary,
    table,
)
from research.benchmarks.projectors import make_run as make_projector_run
from research.benchmarks.reducers import main as measure_reducers
from research.benchmarks.tiles import make_model as make_tiled_model
from research.benchmarks.tiles import measure as measure_tiles
from research.benchmarks.tiles import table as tiles_table
from research.benchmarks.training_step import PROJECTORS, make_steps
from research.benchmarks.training_step import make_models as make_training_models
from research.benchmarks.training_step import measure as measure_training
from research.benchmarks.training_step import table as training_table
from research.timing import LEAST, count_macs, in_turn, rates

# Parameters and multiply-accumulates in millions, counted on the originals at 576 x 1024 -> 144 -> 4096. Tables of
# positions that are never trained are not counted here: 256 x 1024 in mqt, 144 x 4096 in qwen_resampler.
ORIGINALS = {
    "mlp": (20.98, 12080),
    "avg_pool": (20.98, 3020),
    "token_packer": (36.72, 10720),
    "c_abstractor": (37.40, 7570),
    "ldp_v2": (21.02, 12080),
    "mqt": (8.92 - 0.26, 2280),
    "saep": (21.02, 12080),
    "pixel_shuffle": (33.57, 4830),
    "qwen_resampler": (89.30 - 0.59, 29670),
    "perceiver": (67.30, 13920),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_peer_costs_what_its_original_does(name):
    parameters, macs = cost(name)
    assert parameters / 1e6 == pytest.approx(ORIGINALS[name][0], abs=0.011)
    assert macs / 1e6 == pytest.approx(ORIGINALS[name][1], rel=0.02)


def test_operations_are_those_of_the_batch_and_of_its_gradients():
    """Queries of the first layer once for a batch; a product of matrices has two more for its gradients."""
    shared = 144 * 768 * 768  # W_q
    asking = "ms_resampler, learned queries"
    assert 8 * cost(asking)[1] - cost(asking, Setting(batch=8))[1] == 7 * shared
    assert 8 * cost("ms_resampler")[1] == cost("ms_resampler", Setting(batch=8))[1] < cost(asking, Setting(batch=8))[1]
    assert 8 * cost("mlp")[1] == cost("mlp", Setting(batch=8))[1]
    first, second = 576 * 1024 * 4096, 576 * 4096 * 4096
    assert cost("mlp", Setting(backward=True))[1] == 2 * first + 3 * second  # the patches need no gradient
    conv, x = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 5, 5, requires_grad=True)
    assert count_macs(lambda: conv(x).sum().backward()) == 3 * 25 * 9 * 8


def test_peak_memory_is_the_same_whatever_was_measured_before():
    layer = torch.nn.Linear(512, 512)

    def run() -> None:
        layer.zero_grad()  # frees the gradients of the run before
        layer(torch.ones(1, 512)).sum().backward()

    peaks = [peak_memory(run) for _ in range(3)]
    assert len(set(peaks)) == 1
    assert 4 * 512 * 513 < peaks[0] < 1.02 * 4 * 512 * 513  # the gradients, and little more


@pytest.mark.slow
def test_projectors_are_measured_in_turn(tmp_path, monkeypatch):
    assert set(PUBLISHED) >= set(ORIGINALS)
    monkeypatch.setattr("research.benchmarks.projectors.rates", lambda dtype: (1e9, 1e9))
    names = ["resampler", "ms_resampler, learned queries", "ms_resampler, branches", "ms_resampler"]
    settings = [Setting(grid=4, tokens=tokens, batch=2, backward=True) for tokens in (4, 1)]
    results = [{"setting": vars(setting), "rows": measure(setting, names, repeats=2)} for setting in settings]
    rows = results[0]["rows"]
    assert [(row["projector"], len(row["ms"])) for row in rows] == [(name, 2) for name in names]
    one, shared, branches, without = (row["macs"] for row in rows)
    assert without < one <= shared < 1.001 * one < branches  # scopes that share out the heads cost just their gate
    assert all(row["peak_bytes"] > 4 * row["parameters"] for row in rows)  # the gradients are among it
    for row in rows:
        assert row["floor_ms"] == pytest.approx(max(row["macs"], bytes_of(row, settings[0])) / 1e6)
    assert len(table(rows).splitlines()) == 2 + len(names)
    assert list(along(results, "tokens")) == [1, 4]
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def bytes_of(row: dict, setting: Setting) -> int:
    return 3 * 4 * (row["parameters"] + setting.batch * setting.grid**2 * 1024)


def test_ratios_are_those_within_a_round():
    times = {"resampler": [10.0, 20.0, 40.0], "ms_resampler": [11.0, 22.0, 44.0], "mqt": [5.0, 10.0]}
    rows = [
        {"projector": name, "ms": ms, "parameters": 1, "macs": 1, "floor_ms": 1, "peak_bytes": 1}
        for name, ms in times.items()
    ]
    cells = [line.split(" | ") for line in table(rows).splitlines()[2:]]
    assert [row[5:7] for row in cells] == [["1.00", "0.91"], ["1.10", "1.00"], ["0.50", "0.45"]]
    head, _, line = summary([{"setting": vars(Setting(batch=8)), "rows": rows}]).splitlines()
    found = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert "batch 8" in line
    assert (found["ms_resampler, ms"], found["share of the floor"]) == ("22.0", "5%")
    assert (found["resampler"], found["mqt"], found["token_packer"]) == ("0.91", "0.45", "")


def test_the_suite_has_what_performance_is_about():
    settings = [setting for _, setting in SUITE]
    assert {setting.tokens for setting in settings} == {256, 144, 64, 36}
    assert {setting.grid for setting in settings} == {24, 36, 48, 72, 96}
    combinations = {(setting.batch, setting.dtype, setting.backward) for setting in settings}
    assert combinations >= {(batch, "float32", backward) for batch in (1, 8, 32) for backward in (False, True)}
    assert combinations >= {(1, "bfloat16", False), (8, "bfloat16", False), (1, "bfloat16", True)}
    assert all({"resampler", "ms_resampler", "mqt"} <= set(names) for names, _ in SUITE)


@pytest.mark.parametrize(("half", "left"), [(True, 16), (False, 13)])
def test_the_suite_leaves_out_half_precision_where_it_is_emulated(half, left, monkeypatch):
    monkeypatch.setattr("research.benchmarks.projectors.HALF", half)
    settings = [setting for _, setting in chosen(Namespace(suite=True))]
    assert len(settings) == left
    assert ("bfloat16" in {setting.dtype for setting in settings}) == half


@pytest.mark.slow
def test_every_projector_of_the_suite_can_do_what_is_asked_of_it():
    asked = {(name, setting.grid, setting.tokens) for names, setting in SUITE for name in names}
    for name, grid, tokens in asked:
        if name != "idefics2_perceiver":  # which looks at its data, and is large
            make_projector_run(name, Setting(grid, tokens), "meta")[1]()


def test_packed_projectors_are_measured_where_it_is_asked_for(monkeypatch):
    asked = ["projectors.py", "--packed", "--tokens", "4", "--grid", "4", "--projectors", "ms_resampler"]
    monkeypatch.setattr("sys.argv", asked)
    monkeypatch.setattr("research.benchmarks.projectors.DEVICE", "cpu")
    ((_, setting),) = chosen(arguments())
    assert setting == Setting(grid=4, tokens=4, packed=True)
    assert str(setting).endswith("forward, packed")
    packed, plain = (
        make_projector_run("ms_resampler", some, "cpu") for some in (setting, replace(setting, packed=False))
    )
    assert not [part for part in packed[0].modules() if type(part) is torch.nn.Linear]
    assert [part for part in plain[0].modules() if type(part) is torch.nn.Linear]
    packed[1]()
    assert cost("ms_resampler", setting) == cost("ms_resampler", replace(setting, packed=False))
    make_projector_run("mqt", setting, "cpu")[1]()  # which has no linear layers to pack
    with monkeypatch.context() as without:
        without.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="there are no packed weights for float32 on this processor"):
            make_projector_run("ms_resampler", setting, "cpu")
    monkeypatch.setattr("sys.argv", [*asked, "--backward"])
    with pytest.raises(SystemExit):
        arguments()


class Clock:
    """What `timing` reads the time from: it goes on only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock.perf_counter)
    return clock


def test_slow_runs_are_repeated_less_and_every_round_is_in_turn(clock):
    order = []

    def run(name: str, seconds: float) -> str:
        clock.advance(seconds)
        order.append(name)
        return name

    runs = {"quick": partial(run, "quick", 0.005), "slow": partial(run, "slow", 0.05)}
    found = in_turn(runs, repeats=5, seconds=0.04)
    assert found == {"quick": ["quick"] * 5, "slow": ["slow"] * LEAST}
    assert order == ["quick", "slow"] * LEAST + ["quick"] * 2


def test_a_run_is_timed_without_what_was_queued_before(clock, monkeypatch):
    queued = [5.0]  # seconds of work that a GPU has not done yet

    def synchronize() -> None:
        clock.advance(sum(queued))
        queued.clear()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert milliseconds(lambda: queued.append(2.0)) == 2000


@pytest.mark.slow
def test_the_floor_is_what_this_machine_can_do():
    macs, bytes_moved = rates(torch.float32)
    assert 1e8 < macs < 1e15
    assert 1e8 < bytes_moved < 1e14


TINY_TOWER = TOWER | {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TINY_TEXT = {
    "vocab_size": 1200,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def tiny_parts():
    return shapes(TINY_TOWER, Qwen2Config(**QWEN | TINY_TEXT))


def test_llava_and_ours_answer_with_the_same_parts(tiny_parts):
    llava, ours = make_models(tiny_parts)
    assert {id(p) for p in llava.model.vision_tower.parameters()} <= {id(p) for p in ours.parameters()}
    assert {id(p) for p in llava.model.language_model.parameters()} <= {id(p) for p in ours.parameters()}
    with torch.no_grad():
        assert all(m(**make_prompt(m, 2, n)).logits.isfinite().all() for m, n in ((llava, 16), (ours, 9)))
    lengths = {"LLaVA, 16": 2 * 16, "ours, 4": 2 * 4, "ours, 9": 2 * 9}
    names = contenders(llava, ours, [4, 9])
    answers = {name: make_run(*model, images=2, new_tokens=3, requests=2)() for name, model in names.items()}
    assert {name: answer.shape for name, answer in answers.items()} == {
        name: (2, visual + WORDS + 3) for name, visual in lengths.items()
    }
    ran = []
    for layer in llava.model.vision_tower.encoder.layers:
        layer.layer_norm1.register_forward_hook(lambda *_: ran.append(1))
    make_run(*names["ours, 4"], images=1, new_tokens=1)()
    assert len(ran) == 2  # of three: the last is not read
    make_run(*names["LLaVA, 16"], images=1, new_tokens=1)()
    assert len(ran) == 2 + 3


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@torch.no_grad()
def test_packed_models_and_layers_of_the_same_weights_answer_alike():
    parts = shapes(TINY_TOWER, LlamaConfig(**TINY_TEXT))
    for one_layer in (False, True):
        plain, packed = (make_models(parts, one_layer=one_layer, packed=packed) for packed in (False, True))
        for one, other, visual_tokens in zip(plain, packed, (16, 4), strict=True):
            assert not any(type(part) is torch.nn.Linear for part in other.modules())
            assert len(other.model.language_model.layers) == 2
            assert other.num_parameters() == one.num_parameters()
            prompt = make_prompt(one, 1, visual_tokens)
            torch.testing.assert_close(other(**prompt).logits, one(**prompt).logits, rtol=1e-4, atol=1e-5)
    first, second = plain[0].model.language_model.layers
    assert {id(weight) for weight in first.parameters()} == {id(weight) for weight in second.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_recorded_says_what_generate_does(tiny_parts, compiled, monkeypatch):
    """Token for token, a second time too; compiled as one graph of the prompt and one of a token."""
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    for number, (model, visual_tokens) in enumerate(contenders(*make_models(tiny_parts), [4]).values(), 1):
        torch.manual_seed(1)
        run = make_recorded_run(model, visual_tokens, images=2, new_tokens=4, compiled=compiled)
        torch.manual_seed(1)
        expected = make_run(model, visual_tokens, images=2, new_tokens=4)()
        assert torch.equal(run(), expected)
        assert torch.equal(run(), expected)
        assert len(token_times(run)) == 4
        assert graphs.frame_count == (2 * number if compiled else 0)


@pytest.mark.slow
def test_all_forms_of_the_prior_are_measured_and_right(monkeypatch, capsys):
    x, grids = torch.randn(1, 24, 1024), ((4, 6), (2, 3))
    assert all(error(form, torch.float32, x, grids) < 2e-5 for form in FORMS)
    monkeypatch.setattr(sys, "argv", ["prior_form", "--patches=2", "--tokens=1", "--batch=1", "--repeats=1"])
    measure_prior_forms()
    head, _, *rows = (line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line)
    assert [form.strip() for form in head[4:-2]] == list(FORMS)
    assert len(rows) == 4  # two dtypes, with gradients and without
    assert {len(row) for row in rows} == {len(head)}


class Waits(TorchDispatchMode):
    """Notes what a GPU would have to be waited for, or sent from Python: neither can be part of a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.lift_fresh):
            self.found.append(str(operation))
        return operation(*args, **kwargs or {})


@torch.no_grad()
def test_what_is_recorded_waits_for_no_number_and_sends_none(tiny_parts, monkeypatch):
    """Of the prompt and of a token after it; transformers' masks do as while a graph is recorded."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    for model, visual_tokens in contenders(*make_models(tiny_parts), [4]).values():
        run = make_recorded_run(model, visual_tokens, images=2, new_tokens=2)
        with Waits() as counted:
            run()
        assert "aten._local_scalar_dense.default" in counted.found
        with uncounted_placeholders(), Waits() as waits:
            run()
        assert waits.found == []


def test_a_table_of_embeddings_is_read_whole_only_as_the_head():
    for tied in (True, False):
        text = Qwen2Config(**QWEN | TINY_TEXT | {"tie_word_embeddings": tied})
        llava, _ = make_models(shapes(TINY_TOWER, text))
        looked_up = 0 if tied else text.vocab_size * text.hidden_size
        assert weight_bytes(llava) == 4 * (sum(weight.numel() for weight in llava.parameters()) - looked_up)


def test_a_model_is_measured_up_to_the_first_token_and_after_it(tiny_parts):
    llava, ours = make_models(tiny_parts)
    speed = 1e9, 1e3  # so slow a copy that reading the weights is the floor
    records = measure_prompts(contenders(llava, ours, [4]), images=2, new_tokens=2, repeats=2, speed=speed)
    assert all(len(record["first_ms"]) == len(record["further_ms"]) == 2 for record in records.values())
    assert all(record["peak_bytes"] > 0 for record in records.values())
    assert len(model_table(records, 2).splitlines()) == 2 + len(records)
    twice = {
        f"{name}, packed": record | {"first_ms": [2 * ms for ms in record["first_ms"]]}
        for name, record in records.items()
    }
    head, _, *rows = (line.split(" | ") for line in model_table(records | twice, 2).splitlines())
    relative = [[float(row[head.index(f"x LLaVA, 16{suffix}")]) for suffix in ("", ", packed")] for row in rows]
    assert relative[0] == [1.0, 0.5]
    assert relative[2] == [2.0, 1.0]
    assert records["LLaVA, 16"]["floor_ms"] == 4 * sum(weight.numel() for weight in llava.parameters())
    quick = measure_prompts(contenders(llava, ours, [4]), images=2, new_tokens=0, repeats=1, speed=(1e9, 1e99))
    assert quick["LLaVA, 16"]["floor_ms"] == pytest.approx(quick["LLaVA, 16"]["macs"] / 1e6)
    prompt = make_prompt(llava, images=2, visual_tokens=16)
    with torch.no_grad():
        real = count_macs(lambda: llava(**prompt, logits_to_keep=1))
    assert records["LLaVA, 16"]["macs"] == real  # of a forward pass with data


def test_the_time_of_every_token_is_noted(tiny_parts, monkeypatch):
    (model, visual_tokens), *_ = contenders(*make_models(tiny_parts), [4]).values()
    run, seconds = make_run(model, visual_tokens, images=1, new_tokens=3), iter([1.0, 3.0, 3.5, 4.5])
    monkeypatch.setattr("research.benchmarks.model.time.perf_counter", lambda: next(seconds))
    assert token_times(run) == [2000.0, 2500.0, 3500.0]


def test_layers_that_share_weights_do_what_layers_of_their_own_do():
    """The same operations, and the same answer as a model whose layers hold copies."""
    parts = shapes(TINY_TOWER, LlamaConfig(**VICUNA | TINY_TEXT | {"num_hidden_layers": 3}))
    shared, _ = make_models(parts, one_layer=True)
    whole, _ = make_models(parts)
    assert len({id(p) for p in shared.parameters()}) < len({id(p) for p in whole.parameters()})
    whole.load_state_dict(shared.state_dict())
    prompt = make_prompt(whole, images=1, visual_tokens=16)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    one, other = (model.generate(**prompt, **options, return_dict_in_generate=True) for model in (shared, whole))
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits))


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_training_step_trains_what_its_stage_says(tiny_parts, stage):
    models = make_training_models(tiny_parts, visual_tokens=4)
    steps = make_steps(models, replace(RECIPES[stage](), bf16=False), records=2)
    assert list(steps) == ["mlp, 16", "resampler, 4", "ms_resampler, 4"]
    for kind, step in zip(PROJECTORS, steps.values(), strict=True):
        before = {name: weight.detach().clone() for name, weight in models[kind].named_parameters()}
        step()
        changed = {
            name.split(".")[1] for name, weight in models[kind].named_parameters() if (weight != before[name]).any()
        }
        assert changed == {"projector"} | ({"language_model"} if stage == "instruct" else set())
    measured = measure_training(models, stage, records=2, repeats=2)
    assert len(training_table(measured, 2).splitlines()) == 2 + 2 * len(PROJECTORS)
    plain, checkpointed = (measured[on]["mlp, 16"]["peak_bytes"] for on in (False, True))
    assert checkpointed < plain


def test_processors_are_measured_on_the_same_pictures(tmp_path):
    times = measure_preprocessing("JPEG", (64, 48), 2, 3, tmp_path)
    assert {name: len(spent) for name, spent in times.items()} == {"LLaVA": 3, "ours": 3}


def test_loading_is_told_relative_to_llava():
    run = {"import_s": 0.5, "load_s": 2.0, "read_s": 3.0, "peak_bytes": 10e6}
    lines = loading_table({"LLaVA": [run], "ours": [run | {"load_s": 1.0, "peak_bytes": 5e6}]}).splitlines()
    assert lines[-1] == "| ours | 0.50 | 1.00 | 1.00 to 1.00 | 0.50 | 3.00 | 5 | 0.50 |"


def test_tiles_are_measured_with_and_without_a_limit_of_views():
    sizes = {"image_size": 28, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = make_tiled_model(TOWER | sizes | {"intermediate_size": 8192})
    found = measure_tiles(model, [(1, 1), (3, 3)], tokens=16, repeats=1)
    assert [tiling.views for tiling, *_ in found.values()] == [1, 10]
    assert all(len(times) == 1 for _, spent, *_ in found.values() for times in spent.values())
    (*_, limited, unlimited) = found[3, 3]
    assert limited < unlimited
    # tiles, views, patches and tokens of the overview
    first, second = tiles_table(found).splitlines()[2:]
    assert first.startswith("| 1 x 1 | 1 | 196 | 0 |")
    assert second.startswith("| 3 x 3 | 10 | 1,764 | 4 |")


@pytest.mark.slow
def test_reducers_are_measured_at_the_budgets_that_they_have(monkeypatch, capsys):
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = narrow | {"vocab_size": 1024, "num_hidden_layers": 17, "num_key_value_heads": 2}
    monkeypatch.setattr("research.benchmarks.reducers.TOWER", TOWER | narrow | {"num_hidden_layers": 3})
    monkeypatch.setattr("research.benchmarks.reducers.LANGUAGE_MODELS", {"0.5b": (Qwen2Config, text)})
    monkeypatch.setattr("sys.argv", ["", "--budgets", "64", "36", "--repeats", "1", "--new-tokens", "1"])
    measure_reducers()
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines[1:]}
    budgets = [(name, budget) for name in REDUCERS for budget in (64, 36)]
    budgets.remove(("mustdrop", 36))
    assert list(rows) == ["all 576", *(f"{name}, {budget}" for name, budget in budgets)]
    # Keys and values of 17 layers, 16 wide, of 64 words and the visual tokens, in float32.
    assert [rows[name][-1] for name in ("all 576", "fastervlm, 64")] == ["1.4", "0.3"]
    assert all(float(cells[-1]) < 1.4 for name, cells in rows.items() if name != "all 576")
