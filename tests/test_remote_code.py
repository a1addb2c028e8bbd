"""The keystone: a saved folder loads through the Auto classes where this package does not exist."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import picture, tiny_model, tiny_processor

import ms_resampler
from ms_resampler.hub_upload.staging import remote_code_files, stage_checkpoint

ALLOWED = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"} | set(sys.stdlib_module_names)

# Runs in a fresh interpreter that refuses to import the package, even where it is installed.
STRANGER = """
import importlib.abc, json, sys
class Nowhere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ms_resampler":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nowhere())
try:
    import ms_resampler
    raise SystemExit("the package can be imported")
except ModuleNotFoundError:
    pass
"""
LOAD = (
    STRANGER
    + """
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoModelForMultimodalLM, AutoProcessor)
folder, image, out = sys.argv[1:4]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    result = {"logits": model(**inputs).logits}
    result["generated"] = model.generate(**inputs, max_new_tokens=5, do_sample=False)
for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
    with torch.no_grad():
        assert torch.equal(auto.from_pretrained(folder, **trust).eval()(**inputs).logits, result["logits"])
base = AutoModel.from_pretrained(folder, **trust)
assert type(base).__name__ == "MSResamplerModel" and config.model_type == "ms_resampler"
result |= {"buffer:" + name: tensor.clone() for name, tensor in model.named_buffers()}
result |= {"parameter:" + name: tensor.detach().clone() for name, tensor in model.named_parameters()}
if len(sys.argv) > 4:  # one training step, then saved
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(sys.argv[4])
    processor.save_pretrained(sys.argv[4])
    with torch.no_grad():
        result["logits_after"] = model(**inputs).logits
save_file({name: tensor.contiguous() for name, tensor in result.items()}, out)
"""
)


def run_as_stranger(code: str, *arguments: Path, home: Path) -> subprocess.CompletedProcess:
    """Runs code in an interpreter of its own, in an empty folder, offline, with an empty cache."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
    environment = keep | {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def image_file(tmp_path):
    picture(3).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def saved(tmp_path):
    """A model and processor, as `save_pretrained` leaves them."""
    tiny_model().save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def code_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.py")}


def test_a_saved_folder_holds_exactly_the_remote_code(saved):
    assert code_in(saved) == {file.name: file.read_bytes() for file in remote_code_files()}
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert {reference.split(".")[0] + ".py" for reference in auto_map.values()} <= set(code_in(saved))


@pytest.mark.slow
def test_a_stranger_loads_computes_trains_and_saves_the_same(saved, image_file, tmp_path):
    first = run_as_stranger(LOAD, saved, image_file, tmp_path / "a.st", tmp_path / "tuned", home=tmp_path / "one")
    assert first.returncode == 0, first.stderr
    theirs = load_file(tmp_path / "a.st")

    model, processor = tiny_model(), tiny_processor()
    content = [{"type": "image", "image": picture(3)}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(theirs["logits"], model(**inputs).logits, rtol=1e-5, atol=1e-5)
    ours = {f"buffer:{name}": tensor for name, tensor in model.named_buffers()}
    ours |= {f"parameter:{name}": tensor for name, tensor in model.named_parameters()}
    assert {name for name in theirs if ":" in name} == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name

    assert code_in(tmp_path / "tuned") == code_in(saved)
    second = run_as_stranger(LOAD, tmp_path / "tuned", image_file, tmp_path / "b.st", home=tmp_path / "two")
    assert second.returncode == 0, second.stderr
    again = load_file(tmp_path / "b.st")
    torch.testing.assert_close(again["logits"], theirs["logits_after"], rtol=1e-5, atol=1e-5)
    assert (again["logits"] - theirs["logits"]).abs().max() > 1e-3  # the step did something


@pytest.mark.slow
def test_the_embedded_checkpoint_loads_for_a_stranger(image_file, tmp_path):
    stage_checkpoint(Path(ms_resampler.TINY), tmp_path / "tiny")
    done = run_as_stranger(LOAD, tmp_path / "tiny", image_file, tmp_path / "out.st", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "out.st")
    ours = ms_resampler.MSResamplerForConditionalGeneration.from_pretrained(ms_resampler.TINY)
    for name, tensor in ours.named_buffers():
        assert torch.equal(theirs[f"buffer:{name}"], tensor), name
    for name, tensor in ours.named_parameters():
        assert torch.equal(theirs[f"parameter:{name}"], tensor), name


@pytest.mark.slow
def test_loading_without_consent_fails_with_a_sentence(saved, tmp_path):
    code = STRANGER + "from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
    done = run_as_stranger(code, saved, home=tmp_path / "home")
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


@pytest.mark.parametrize("file", remote_code_files(), ids=lambda file: file.name)
def test_remote_code_imports_only_what_every_reader_has(file):
    siblings = {other.stem for other in remote_code_files()}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        if isinstance(node, ast.ImportFrom):
            assert node.module, "`from . import x` does not survive saving"
            if node.level:
                assert node.level == 1
                assert node.module in siblings
            else:
                assert node.module.split(".")[0] in ALLOWED
                assert node.module != "__future__", "it would switch off the validation of configurations"
