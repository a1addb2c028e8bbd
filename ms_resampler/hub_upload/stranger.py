"""A separate program: loads a checkpoint as a user without this package would.

    python stranger.py FOLDER_OR_REPOSITORY REVISION RESULT

It answers a question about a picture it draws, offline, and writes its logits and its answer to RESULT.
"""

import importlib.abc
import sys


class Nowhere(importlib.abc.MetaPathFinder):
    """Hides the package, even where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ms_resampler":
            raise ModuleNotFoundError(f"No module named {name!r}")


def no_network(event, details):
    """Refuses every connection."""
    if event == "socket.connect":
        raise OSError("the checkpoint needs the network")


def answer(model, processor):
    """The logits of a question and the ids of its answer, as the published code computes them."""
    import torch
    from PIL import Image

    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    if not torch.isfinite(logits).all():
        raise SystemExit("the logits are not finite")
    return {"logits": logits.contiguous(), "answer": ids.contiguous()}


def projector_in_place(config, weights, revision):
    """The weights of a projector, checked against a model without weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True, code_revision=revision)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    wrong = [*unexpected, *(name for name in missing if name.startswith(("model.projector.", "model.fusion.")))]
    if wrong:
        raise SystemExit(f"projector.safetensors does not fit config.json: {', '.join(wrong)}")
    return weights


def ask(checkpoint, revision):
    """Loads a whole model and queries it, or loads a projector alone and checks that it fits."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import cached_file

    where = {"revision": revision or "main"}
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True, **where)
    projector = cached_file(checkpoint, "projector.safetensors", _raise_exceptions_for_missing_entries=False, **where)
    if projector:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True, **where)
        return projector_in_place(config, load_file(projector), where["revision"])
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, **where)
    if not type(model).__module__.startswith("transformers_modules."):
        raise SystemExit("the model is not made by the published code")
    return answer(model, processor)


if __name__ == "__main__":
    sys.meta_path.insert(0, Nowhere())
    sys.addaudithook(no_network)
    from safetensors.torch import save_file

    checkpoint, revision, result = sys.argv[1:]
    save_file(ask(checkpoint, revision), result)
