"""Staging: exactly the allowed files and the package's own code, in a fresh folder."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from ms_resampler.conversion.weights import list_weights
from ms_resampler.folders import KNOWN, remote_code_files
from ms_resampler.hub_upload.staging import stage_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    save_tiny(folder)
    return folder


def test_only_allowed_files_and_the_code_of_the_package_are_staged(checkpoint, tmp_path):
    (checkpoint / ".env").write_text("HF_TOKEN=secret")
    (checkpoint / "training_args.bin").write_bytes(b"pickle")
    (checkpoint / "modeling_ms_resampler.py").write_text("raise SystemExit('old code')")
    names = {file.name for file in stage_checkpoint(checkpoint, tmp_path / "staged").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert not {".env", "training_args.bin"} & names
    for file in remote_code_files():
        assert (tmp_path / "staged" / file.name).read_bytes() == file.read_bytes()
    assert {name for name in names if name.endswith(".py")} == {file.name for file in remote_code_files()}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1MB"}, {"projector_only": True}])
def test_what_a_checkpoint_knows_travels_and_is_no_weight(options, checkpoint, tmp_path):
    tensors = {"mean": torch.ones(3)}
    save_file(tensors, checkpoint / KNOWN)
    staged = stage_checkpoint(checkpoint, tmp_path / "staged", **options)
    torch.testing.assert_close(load_file(staged / KNOWN), tensors)
    assert "mean" not in {weight.key for weight in list_weights(staged)}


def test_a_folder_in_use_and_a_folder_without_a_model_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"is not a checkpoint folder: it has no config\.json"):
        stage_checkpoint(tmp_path, tmp_path / "staged")
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        stage_checkpoint(checkpoint, checkpoint)
