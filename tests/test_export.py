"""torch.export and ONNX: graphs that take batches of any size say what the model says."""

import pytest
import tiny_models as tiny
import torch
from torch import nn
from torch.testing import assert_close

from ms_resampler.projectors_ms_resampler import PROJECTORS, SCOPED_PROJECTORS

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

KINDS = [*SCOPED_PROJECTORS, *PROJECTORS]
BATCH = torch.export.Dim("batch", min=1, max=64)
LENGTH = torch.export.Dim("length", min=8, max=128)


class Projector(nn.Module):
    """The projector alone, from 6 x 6 patches."""

    def __init__(self, model):
        super().__init__()
        self.projector, self.grid = model.projector, model.config.token_grid((24, 24))

    def forward(self, patches):
        tokens = self.projector(patches, (6, 6), self.grid)
        return tokens[0] if isinstance(tokens, tuple) else tokens


class Images(nn.Module):
    """Tower and projector."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        tokens = self.model.get_image_features(pixel_values).pooler_output
        return tokens if isinstance(tokens, torch.Tensor) else torch.stack(tokens)


class Prefill(nn.Module):
    """The whole model, for a prompt."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return self.model(**inputs, use_cache=False).logits


@torch.no_grad()
def assert_exported_alike(module, example, other, dynamic, folder):
    """Exports with `example`, and holds the graph in torch and in ONNX Runtime against the module for `other`."""
    expected = module.eval()(*other)
    graph = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
    assert_close(graph.module()(*other), expected)
    torch.onnx.export(graph, dynamo=True, verbose=False).save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (result,) = session.run(None, {name: value.numpy() for name, value in zip(names, other, strict=True)})
    assert_close(torch.from_numpy(result), expected, atol=1e-4, rtol=1e-4)


# What torch's exporter itself uses and has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def model_of(kind, tower="clip_vision_model"):
    tokens = [6, 6] if kind == "mlp" else [3, 3]
    return tiny.tiny_base_model(
        tower, projector={"projector_type": kind, "visual_tokens": tokens, "query_grid": tokens}
    )


@pytest.mark.parametrize("kind", ["ms_resampler", "ms_resampler_branches"])
def test_a_projector_alone_is_exported(kind, tmp_path):
    patches = torch.randn(5, 36, 16)
    assert_exported_alike(Projector(model_of(kind)), (patches[:3],), (patches,), ({0: BATCH},), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_projector_is_exported_with_its_tower(kind, tmp_path):
    images = tiny.pixels(5)
    assert_exported_alike(Images(model_of(kind)), (images[:3],), (images,), ({0: BATCH},), tmp_path)


@pytest.mark.slow
def test_tokens_that_are_words_are_exported(tmp_path):
    model, images = tiny.tiny_base_model(visual_words=[7, 200, 31]), tiny.pixels(5)
    assert_exported_alike(Images(model), (images[:3],), (images,), ({0: BATCH},), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip2_vision_model", "dinov3_vit", "convnextv2"])
def test_every_kind_of_tower_is_exported(tower, tmp_path):
    model, images = tiny.tiny_base_model(tower), tiny.pixels(5)
    assert_exported_alike(Images(model), (images[:3],), (images,), ({0: BATCH},), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["gemma2", "phi"])
def test_the_prefill_is_exported(text, tmp_path):
    def prompts(count, words):
        row = [7, *[tiny.IMAGE] * 4, *tiny.words(words)[0]]
        return torch.tensor([row] * count), torch.ones(count, len(row), dtype=torch.long), tiny.pixels(count)

    dynamic = ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH}, {0: BATCH})
    assert_exported_alike(Prefill(tiny.tiny_model(text=text)), prompts(2, 7), prompts(3, 11), dynamic, tmp_path)
