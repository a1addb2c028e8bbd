"""Liger's fused loss: what it is given, held against the plain loss. The kernel itself needs CUDA."""

import pytest
import torch
from tiny_models import IMAGE, collate, pixels, tiny_model, words
from torch.nn import functional as F

from ms_resampler.training.data import IGNORED
from ms_resampler.training.liger import fuse_loss


def plain_torch(weight, hidden, targets, cap):
    """What the kernel computes: the sum of the losses of `targets` (n,) from hidden states (n, T)."""
    logits = (hidden @ weight.T).float()
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def batch():
    rows = collate([[IMAGE] * 4 + words(9)[0], [IMAGE] * 4 + words(5, seed=1)[0]], side="right")
    labels = rows["input_ids"].masked_fill((rows["attention_mask"] == 0) | (rows["input_ids"] == IMAGE), IGNORED)
    return rows | {"labels": labels, "pixel_values": pixels(2)}


def loss_and_gradients(model, **options):
    loss = model(**batch(), **options).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text", ["qwen2", "llama", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(40)}])
def test_the_fused_loss_is_the_loss(text, options):
    fused = tiny_model(text=text)
    fuse_loss(fused, plain_torch)
    ours, our_gradients = loss_and_gradients(fused, **options)
    theirs, gradients = loss_and_gradients(tiny_model(text=text), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_gradients.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(our_gradients[name], gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_what_it_cannot_do_it_says():
    with pytest.raises(ValueError, match="does not scale logits as granite does"):
        fuse_loss(tiny_model(text="granite"), plain_torch)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            fuse_loss(tiny_model())
