"""Checkpoints of other layouts: converted they compute the same, and what cannot be converted says why."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from components import qwen_tokenizer, save_llm, save_tower
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tiny_models import (
    CHAT_TEMPLATE,
    asked,
    loud,
    picture,
    save_tiny,
    text_config,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    tower_config,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import ms_resampler
from ms_resampler.conversion.comparison import largest_difference
from ms_resampler.conversion.convert import plan_conversion
from ms_resampler.conversion.tables import LLAVA, translate
from ms_resampler.folders import remote_code_files
from ms_resampler.projectors_ms_resampler import PROJECTORS, rename
from ms_resampler_cli.main import main

SMALL = ["--set", "hidden_size=16", "--set", "num_attention_heads=4", "--set", "intermediate_size=32"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A small LLaVA in several files, as transformers saves it."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    parts = {"vision_config": tower_config(), "text_config": text_config("llama"), "image_token_id": 3}
    loud(LlavaForConditionalGeneration(LlavaConfig(**parts))).save_pretrained(folder, max_shard_size="60KB")
    LlavaProcessor(
        tiny_processor().image_processor,
        tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def logits(folder: Path) -> torch.Tensor:
    """What a folder answers to a picture and a question, loaded as anyone would."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(**asked(processor, "What is this?", picture())).logits


def as_older_versions_saved(folder: Path, target: Path) -> Path:
    """The same checkpoint in one file under the names of transformers 4.40, computed tables among them."""
    state = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in state.items()}
    renamed["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    renamed["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    target.mkdir()
    for file in folder.iterdir():
        if "safetensors" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("age", ["new", "old"])
def test_llava_computes_the_same_and_goes_back(llava, age, tmp_path, capsys):
    source = llava if age == "new" else as_older_versions_saved(llava, tmp_path / "old")
    assert convert(source, tmp_path / "ours", "--verify") == 0
    assert "differ by at most 0.0e+00" in capsys.readouterr().out
    torch.testing.assert_close(logits(tmp_path / "ours"), logits(llava), rtol=1e-5, atol=1e-5)
    assert convert(tmp_path / "ours", tmp_path / "back", "--to", "llava") == 0
    torch.testing.assert_close(logits(tmp_path / "back"), logits(llava), rtol=0, atol=0)
    state = {name: value for file in llava.glob("*.safetensors") for name, value in load_file(file).items()}
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", ["avg_pool", "ms_resampler", "resampler"])
@pytest.mark.parametrize("origin", ["LLaVA's", "ours"])
def test_a_projector_starts_as_the_mlp_of_the_mean_of_each_cell(llava, kind, origin, tmp_path, capsys):
    """At the budget it is made for and at others."""
    source = llava
    if origin == "ours":
        source = tmp_path / "ours"
        assert convert(llava, source) == 0
    assert convert(source, tmp_path / "out", "--projector", kind, "--set", "visual_tokens=4", *SMALL) == 0
    assert "unused" not in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    old = LlavaForConditionalGeneration.from_pretrained(llava).model.multi_modal_projector
    x_BNC = torch.randn(2, 36, 16)
    with torch.no_grad():
        for rows, columns in ((2, 2), (3, 2), (1, 6)):
            cells = x_BNC.view(2, rows, 6 // rows, columns, 6 // columns, 16).mean(dim=(2, 4)).flatten(1, 2)
            y_BMT = model.model.projector(x_BNC, (6, 6), (rows, columns))
            y_BMT = y_BMT if kind == "avg_pool" else y_BMT[0]
            torch.testing.assert_close(y_BMT, old(cells), rtol=1e-5, atol=1e-5)


def test_another_projector_starts_anew_and_all_else_stays(llava, tmp_path, capsys):
    anew = ["--projector", "ms_resampler", "--set", "pooled_mlp=false", "--set", "visual_tokens=4", *SMALL]
    assert convert(llava, tmp_path / "out", *anew) == 0
    assert "4 unused" in capsys.readouterr().out
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(llava)
    for part in ("vision_tower", "language_model"):
        old = dict(getattr(theirs.model, part).named_parameters())
        assert all(torch.equal(value, old[name]) for name, value in getattr(ours.model, part).named_parameters())
    assert logits(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("scope", [None, 0.5, 0.8], ids=str)
@pytest.mark.parametrize("tiled", [True, False])
def test_one_scope_becomes_several_and_computes_the_same_at_first(scope, tiled, tmp_path):
    form = {} if tiled else {"branch_form": {"tile_heads": False, "cell_residual": False}}
    changes = {"projector_type": "resampler", "scope_sigmas": [scope], "num_hidden_layers": 2} | form
    save_tiny(tmp_path / "one", projector=changes)
    assert convert(tmp_path / "one", tmp_path / "several", "--projector", "ms_resampler") == 0
    one, several = logits(tmp_path / "one"), logits(tmp_path / "several")
    assert (several - one).abs().max() < 1e-5 * one.abs().max()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "several")
    sigmas = list(model.config.projector_config.scope_sigmas)
    assert scope in sigmas
    assert len(sigmas) == (4 if scope == 0.8 else 3)
    before = {name: value.clone() for name, value in model.model.projector.named_parameters()}
    optimizer = torch.optim.AdamW(model.model.projector.parameters(), lr=1e-2, eps=1e-12)
    for _ in range(3):
        y, _ = model.model.projector(torch.randn(2, 36, 16), (6, 6), (2, 2))
        y.square().sum().backward()
        optimizer.step()
    embedding = "layers.0.scope_embedding"
    new = [number for number, sigma in enumerate(sigmas) if sigma != scope]
    moved = (model.model.projector.get_parameter(embedding) - before[embedding])[new].abs().amin(dim=1)
    assert (moved > 0).any()  # the new scopes learn, too


def test_one_scope_without_queries_stays_one(tmp_path, capsys):
    save_tiny(tmp_path / "one", projector={"scope_sigmas": [0.5]})
    asked = ["--projector", "ms_resampler", "--set", "scope_sigmas=[0.5,null]"]
    assert convert(tmp_path / "one", tmp_path / "several", *asked) == 2
    assert "has a ms_resampler projector already: there is nothing to convert" in capsys.readouterr().err
    assert not (tmp_path / "several").exists()


def original_checkpoint(folder: Path, kind: str, *, whole: bool, tower_inside: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint as the original repositories leave it, in a PyTorch file; returns the projector's weights."""
    torch.manual_seed(0)
    vision, text = tower_config(), LlamaConfig(**text_config("llama").to_diff_dict() | {"vocab_size": 260})
    loud(CLIPVisionModel(CLIPVisionConfig(**vision.to_diff_dict()))).save_pretrained(folder / "tower")
    tiny_processor().image_processor.save_pretrained(folder / "tower")
    llm = loud(LlamaForCausalLM(text))
    packs = kind in ("token_packer", "delta_llava")
    layers = [0, 1, 2, 3] if packs else -2
    fields = {"projector_type": kind, "visual_tokens": [6, 6] if kind == "mlp" else [3, 3], "query_grid": [3, 3]}
    fields |= {"num_attention_heads": 8 if packs else 1}
    config = tiny_config(projector=fields, vision_feature_layer=layers)
    projector = PROJECTORS[kind](config)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(std=0.2)
    names = rename(projector.state_dict(), projector.original_names)
    state = {f"model.mm_projector.{names[name]}": value for name, value in projector.state_dict().items()}
    for place in (folder / "checkpoint", folder / "base"):
        place.mkdir()
        plain_tokenizer().save_pretrained(place)
    llm.save_pretrained(folder / "base")
    about = {"mm_vision_tower": "openai/clip-small", "mm_vision_select_layer": layers, "mm_projector_type": kind}
    about |= {"mm_hidden_size": 16, "use_mm_proj": True}
    kept = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(kept | about | {"model_type": "llava_llama"}))
    if whole:
        state |= llm.state_dict()
    if tower_inside:
        tower = CLIPVisionModel.from_pretrained(folder / "tower").state_dict()
        state |= {f"model.vision_tower.vision_tower.vision_model.{name}": value for name, value in tower.items()}
    torch.save(state, folder / "checkpoint" / ("pytorch_model.bin" if whole else "mm_projector.bin"))
    return projector.state_dict()


@pytest.mark.parametrize("layers", [2, 0])
def test_llava_mini_computes_the_same(layers, tmp_path):
    """Compressor, projector and pre-fusion of a whole checkpoint, joined as the original's code joins them."""
    torch.manual_seed(0)
    text = LlamaConfig(**text_config("llama").to_diff_dict() | {"vocab_size": 260})
    tower = loud(CLIPVisionModel(CLIPVisionConfig(**tower_config().to_diff_dict()))).eval()
    llm, fusing = (loud(LlamaForCausalLM(text)).eval() for _ in range(2))
    fields = {"projector_type": "llava_mini", "num_attention_heads": 8, "query_grid": [2, 2], "visual_tokens": 4}
    projector = loud(PROJECTORS["llava_mini"](tiny_config(projector=fields)))
    names = rename(projector.state_dict(), projector.original_names)
    state = {f"model.{names[name]}": value for name, value in projector.state_dict().items()}
    fused = {name.replace("layers", "prefusion_layers", 1): p for name, p in fusing.state_dict().items()}
    state |= {
        name: p
        for name, p in fused.items()
        if name.startswith(tuple(f"model.prefusion_layers.{n}." for n in range(layers)))
    }
    state |= llm.state_dict()
    state |= {f"model.vision_tower.vision_tower.vision_model.{name}": p for name, p in tower.state_dict().items()}
    about = {"model_type": "llava_mini_llama", "mm_vision_tower": "openai/clip-small", "mm_vision_select_layer": -2}
    about |= {"mm_hidden_size": 16, "compressor_size": 2, "prefusion_layer_num": layers}
    (tmp_path / "mini").mkdir()
    kept = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    (tmp_path / "mini" / "config.json").write_text(json.dumps(kept | about))
    torch.save(state, tmp_path / "mini" / "pytorch_model.bin")
    plain_tokenizer().save_pretrained(tmp_path / "mini")
    tower.save_pretrained(tmp_path / "tower")
    tiny_processor().image_processor.save_pretrained(tmp_path / "tower")

    assert convert(tmp_path / "mini", tmp_path / "out", "--tower", tmp_path / "tower") == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert model.config.projector_config.fusion_layers == layers
    assert not [name for name in model.config.text_config.to_dict() if name.startswith(("compressor", "prefusion"))]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(text="a b <image> c d", images=picture(size=(30, 40)), return_tensors="pt")
    with torch.no_grad():
        x_BNC = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        image_BMT = projector(x_BNC, (6, 6), (2, 2))
        (row,) = inputs["input_ids"].tolist()
        start = row.index(model.config.image_token_id)
        ids = torch.tensor([row[:start] + row[start + 4 :]])
        x = torch.cat([projector.mlp(x_BNC), image_BMT, llm.get_input_embeddings()(ids)], dim=1)
        positions = torch.arange(x.shape[1])[None]
        for layer in fusing.model.layers[:layers]:
            at = fusing.model.rotary_emb(x, positions)
            causal = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
            x = layer(x, attention_mask=causal, position_embeddings=at)
        image, before, after = x[:, 36:].split([4, start, ids.shape[1] - start], dim=1)
        expected = llm(inputs_embeds=torch.cat([before, image, after], dim=1)).logits
        torch.testing.assert_close(model(**inputs).logits[..., :260], expected, rtol=1e-5, atol=1e-5)

    assert convert(tmp_path / "out", tmp_path / "alone", "--to", "projector") == 0
    models = ["--tower", tmp_path / "tower", "--llm", tmp_path / "llm"]
    llm.save_pretrained(tmp_path / "llm")
    assert convert(tmp_path / "alone", tmp_path / "again", *models) == 0
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value), name


def plain_tokenizer():
    """A language model's own: it knows no image token, and chats like Vicuna."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("kind", "whole", "tower_inside"),
    [
        ("mlp", True, False),
        ("mlp", True, True),
        ("mlp", False, False),
        ("ldp", False, False),
        ("ldp_v2", True, True),
        ("token_packer", True, False),
        ("delta_llava", True, False),
        ("mqt", False, False),
    ],
)
def test_original_layouts_are_recognised_by_their_weights(kind, whole, tower_inside, tmp_path):
    expected = original_checkpoint(tmp_path, kind, whole=whole, tower_inside=tower_inside)
    budget = [] if kind == "mlp" else ["--set", "visual_tokens=[3,3]"]
    base = [] if whole else ["--llm", tmp_path / "base"]
    assert convert(tmp_path / "checkpoint", tmp_path / "out", "--tower", tmp_path / "tower", *base, *budget) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.projector_config.projector_type == kind
    assert all(torch.equal(value, expected[name]) for name, value in model.model.projector.state_dict().items())
    llm = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    words = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=words).logits[..., :260], llm(input_ids=words).logits)
    tower = CLIPVisionModel.from_pretrained(tmp_path / "tower")
    assert all(
        torch.equal(p, dict(tower.named_parameters())[n]) for n, p in model.model.vision_tower.named_parameters()
    )
    new_rows = model.get_input_embeddings().weight[260:]
    torch.testing.assert_close(new_rows, llm.get_input_embeddings().weight.mean(0).expand(len(new_rows), -1))
    assert logits(tmp_path / "out").isfinite().all()


def honeybee_checkpoint(
    folder: Path, kind: str = "c_abstractor", *, class_position: bool = False, **told
) -> dict[str, torch.Tensor]:
    """A checkpoint as Honeybee's code leaves it, with the tokenizer elsewhere; returns the projector's weights."""
    torch.manual_seed(0)
    vision, text = tower_config(), LlamaConfig(**text_config("llama").to_diff_dict() | {"vocab_size": 260})
    tower = loud(CLIPVisionModel(CLIPVisionConfig(**vision.to_diff_dict())))
    llm = loud(LlamaForCausalLM(text))
    sizes = {
        "hidden_size": 12,
        "num_attention_heads": 1 if kind == "c_abstractor" else 2,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "visual_tokens": [3, 3],
        "query_grid": [3, 3],
    }
    projector = loud(PROJECTORS[kind](tiny_config(projector={"projector_type": kind, **sizes})))
    names = rename(projector.state_dict(), projector.original_names)
    state = {f"abstractor.{names[name]}": value for name, value in projector.state_dict().items()}
    table = f"abstractor.{names['position']}"
    rows = state[table][None]
    state[table] = torch.cat([rows[:, :1], rows], dim=1) if class_position else rows
    state |= {f"vision_model.vision_model.{name}": value for name, value in tower.state_dict().items()}
    state |= {f"language_model.{name}": value for name, value in llm.state_dict().items()}
    if kind == "c_abstractor":
        abstractor = {"projector_type": "c-abs", "depth": 2, "mlp_depth": 2, "hidden_size": 12}
    else:
        abstractor = {"projector_type": "d-abs", "decoder_layers": 2, "d_model": 12, "pooled_v_target": "query"}
        abstractor |= {"decoder_attention_heads": 2, "decoder_ffn_dim": 20, "num_feature_levels": 1}
    abstractor |= {"num_eos_tokens": 0}
    abstractor |= {"pos_emb": True, "feature_layer_index": -1, "prenorm": False} | told
    about = {"model_type": "mllm", "num_query_tokens": 9, "lm_config": {"pretrained_lm_name_or_path": "llm"}}
    about |= {"vision_config": vision.to_dict(), "text_config": text.to_dict(), "visual_projector_config": abstractor}
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "config.json").write_text(json.dumps(about))
    torch.save(state, folder / "checkpoint" / "pytorch_model.bin")
    llm.save_pretrained(folder / "llm")
    plain_tokenizer().save_pretrained(folder / "llm")
    tower.save_pretrained(folder / "tower")
    return projector.state_dict()


@pytest.mark.parametrize(
    ("kind", "class_position"), [("c_abstractor", False), ("c_abstractor", True), ("d_abstractor", False)]
)
def test_honeybee_computes_the_same(kind, class_position, tmp_path, capsys):
    """Tower, abstractor and language model each as in the source, and joined as Honeybee's code joins them."""
    expected = honeybee_checkpoint(tmp_path, kind, class_position=class_position)
    assert convert(tmp_path / "checkpoint", tmp_path / "out") == 2
    assert "holds no tokenizer: name its language model with --llm" in capsys.readouterr().err
    assert convert(tmp_path / "checkpoint", tmp_path / "out", "--llm", tmp_path / "llm") == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, expected[name]) for name, value in model.model.projector.state_dict().items())
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.endswith("questions.\nHuman: <image>\nHuman: What is this?\nAI: ")
    inputs = processor(text=text, images=picture(size=(30, 40)), return_tensors="pt")
    llm = LlamaForCausalLM.from_pretrained(tmp_path / "llm").eval()
    tower = CLIPVisionModel.from_pretrained(tmp_path / "tower").eval()
    tokenizer = plain_tokenizer()
    with torch.no_grad():
        last = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]
        image = model.model.projector(last, (6, 6), (3, 3))
        ids = [tokenizer(part, return_tensors="pt")["input_ids"] for part in text.split("<image>")]
        before, after = map(llm.get_input_embeddings(), ids)
        logits = llm(inputs_embeds=torch.cat([before, image, after], dim=1)).logits
        torch.testing.assert_close(model(**inputs).logits[..., :260], logits, rtol=1e-5, atol=1e-5)


def test_honeybee_with_another_projector(tmp_path, capsys):
    honeybee_checkpoint(tmp_path)
    command = [tmp_path / "checkpoint", tmp_path / "out", "--llm", tmp_path / "llm"]
    assert convert(*command, "--projector", "ms_resampler", "--set", "visual_tokens=4", *SMALL) == 0
    assert "Nothing of the old projector fits the new one, which starts at random" in capsys.readouterr().out
    assert logits(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("told", [{"projector_type": "resampler"}, {"prenorm": True}, {"num_eos_tokens": 1}], ids=str)
def test_honeybees_other_projectors_are_refused(told, tmp_path, capsys):
    honeybee_checkpoint(tmp_path, **told)
    assert convert(tmp_path / "checkpoint", tmp_path / "out", "--llm", tmp_path / "llm") == 2
    assert f"a projector other than Honeybee's published abstractors: {told}" in capsys.readouterr().err


@pytest.mark.parametrize("room", [True, False], ids=["room for <image>", "embeddings that grew"])
def test_a_projector_alone_goes_out_and_in(room, tmp_path, capsys):
    """Joined again with its tower and language model it is the model that it was taken from."""
    save_tower(tmp_path / "tower")
    save_llm(tmp_path / "llm", **({} if room else {"vocab_size": len(qwen_tokenizer())}))
    fields = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16, "visual_tokens": 4}
    made = ms_resampler.init(tmp_path / "tower", tmp_path / "llm", tmp_path / "whole", projector=fields)
    loud(made.model.model.projector)
    made.model.save_pretrained(tmp_path / "whole")
    assert convert(tmp_path / "whole", tmp_path / "alone", "--to", "projector") == 0
    assert {file.name for file in (tmp_path / "alone").glob("*.py")} == {file.name for file in remote_code_files()}
    size = sum(file.stat().st_size for file in (tmp_path / "alone").glob("*.safetensors"))
    assert size < 0.5 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    assert convert(tmp_path / "alone", tmp_path / "again") == 2
    assert "holds a projector alone: name the models it belongs to with --tower and --llm" in capsys.readouterr().err
    models = ["--tower", tmp_path / "tower", "--llm", tmp_path / "llm"]
    assert convert(tmp_path / "alone", tmp_path / "again", *models) == 0
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tmp_path / "whole"), rtol=0, atol=0)
    assert convert(tmp_path / "alone", tmp_path / "third", *models, "--verify") == 2
    assert "holds a projector alone, which does not run: there is nothing to compare" in capsys.readouterr().err
    assert convert(tmp_path / "whole", tmp_path / "fourth", "--to", "projector", "--verify") == 2
    assert not (tmp_path / "fourth").exists()
    save_llm(tmp_path / "other", hidden_size=64)
    assert convert(tmp_path / "alone", tmp_path / "no", "--tower", tmp_path / "tower", "--llm", tmp_path / "other") == 2
    assert "The weights do not fit" in capsys.readouterr().err


def test_repositories_of_the_hub_are_fetched(hub, monkeypatch, tmp_path, capsys):
    """The checkpoint, its language model and, by the name in its config.json, its tower."""
    expected = original_checkpoint(tmp_path, "ldp_v2", whole=False)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ada", orgs={"openai": "write"}))
    api = HfApi(endpoint=hub.url)
    for name, folder in (("ada/projector", "checkpoint"), ("openai/clip-small", "tower"), ("ada/llm", "base")):
        api.create_repo(name, private=True)
        api.upload_folder(repo_id=name, folder_path=tmp_path / folder)
    assert convert("ada/projector", tmp_path / "out", "--llm", "ada/llm", "--set", "visual_tokens=[3,3]") == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, expected[name]) for name, value in model.model.projector.state_dict().items())
    capsys.readouterr()
    assert convert("ada/projector", tmp_path / "no", "--llm", "ada/nothing") == 2
    assert "ada/nothing is not a folder, and cannot be downloaded" in capsys.readouterr().err


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original_checkpoint(tmp_path, "mlp", whole=False)
    (tmp_path / "checkpoint" / "mm_projector.bin").write_bytes(pickle.dumps({"model.mm_projector.0.weight": Harmful()}))
    assert convert(tmp_path / "checkpoint", tmp_path / "out", "--tower", tmp_path / "tower") == 2
    assert "cannot be read safely" in capsys.readouterr().err
    assert not (tmp_path / "harmed").exists()
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_listed_before_anything_is_written(llava, tmp_path, capsys):
    broken = as_older_versions_saved(llava, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state.pop("multi_modal_projector.linear_1.bias")
    state["language_model.model.norm.weight"] = torch.ones(3)
    save_file(state, broken / "model.safetensors")
    assert convert(broken, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "norm.weight is [3] instead of [32]" in error
    assert "model.projector.mlp.0.bias is missing" in error
    state["surprise"] = torch.ones(1)
    save_file(state, broken / "model.safetensors")
    assert convert(broken, tmp_path / "out") == 2
    assert "holds surprise, which transformers' LLaVA layout lacks" in capsys.readouterr().err
    (broken / "config.json").write_text('{"model_type": "blip"}')
    assert convert(broken, tmp_path / "out") == 2
    assert "its model_type is `blip`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_missing_file_is_named(llava, tmp_path, capsys):
    damaged = as_older_versions_saved(llava, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert convert(damaged, tmp_path / "out") == 2
    assert "model.safetensors is damaged or not complete" in capsys.readouterr().err
    (damaged / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert convert(damaged, tmp_path / "out") == 2
    assert "lacks model-2.safetensors" in capsys.readouterr().err


def test_a_dry_run_shows_every_weight_and_writes_nothing(llava, tmp_path, capsys):
    anew = ["--projector", "ms_resampler", "--set", "pooled_mlp=false", "--set", "visual_tokens=4", *SMALL]
    assert convert(llava, tmp_path / "out", "--dry-run", *anew) == 0
    shown = capsys.readouterr().out
    assert "unused" in shown
    assert "model.projector.layers.0.prior.offset" in shown
    state = {name for file in llava.glob("*.safetensors") for name in load_file(file)}
    assert all(name in shown for name in state)
    assert list(tmp_path.iterdir()) == []


def test_python_converts_as_the_command_does(llava, tmp_path):
    """There and back; the plan that is returned tells of every weight, and progress adds up to their size."""
    written = []
    plan = ms_resampler.convert(llava, tmp_path / "ours", progress=written.append)
    assert {row.what for row in plan.rows} == {"as it is"}
    assert sum(written) == plan.bytes == sum(row.bytes for row in plan.outputs)
    difference, largest = largest_difference(llava, tmp_path / "ours")
    assert difference == 0 < largest
    ms_resampler.convert(tmp_path / "ours", tmp_path / "back", to="llava")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(llava), rtol=0, atol=0)
    ms_resampler.convert(
        llava, tmp_path / "pooled", projector={"projector_type": "avg_pool", "visual_tokens": 4}, tower=None
    )
    with pytest.raises(ValueError, match="their projectors differ"):
        largest_difference(llava, tmp_path / "pooled")


@pytest.mark.parametrize("to", ["llava", "projector"])
def test_what_a_target_does_not_take_is_refused(llava, to, tmp_path, capsys):
    """No option is dropped: a dry run writes nothing, and another projector, tower or language model is refused."""
    ours = tmp_path / "ours"
    ms_resampler.convert(llava, ours)
    for more in (["--projector", "avg_pool"], ["--set", "visual_tokens=4"], ["--llm", ours], ["--tower", ours]):
        assert convert(ours, tmp_path / "out", "--to", to, *more) == 2
        assert f"A conversion to '{to}' keeps the model as it is" in capsys.readouterr().err
    assert convert(ours, tmp_path / "out", "--to", to, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in load_file(ours / "model.safetensors"))
    assert convert(llava, tmp_path / "out", "--to", to) == 2
    assert "is a `llava` model, not one of this package" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [ours]
    with pytest.raises(SystemExit):
        convert(ours, tmp_path / "out", "--dry-run", "--verify")


def test_prefix_tokens_stay_with_another_projector(tmp_path):
    """The tower's tokens in front of the patches are the model's, whatever reads the patches."""
    save_tiny(tmp_path / "ours", vision_prefix_tokens=1, vision_feature_layer=-1)
    ms_resampler.convert(tmp_path / "ours", tmp_path / "out", projector={"projector_type": "avg_pool"})
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config
    assert (config.vision_prefix_tokens, config.vision_feature_layer) == (1, -1)


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_written_result(llava, tmp_path):
    """Killed between two weights; run again it is whole."""
    script = f"""
import os, signal, ms_resampler
def progress(count, seen=[0]):
    seen[0] += 1
    if seen[0] == 40:
        os.kill(os.getpid(), signal.SIGKILL)
ms_resampler.convert({str(llava)!r}, "out", progress=progress)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    assert convert(llava, tmp_path / "out") == 0
    torch.testing.assert_close(logits(tmp_path / "out"), logits(llava), rtol=1e-5, atol=1e-5)


def test_every_weight_of_llava_1_5_7b_has_its_place():
    """At full size, on the meta device."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    shapes = {name: tuple(value.shape) for name, value in llava.state_dict().items()}
    ours = tiny_model().config.__class__(
        vision_config=vision,
        text_config=text,
        projector_config={"projector_type": "mlp", "visual_tokens": [24, 24]},
        image_token_id=32000,
    )
    with torch.device("meta"):
        wanted = AutoModelForImageTextToText.from_config(ours).state_dict()
    assert len(shapes) > 650
    assert {translate(name, LLAVA): shape for name, shape in shapes.items()} == {
        name: tuple(value.shape) for name, value in wanted.items()
    }


def test_another_projector_keeps_a_possible_budget(tmp_path, capsys):
    save_tiny(tmp_path / "ours")
    command = [tmp_path / "ours", tmp_path / "out", "--projector", "mqt", *SMALL]
    assert convert(*command, "--set", "visual_tokens=144") == 2
    assert "144 visual tokens is impossible for 6 x 6 = 36 patches" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert(*command) == 0
    old, new = (AutoProcessor.from_pretrained(tmp_path / name).visual_tokens for name in ("ours", "out"))
    assert new == old


def test_a_model_that_llava_cannot_hold_is_refused(tmp_path, capsys):
    save_tiny(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "out", "--to", "llava") == 2
    assert "not `ms_resampler`" in capsys.readouterr().err
    assert convert(tmp_path / "ours", tmp_path / "ours") == 2
    assert "is there already" in capsys.readouterr().err


def test_memory_stays_near_a_shard(llava, tmp_path, monkeypatch):
    """Weights are read when their shard is written, and not before."""
    assert all(output.make.__closure__ for output in plan_conversion(llava).outputs)
    monkeypatch.setattr("ms_resampler.conversion.weights.SHARD_BYTES", 50_000)
    assert convert(llava, tmp_path / "out") == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 4
    assert max(file.stat().st_size for file in files) < 60_000
    torch.testing.assert_close(logits(tmp_path / "out"), logits(llava), rtol=1e-5, atol=1e-5)
