"""On a GPU, where there is one: what the CPU computes, in every dtype, and CUDA graphs, which only a GPU has."""

import copy

import pytest
import tiny_models as tiny
import torch
from test_generation import answers, by_hand
from tiny_models import ragged_batch

from ms_resampler import MSResamplerProjectorConfig
from ms_resampler.projectors_ms_resampler import SCOPED_PROJECTORS, init_projector_weights
from ms_resampler.resampler_ms_resampler import init_resampler_weights
from ms_resampler.training.liger import fuse_loss
from research.study.data import DataSettings
from research.study.plan import Study, make_run
from research.study.run import perform

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, about torch
]
PATCHES, TOKENS = (24, 24), (12, 12)
DTYPES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def make(kind: str = "ms_resampler", **changes) -> torch.nn.Module:
    """A resampler of the width and heads that CLIP-L and a 7B model would have, for narrower features."""
    torch.manual_seed(0)
    config = MSResamplerProjectorConfig(projector_type=kind, **changes)
    resampler = SCOPED_PROJECTORS[kind](config, 128, 256)
    return resampler.apply(init_resampler_weights).apply(init_projector_weights)


def features(images: int = 2) -> torch.Tensor:
    return torch.randn(images, 24 * 24, 128, generator=torch.Generator().manual_seed(1))


def relative_error(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.cpu().double(), other.cpu().double()
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ms_resampler", "ms_resampler_branches", "resampler"])
def test_outputs_maps_and_gradients_are_those_of_the_equations_in_float64(kind, dtype):
    exact, x = make(kind).double(), features()
    ours = copy.deepcopy(exact).to("cuda", dtype)
    y, maps = exact(x.double(), PATCHES, TOKENS, True)
    got, seen = ours(x.to("cuda", dtype), PATCHES, TOKENS, True)
    assert relative_error(got, y) < DTYPES[dtype]
    assert relative_error(seen.attentions_BSMN, maps.attentions_BSMN) < DTYPES[dtype]
    assert relative_error(seen.weights_BSM, maps.weights_BSM) < DTYPES[dtype]
    y.square().sum().backward()
    got.double().square().sum().backward()  # a mean would make gradients too small for float16
    ours_gradient, gradient = (
        torch.cat([parameter.grad.flatten() for parameter in resampler.parameters()]) for resampler in (ours, exact)
    )
    assert relative_error(ours_gradient, gradient) < 2 * DTYPES[dtype]


@torch.no_grad()
def test_a_recorded_graph_needs_nothing_that_was_kept_outside():
    """Replayed with other images, after the memory around it was written over."""
    resampler, x = make().cuda().bfloat16(), features().cuda().bfloat16()
    resampler(x, PATCHES, TOKENS)  # libraries start up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = resampler(x, PATCHES, TOKENS)
    junk = [torch.full((10_000, 16), torch.nan, device="cuda") for _ in range(50)]
    x.copy_(torch.randn_like(x))
    graph.replay()
    del junk
    torch.testing.assert_close(y, resampler(x, PATCHES, TOKENS)[0])


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model().cuda()


def on_gpu(batch: dict) -> dict:
    return {name: value.cuda() for name, value in batch.items()}


def test_answers_are_those_of_the_whole_text_again_for_every_token(model):
    """With a dynamic cache, and with a static one, for which generate() compiles decoding into CUDA graphs."""
    expected = by_hand(tiny.tiny_model(), ragged_batch())
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(answers(model, on_gpu(ragged_batch()), **options).cpu(), expected)


@torch.no_grad()
def test_a_prompt_with_images_as_one_cuda_graph(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    batch = on_gpu(ragged_batch())
    batch["token_grids"] = [tuple(grid) for grid in batch["token_grids"].tolist()]
    for _ in range(3):
        batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
        expected = model(**batch).logits
        torch.testing.assert_close(compiled(**batch).logits.clone(), expected, rtol=1e-4, atol=1e-5)


def gradients_of_a_step(device: str, checkpointing: bool = False, autocast: bool = False) -> torch.Tensor:
    """The projector's, in one row, of a batch of texts and images.

    No text's first token is asked for: what predicts it is padding, of which every kernel of attention makes its own.
    """
    model = tiny.tiny_model().to(device).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = {name: value.to(device) for name, value in ragged_batch().items()}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(dim=1) < 2, -100)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = model(**batch, labels=labels).loss
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.model.projector.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_the_gradients_that_it_has_on_the_cpu(checkpointing):
    expected = gradients_of_a_step("cpu")
    assert relative_error(gradients_of_a_step("cuda", checkpointing), expected) < 1e-4


def test_a_step_under_autocast_has_nearly_the_gradients_of_float32():
    assert relative_error(gradients_of_a_step("cuda", autocast=True), gradients_of_a_step("cpu")) < 3e-2


@pytest.mark.parametrize("text", ["qwen2", "gemma2"])
def test_ligers_kernel_has_the_loss_and_gradients_of_the_plain_loss(text):
    pytest.importorskip("liger_kernel")
    batch = on_gpu(ragged_batch())
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    results = []
    for fuse in (lambda model: None, fuse_loss):
        model = tiny.tiny_model(text=text).cuda()
        fuse(model)
        loss = model(**batch).loss
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    plain, fused = results
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_study_trains_and_examines_on_a_gpu(tmp_path):
    data = DataSettings(train_scenes=20, validation_scenes=6, test_scenes=10, tower_steps=2, reader_steps=2)
    study = Study(budgets=(16,), steps=3, batch_size=4, data=data)
    torch.cuda.reset_peak_memory_stats()
    result = perform(make_run(study, "ms_resampler", [16], seed=0, learning_rate=1e-3), tmp_path)
    assert torch.cuda.max_memory_allocated() > 4 * result["parameters"]
    assert len(result["test"]["16"]["count"]) == 10
