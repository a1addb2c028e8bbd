"""Another projector in the embedded checkpoint: what of it learns, what is kept of it, and that it is whole again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from ms_resampler import TINY, demo
from ms_resampler.projectors_ms_resampler import name_of_today
from ms_resampler.tiny.peer import KINDS, embed_projector, with_earlier_projector, with_new_projector
from ms_resampler_cli import main as cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("peer")
    command = ["train", "tiny", "--projector", "avg_pool", "--steps", "2", "--scenes", "8", "--out", str(out)]
    assert cli.main(command) == 0
    return out / "model"


@pytest.mark.slow
def test_the_projector_alone_learns(trained):
    embedded, now = load_file(f"{TINY}/model.safetensors"), load_file(trained / "model.safetensors")
    before = with_new_projector("avg_pool", 0).state_dict()
    for name, tensor in now.items():
        if name.startswith("model.projector."):
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, embedded[name])


def test_an_earlier_projector_is_where_training_starts():
    folder = Path(TINY).with_name("tiny_resampler")
    model, stored = with_earlier_projector("resampler", folder), load_file(folder / "projector.safetensors")
    weights = {name: weight for name, weight in model.state_dict().items() if ".projector." in name}
    assert weights.keys() == {name_of_today(name) for name in stored}
    for name, weight in stored.items():
        assert torch.equal(weights[name_of_today(name)], weight), name
    assert {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad} == {"projector"}
    with pytest.raises(ValueError, match="holds the projector resampler, and avg_pool is trained here"):
        with_earlier_projector("avg_pool", folder)


@pytest.mark.slow
def test_the_projector_alone_is_kept_and_served_as_a_whole_model(trained, tmp_path):
    kept = tmp_path / "tiny_avg_pool"
    embed_projector(trained, kept)
    assert sum(file.stat().st_size for file in kept.iterdir()) < 2**20
    with demo.loadable(str(kept)) as folder:
        served = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).state_dict()
    for name, tensor in load_file(trained / "model.safetensors").items():
        assert torch.equal(served[name], tensor)
    config = json.loads((kept / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (kept / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not one for the embedded checkpoint"), demo.loadable(str(kept)):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_the_place_of_the_embedded_one(kind):
    model = with_new_projector(kind, 0)
    features = model.get_image_features(torch.zeros(1, 3, 96, 96)).pooler_output
    assert [tokens.shape for tokens in features] == [(36, model.config.text_config.hidden_size)]
    learning = {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad}
    assert (learning, model.config.projector_config.projector_type) == ({"projector"}, kind)


@pytest.mark.parametrize("kind", ["magic", "mlp"])
def test_a_projector_that_cannot_be_trained_so_is_named(kind, capsys):
    assert cli.main(["train", "tiny", "--projector", kind]) == 2
    assert f"The projector cannot be '{kind}' here: choose one of resampler, avg_pool" in capsys.readouterr().err
