"""What earlier versions saved: it loads, in the package and as remote code, and says the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import asked, pixels, tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from ms_resampler import TINY, MSResamplerForConditionalGeneration
from ms_resampler.projectors_ms_resampler import EARLIER_NAMES, PROJECTORS, name_of_today

RECORDED = Path(__file__).parent / "recorded" / "embedded_answers.safetensors"
EXAMPLES = Path(__file__).parent.parent / "space_app" / "examples"
# The fields of version 0.1 beside today's, as it saved them; and the names of its weights that are others today.
DEFAULTS = {"scope_prior": "gaussian", "learn_scopes": True, "share_kv": True, "prior_form": "channels"}
DEFAULTS |= {"tile_heads": True, "patch_conv": True, "cell_residual": True, "fusion": "token", "scope_layout": "heads"}
KINDS = {
    "ms_resampler": {"query_init": "none"},
    "ms_resampler_branches": {"projector_type": "ms_resampler", "scope_layout": "branches", "query_init": "learned"},
    "resampler": {"query_init": "learned", "scope_heads": [4]},
    **{kind: {"query_init": "learned"} for kind in ("c_abstractor", "mqt", "qwen_resampler", "perceiver", "q_former")},
}
NAMES = {
    "c_abstractor": {"position": "position_NC"},
    "mqt": {"query": "query_QC", "position": "position_QC", "output": "output_CT"},
    "qwen_resampler": {"query": "query_MD", "position": "position_MD", "output": "output_DT"},
    "perceiver": {"latents": "latents_MC"},
    "q_former": {"query": "query_1MD"},
}
SCOPES = {
    "query": "query_1DHW",
    "layers.0.scope_embedding": "layers.0.scope_embedding_GD",
    "layers.0.scope_logits": "layers.0.gate_S",
    **{f"layers.0.prior.{name}": f"layers.0.prior.{name}_Gh" for name in ("sigma", "log_scale")},
    "layers.0.prior.offset": "layers.0.prior.offset_Gh2",
}


def save_as_earlier(folder: Path, kind: str, form: dict | None = None, shards: str = "5GB"):
    """A small model with a projector, in a folder as version 0.1 wrote it; and the model."""
    fields = {"projector_type": kind, "query_grid": [2, 2], "visual_tokens": [2, 2], "hidden_size": 16}
    model = tiny_model(projector=fields | {"num_attention_heads": 4} | ({"branch_form": form} if form else {}))
    model.save_pretrained(folder, max_shard_size=shards)
    names = {f"model.projector.{new}": f"model.projector.{old}" for new, old in NAMES.get(kind, SCOPES).items()}
    for file in folder.glob("*.safetensors"):
        state = {names.get(name, name): tensor for name, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        written = json.loads(index.read_text())
        written["weight_map"] = {names.get(name, name): file for name, file in written["weight_map"].items()}
        index.write_text(json.dumps(written))
    config = json.loads((folder / "config.json").read_text())
    del config["projector_config"]["branch_form"]
    config["projector_config"] |= DEFAULTS | KINDS[kind] | (form or {})
    (folder / "config.json").write_text(json.dumps(config))
    return model


FORMS = [*((kind, None) for kind in KINDS), ("ms_resampler_branches", {"fusion": "static"})]
FORMS += [
    ("ms_resampler_branches", {"fusion": "head", "patch_conv": False, "tile_heads": False, "cell_residual": False})
]


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=str)
@torch.no_grad()
def test_a_folder_of_an_earlier_version_loads_and_is_saved_as_one_of_this(kind, form, tmp_path):
    model = save_as_earlier(tmp_path / "old", kind, form, shards="20KB" if kind == "ms_resampler" else "5GB")
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | set(report["mismatched_keys"])
    assert (loaded.config.projector_config.projector_type, loaded.config.projector_config.branch_form) == (kind, form)
    expected = model.get_image_features(pixels(2)).pooler_output
    assert all(map(torch.equal, loaded.get_image_features(pixels(2)).pooler_output, expected))
    loaded.save_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == model.state_dict().keys()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    assert all(map(torch.equal, again.get_image_features(pixels(2)).pooler_output, expected))


@torch.no_grad()
def test_load_state_dict_reads_the_names_of_earlier_versions(tmp_path):
    model = save_as_earlier(tmp_path, "ms_resampler_branches")
    state = load_file(tmp_path / "model.safetensors")
    empty = MSResamplerForConditionalGeneration(model.config)
    assert not empty.load_state_dict(state).missing_keys
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in empty.state_dict().items())


@pytest.mark.slow
def test_remote_code_reads_earlier_versions_too(tmp_path):
    model = save_as_earlier(tmp_path / "old", "ms_resampler_branches")
    save_file({"pixels": pixels(1)}, tmp_path / "pixels.safetensors")
    code = f"""
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "old")!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
with torch.no_grad():
    features = model.get_image_features(load_file({str(tmp_path / "pixels.safetensors")!r})["pixels"])
save_file({{"tokens": features.pooler_output[0].contiguous()}}, {str(tmp_path / "tokens.safetensors")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = model.get_image_features(pixels(1)).pooler_output[0]
    torch.testing.assert_close(load_file(tmp_path / "tokens.safetensors")["tokens"], expected)


def test_no_weight_of_today_has_a_name_of_an_earlier_version():
    for kind in ("ms_resampler", "ms_resampler_branches", "resampler", *PROJECTORS):
        budget = [6, 6] if kind == "mlp" else [2, 2]
        fields = {"projector_type": kind, "visual_tokens": budget, "query_grid": budget, "num_attention_heads": 4}
        for name in tiny_model(projector=fields | {"hidden_size": 16}).state_dict():
            assert name_of_today(name) == name
            assert name.rpartition(".")[2] not in EARLIER_NAMES


@pytest.fixture(scope="module")
def embedded_in(tmp_path_factory):
    """The folder of the embedded checkpoint with a projector: its own, or the one beside it."""

    def folder(name: str) -> str:
        if name == "tiny":
            return TINY
        target = tmp_path_factory.mktemp(name)
        shutil.copytree(TINY, target, dirs_exist_ok=True)
        peer = Path(TINY).with_name(name)
        shutil.copy(peer / "config.json", target)
        kept = {n: t for n, t in load_file(target / "model.safetensors").items() if ".projector." not in n}
        save_file(kept | load_file(peer / "projector.safetensors"), target / "model.safetensors", {"format": "pt"})
        return str(target)

    return folder


@pytest.mark.parametrize("name", ["tiny", "tiny_resampler"])
@torch.no_grad()
def test_the_embedded_checkpoints_answer_as_they_did(name, embedded_in):
    """Recorded with the version that trained them, on the examples of the Space."""
    recorded = load_file(RECORDED)
    model = AutoModelForImageTextToText.from_pretrained(embedded_in(name))
    processor = AutoProcessor.from_pretrained(TINY)
    for number, scene in enumerate(json.loads((EXAMPLES / "examples.json").read_text())["scenes"]):
        inputs = asked(processor, scene["question"], Image.open(EXAMPLES / scene["file"]))
        logits = model(**inputs, logits_to_keep=1).logits[0, 0]
        torch.testing.assert_close(logits, recorded[f"{name}.{number}.logits"], rtol=1e-5, atol=1e-5)
        answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(answer, recorded[f"{name}.{number}.answer"])
