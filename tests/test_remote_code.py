"""The keystone: a saved folder loads through the Auto classes where this package does not exist."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import asked, picture, save_tiny, tiny_model, tiny_processor
from torch import Tensor
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import ms_resampler
from ms_resampler.configuration_ms_resampler import AUTO_MAP
from ms_resampler.folders import remote_code_files
from ms_resampler.hub_upload.staging import stage_checkpoint
from ms_resampler.projectors_ms_resampler import PROJECTORS

CODE = remote_code_files()
ALLOWED = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"} | set(sys.stdlib_module_names)
# Who may import whom: modeling and processing do not know each other.
SIBLINGS = {
    "towers_ms_resampler": set(),
    "reducers_ms_resampler": set(),
    "reducing_ms_resampler": {"reducers_ms_resampler", "towers_ms_resampler"},
    "configuration_ms_resampler": {"reducers_ms_resampler", "towers_ms_resampler"},
    "tiles_ms_resampler": {"configuration_ms_resampler"},
    "videos_ms_resampler": {"configuration_ms_resampler", "images_ms_resampler", "tiles_ms_resampler"},
    "messages_ms_resampler": set(),
    "fusion_ms_resampler": set(),
    "loading_ms_resampler": {"projectors_ms_resampler"},
    "packing_ms_resampler": set(),
    "images_ms_resampler": set(),
    "places_ms_resampler": set(),
    "resampler_ms_resampler": {"places_ms_resampler"},
    "clips_ms_resampler": {"places_ms_resampler", "resampler_ms_resampler"},
    "branches_ms_resampler": {"places_ms_resampler", "resampler_ms_resampler"},
    "projectors_ms_resampler": {
        "branches_ms_resampler",
        "clips_ms_resampler",
        "configuration_ms_resampler",
        "places_ms_resampler",
        "resampler_ms_resampler",
    },
    "modeling_ms_resampler": {
        "clips_ms_resampler",
        "configuration_ms_resampler",
        "fusion_ms_resampler",
        "loading_ms_resampler",
        "packing_ms_resampler",
        "projectors_ms_resampler",
        "reducers_ms_resampler",
        "reducing_ms_resampler",
        "resampler_ms_resampler",
        "tiles_ms_resampler",
        "towers_ms_resampler",
    },
    "processing_ms_resampler": {
        "configuration_ms_resampler",
        "messages_ms_resampler",
        "images_ms_resampler",
        "tiles_ms_resampler",
        "videos_ms_resampler",
    },
}
QUESTION = "What is this?"

# What a stranger runs first: the package cannot be imported, even where it is installed.
STRANGER = """
import importlib.abc, sys
class Nowhere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ms_resampler":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nowhere())
try:
    import ms_resampler
except ModuleNotFoundError:
    folder, *arguments = sys.argv[1:]
else:
    raise SystemExit("the package can be imported")
"""
LOAD = (
    STRANGER
    + """
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer)
def load(auto):
    return auto.from_pretrained(folder, trust_remote_code=True)
image, question, out, *tuned = arguments
config, processor, model = load(AutoConfig), load(AutoProcessor), load(AutoModelForImageTextToText)
for ours in (config, processor, model):
    assert type(ours).__module__.startswith("transformers_modules."), type(ours)
content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
text = processor.tokenizer.decode(inputs["input_ids"][0])
assert load(AutoTokenizer).decode(inputs["input_ids"][0]) == text
picture = Image.open(image)
assert torch.equal(load(AutoImageProcessor)(picture, return_tensors="pt")["pixel_values"], inputs["pixel_values"])
def tensors(kind, model):
    named = [*model.named_buffers(), *model.named_parameters()]
    return {f"{kind}:{name}": tensor.detach().clone() for name, tensor in named}
def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs).logits
result = {"logits": logits(model), **tensors("loaded", model), **{f"input:{name}": inputs[name] for name in inputs}}
result["generated"] = model.generate(**inputs, max_new_tokens=5, do_sample=False)
for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
    assert torch.equal(logits(load(auto)), result["logits"]), auto
base = load(AutoModel)
assert type(base).__name__ == "MSResamplerModel"
for name, tensor in base.state_dict().items():
    assert torch.equal(tensor, model.model.state_dict()[name]), name
if tuned:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    result.update(tensors("trained", model), logits_trained=logits(model))
    model.save_pretrained(tuned[0])
    processor.save_pretrained(tuned[0])
assert not [name for name in sys.modules if name.split(".")[0] == "ms_resampler"]
save_file({name: tensor.contiguous() for name, tensor in result.items()}, out)
"""
)
CLIP = (
    STRANGER
    + """
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
pictures, out = arguments
auto = AutoModelForImageTextToText, AutoProcessor
model, processor = (each.from_pretrained(folder, trust_remote_code=True) for each in auto)
frames = [Image.open(f"{pictures}/{number}.png") for number in range(4)]
inputs = processor(videos=[frames], text="<video>?", return_tensors="pt")
assert inputs["clips"].tolist() == [[4, 2]]
with torch.no_grad():
    save_file({"logits": model.eval()(**inputs).logits}, out)
"""
)
REFUSED = (
    STRANGER
    + """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
    try:
        auto.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise SystemExit(f"{auto} ran code without consent")
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
"""
)


def run_as_stranger(code: str, *arguments: Path | str, home: Path) -> None:
    """Runs code in an isolated interpreter, in an empty folder, offline, with nothing cached and nobody to ask."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT") if name in os.environ}
    environment = keep | {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    home.mkdir()
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, check=False, cwd=home, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    picture(3).save(file)
    return file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and processor, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("saved")
    save_tiny(folder)
    return folder


def code_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*.py")}


def assert_same(theirs: dict[str, Tensor], kind: str, model) -> None:
    """Every buffer and parameter, by name, to the last bit."""
    ours = {f"{kind}:{name}": tensor for name, tensor in [*model.named_buffers(), *model.named_parameters()]}
    assert {name for name in theirs if name.startswith(f"{kind}:")} == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


def assert_computes_the_same(theirs: dict[str, Tensor], model, inputs) -> None:
    assert {name for name in theirs if name.startswith("input:")} == {f"input:{name}" for name in inputs}
    for name in inputs:
        assert torch.equal(theirs[f"input:{name}"], inputs[name]), name
    with torch.no_grad():
        torch.testing.assert_close(theirs["logits"], model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs["generated"], model.generate(**inputs, max_new_tokens=5, do_sample=False))


def test_a_saved_folder_holds_exactly_the_remote_code(saved):
    assert {file.stem for file in CODE} == set(SIBLINGS)
    assert code_in(saved) == {file.name: file.read_bytes() for file in CODE}
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")  # no "--": it would name another repository
        tree = ast.parse((saved / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_model_and_processor_each_bring_their_code(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "processor")
    everything = {file.stem for file in CODE}
    of_processor = {f"{name}_ms_resampler" for name in ("images", "messages", "processing", "videos")}
    assert set(code_in(tmp_path / "model")) == {f"{stem}.py" for stem in everything - of_processor}
    alone = of_processor | {f"{name}_ms_resampler" for name in ("configuration", "reducers", "tiles", "towers")}
    assert set(code_in(tmp_path / "processor")) == {f"{stem}.py" for stem in alone}


@pytest.mark.slow
def test_a_stranger_loads_computes_trains_and_saves_the_same(saved, image_file, tmp_path):
    tuned, arguments = tmp_path / "tuned", (image_file, QUESTION)
    run_as_stranger(LOAD, saved, *arguments, tmp_path / "first", tuned, home=tmp_path / "one")
    run_as_stranger(LOAD, tuned, *arguments, tmp_path / "second", home=tmp_path / "two")
    first, second = load_file(tmp_path / "first"), load_file(tmp_path / "second")

    model, inputs = tiny_model(), asked(tiny_processor(), QUESTION, str(image_file))
    assert_same(first, "loaded", model)
    assert_computes_the_same(first, model, inputs)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(first["logits_trained"], model(**inputs).logits, rtol=1e-3, atol=1e-4)
    assert (first["logits_trained"] - first["logits"]).abs().max() > 1e-3

    names = {name.removeprefix("trained:") for name in first if name.startswith("trained:")}
    assert names == {name.removeprefix("loaded:") for name in second if name.startswith("loaded:")}
    for name in names:
        assert torch.equal(first[f"trained:{name}"], second[f"loaded:{name}"]), name
    torch.testing.assert_close(second["logits"], first["logits_trained"], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(first[f"input:{name}"], second[f"input:{name}"]) for name in inputs)

    assert code_in(tuned) == code_in(saved)
    assert json.loads((tuned / "config.json").read_text())["auto_map"] == AUTO_MAP
    for file in ("processor_config.json", "chat_template.jinja"):
        assert (tuned / file).read_text() == (saved / file).read_text(), file


@pytest.mark.slow
def test_a_stranger_asks_about_a_clip(tmp_path):
    model, frames = tiny_model(projector={"video_form": "scopes"}), [picture(seed) for seed in range(4)]
    processor = tiny_processor(video_form="scopes", visual_tokens=8)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    run_as_stranger(CLIP, tmp_path / "saved", tmp_path, tmp_path / "out", home=tmp_path / "home")
    with torch.no_grad():
        logits = model(**processor(videos=[frames], text="<video>?", return_tensors="pt")).logits
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_embedded_checkpoint_loads_for_a_stranger(image_file, tmp_path):
    stage_checkpoint(Path(ms_resampler.TINY), tmp_path / "tiny")
    run_as_stranger(LOAD, tmp_path / "tiny", image_file, QUESTION, tmp_path / "out", home=tmp_path / "home")
    theirs = load_file(tmp_path / "out")
    model = ms_resampler.MSResamplerForConditionalGeneration.from_pretrained(ms_resampler.TINY)
    processor = ms_resampler.MSResamplerProcessor.from_pretrained(ms_resampler.TINY)
    assert_same(theirs, "loaded", model)
    assert_computes_the_same(theirs, model, asked(processor, QUESTION, str(image_file)))


@pytest.mark.slow
def test_nothing_runs_without_consent(saved, tmp_path):
    run_as_stranger(REFUSED, saved, home=tmp_path / "home")


@pytest.mark.parametrize("file", CODE, ids=lambda file: file.name)
def test_remote_code_imports_only_what_every_reader_has(file):
    siblings = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        if isinstance(node, ast.ImportFrom):
            assert node.module, "`from . import x` does not survive saving"
            if node.level:
                assert node.level == 1
                siblings.add(node.module)
                continue
            root = node.module.split(".")[0]
            assert root in ALLOWED
            assert node.module != "__future__", "it would switch off the validation of configurations"
            assert root != "huggingface_hub" or node.module == "huggingface_hub.dataclasses"
            assert not [a.name for a in node.names if root in ALLOWED - sys.stdlib_module_names and a.name[0] == "_"]
    assert siblings <= SIBLINGS[file.stem]


@pytest.mark.parametrize("file", CODE, ids=lambda file: file.name)
def test_the_import_scan_of_transformers_finds_the_same(file):
    """It reads lines, not syntax: an import in a docstring counts, and must not be there."""
    assert set(get_relative_imports(file)) == SIBLINGS[file.stem]
    assert set(get_imports(file)) <= ALLOWED
    assert not re.search(r"^\s*(from|import)\s+ms_resampler\b", file.read_text(), re.MULTILINE)


PEERS = (
    STRANGER
    + """
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
inputs, out = arguments
inputs, logits = load_file(inputs), {}
for peer in sorted(Path(folder).iterdir()):
    model = AutoModelForImageTextToText.from_pretrained(peer, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        logits[peer.name] = model(**inputs).logits
save_file(logits, out)
"""
)


@pytest.mark.slow
@pytest.mark.timeout(900)  # seventeen models are loaded
def test_a_stranger_loads_every_peer(image_file, tmp_path):
    """At 36 tokens, which they all can give."""
    inputs = asked(tiny_processor(visual_tokens=[6, 6]), QUESTION, str(image_file))
    save_file({name: inputs[name].contiguous() for name in inputs}, tmp_path / "inputs")
    models = {}
    for kind in PROJECTORS:
        projector = {"projector_type": kind, "query_grid": [6, 6], "visual_tokens": [6, 6]}
        models[kind] = tiny_model(projector=projector)
        models[kind].save_pretrained(tmp_path / "peers" / kind)
    run_as_stranger(PEERS, tmp_path / "peers", tmp_path / "inputs", tmp_path / "logits", home=tmp_path / "home")
    theirs = load_file(tmp_path / "logits")
    assert theirs.keys() == PROJECTORS.keys()
    for kind, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(theirs[kind], model(**inputs).logits, rtol=1e-4, atol=1e-5, msg=kind)


REDUCED = (
    STRANGER
    + """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
features = model.get_image_features(torch.rand(1, 3, 24, 24))
assert [len(tokens) for tokens in features.pooler_output] == [len(kept) for kept in features.kept_tokens] == [2]
assert list(model.fitting_reducers([2])) == ["divprune", "fitprune"]
model.set_reducer("fitprune", deleted=(3, 0))
prompt = torch.tensor([[5, *[model.config.image_token_id] * 4, 6]])
assert model(input_ids=prompt, pixel_values=torch.rand(1, 3, 24, 24)).last_hidden_state.shape[1] == 3
"""
)


@pytest.mark.slow
def test_a_reducer_drops_tokens_for_a_stranger(tmp_path):
    """Though transformers loads the configuration's modules, the reducers' among them, a second time."""
    tiny_model().set_reducer("divprune", keep=2).save_pretrained(tmp_path / "reduced")
    run_as_stranger(REDUCED, tmp_path / "reduced", home=tmp_path / "home")


TWO_FOLDERS = (
    STRANGER
    + """
from pathlib import Path
from transformers import AutoModel, AutoModelForImageTextToText
for owner in arguments:
    for auto in (AutoModelForImageTextToText, AutoModel):
        model = auto.from_pretrained(Path(folder) / owner / "model", trust_remote_code=True)
        assert type(model).owner == type(model).projectors_of() == owner, (auto, owner, type(model).owner)
"""
)


@pytest.mark.slow
def test_two_folders_of_one_name_each_get_their_own_code(tmp_path):
    for owner in ("one", "other"):
        folder = tmp_path / owner / "model"
        tiny_model().save_pretrained(folder)
        with (folder / "projectors_ms_resampler.py").open("a") as code:
            code.write(f"\n\ndef owner():\n    return {owner!r}\n")
        with (folder / "modeling_ms_resampler.py").open("a") as code:
            code.write("\nfrom .projectors_ms_resampler import owner\n")
            code.write("MSResamplerPreTrainedModel.projectors_of = staticmethod(owner)\n")
            code.write(f"MSResamplerPreTrainedModel.owner = {owner!r}\n")
    run_as_stranger(TWO_FOLDERS, tmp_path, "one", "other", "one", home=tmp_path / "home")
