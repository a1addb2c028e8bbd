"""Liger's fused loss: what it is given, held against the plain loss, and the kernel itself in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec

import interpreted_liger
import pytest
import torch
from interpreted_liger import CASES, batch, loss_and_gradients, recipe
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_runs import losses_of, make_start, options_in
from torch.nn import functional as F

from ms_resampler.training.collate import IGNORED
from ms_resampler.training.liger import fuse_loss
from ms_resampler.training.run import train


def plain_torch(weight, hidden, targets, cap):
    """What the kernel computes: the sum of the losses of `targets` (n,) from hidden states (n, T)."""
    logits = (hidden @ weight.T).float()
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def loss_and_its_gradients(model, **options):
    loss = model(**batch(), **options).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text", ["qwen2", "llama", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(40)}])
def test_the_fused_loss_is_the_loss(text, options):
    fused = tiny_model(text=text)
    fuse_loss(fused, plain_torch)
    ours, our_gradients = loss_and_its_gradients(fused, **options)
    theirs, gradients = loss_and_its_gradients(tiny_model(text=text), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_gradients.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(our_gradients[name], gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_what_it_cannot_do_it_says(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="takes no head with a bias, as phi has one"):
        fuse_loss(tiny_model(text="phi"), plain_torch)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a GPU, and there is none here: leave --liger out, or set TRITON"):
            fuse_loss(tiny_model())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """A data set, and what the kernel made of the cases and of a run."""
    start, out = make_start(tmp_path_factory.mktemp("start"), records=4), tmp_path_factory.mktemp("liger")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, interpreted_liger.__file__, str(start), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return start, out


needs_the_kernel = pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")), reason="Liger's kernel and Triton are not installed"
)


@pytest.mark.slow
@needs_the_kernel
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_loss_and_gradients_are_the_plain_ones(case, interpreted):
    ours, theirs = load_file(interpreted[1] / f"{case}.safetensors"), loss_and_gradients(case, fused=False)
    assert ours.keys() == theirs.keys()
    tolerance = {"rtol": 2e-2, "atol": 4e-3} if case == "bf16" else {"rtol": 1e-4, "atol": 1e-6}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@needs_the_kernel
def test_a_run_with_the_kernel_learns_what_one_without_learns(interpreted, tmp_path):
    start, out = interpreted
    train(recipe(), **options_in(start, tmp_path, device_batch=2))
    torch.testing.assert_close(losses_of(out / "run"), losses_of(tmp_path), rtol=1e-5, atol=0)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out / "run", tmp_path))
    assert ours.keys() == theirs.keys()
    # The gradient of this bias is zero but for rounding, of which Adam makes whole steps.
    for name in theirs.keys() - {"model.projector.layers.0.k_proj.bias"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
