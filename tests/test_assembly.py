"""`ms-resampler init`: the parts arrive whole, the tokenizer and the template fit, and nothing is left half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import tiny_models as tiny
import torch
from components import CHATML, LLAMA_3, TOKENIZERS, save_llm, save_tower
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_runs import small
from tokenizers import AddedToken
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

import ms_resampler
from ms_resampler import MSResamplerForConditionalGeneration
from ms_resampler.chat_format import ChatFormat, image_aware
from ms_resampler.training.collate import ConversationCollator
from ms_resampler.training.records import open_records
from ms_resampler.training.run import train
from ms_resampler_cli.main import main

TOWERS = ("clip", "siglip", "siglip2", "dinov2", "convnext")
EXACT = {"atol": 0, "rtol": 0}
PROJECTOR = ["--visual-tokens", "4", "--set", "hidden_size=16", "--set", "num_attention_heads=4"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    towers = {kind: str(save_tower(folder / kind, kind)) for kind in TOWERS}
    llms = {name: str(save_llm(folder / name, name, "llama" if "llama" in name else name)) for name in TOKENIZERS}
    return towers | llms


def init(parts, out, vision="clip", llm="qwen2", *more):
    return main(["init", "--vision", parts[vision], "--llm", parts[llm], "--out", str(out), *PROJECTOR, *more])


@pytest.mark.parametrize("llm", TOKENIZERS)
def test_the_parts_arrive_whole(parts, tmp_path, llm, capsys):
    assert init(parts, tmp_path / "model", "clip", llm) == 0
    weights = load_file(tmp_path / "model" / "model.safetensors")
    clip = CLIPModel.from_pretrained(parts["clip"]).vision_model.state_dict()
    for name, tensor in clip.items():
        assert_close(weights[f"model.vision_tower.{name}"], tensor.bfloat16(), **EXACT)
    original = AutoModelForCausalLM.from_pretrained(parts[llm], dtype="auto").state_dict()
    for name, tensor in original.items():
        ours = "lm_head.weight" if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        assert_close(weights[ours][: len(tensor)], tensor, **EXACT)
        for row in weights[ours][len(tensor) :]:
            assert_close(row, tensor.float().mean(0).bfloat16())
    known = {name for name in weights if not name.startswith("model.projector.")}
    assert len(known) == len(clip) + len(original)


@pytest.mark.parametrize("vision", ["clip", "dinov2"])
def test_no_folder_of_this_machine_is_saved(parts, tmp_path, vision):
    init(parts, tmp_path / "model", vision)
    for file in (tmp_path / "model").glob("*.json"):
        assert str(Path(parts[vision]).parent) not in file.read_text(), file.name


def test_the_projector_starts_as_in_a_new_model(parts, tmp_path):
    init(parts, tmp_path / "model")
    model = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    one, other = (MSResamplerForConditionalGeneration(model.config).model.projector.state_dict() for _ in range(2))
    for name, tensor in model.model.projector.state_dict().items():
        if torch.equal(one[name], other[name]):
            assert_close(tensor, one[name].bfloat16().float(), **EXACT, msg=name)
        else:
            assert tensor.std().item() == pytest.approx(one[name].std().item(), rel=0.4), name


@pytest.mark.parametrize("vision", TOWERS)
def test_every_tower_answers_through_the_auto_classes(parts, tmp_path, vision):
    more = ["--visual-tokens", "2"] if vision == "convnext" else []
    assert init(parts, tmp_path / "model", vision, "qwen2", *more) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    inputs = tiny.asked(processor, "What is it?", tiny.picture()).to(model.dtype)
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert 1 <= len(ids) <= 3
    assert model.config.image_token_id not in ids


@pytest.mark.parametrize(
    ("projector", "tokens"),
    [("mlp", 36), ("avg_pool", 6), ("token_packer", 9), ("qwen_resampler", 6), ("mqt", 6), ("q_former", 6)],
)
def test_every_kind_of_projector_can_be_asked_for(parts, tmp_path, projector, tokens, capsys):
    budget = {"mlp": [], "token_packer": ["--visual-tokens", "3x3"]}.get(projector, ["--visual-tokens", "2x3"])
    command = ["init", "--vision", parts["clip"], "--llm", parts["qwen2"], "--out", str(tmp_path / "model")]
    size = ["--set", "hidden_size=16", "--set", "num_attention_heads=4", "--set", "intermediate_size=32"]
    assert main([*command, "--projector", projector, *budget, *size]) == 0
    assert f"= {tokens} of 6 x 6 patches" in capsys.readouterr().out
    model = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.config.projector_config.projector_type == projector
    assert len(model.get_image_features(tiny.pixels(), return_dict=True).pooler_output[0]) == tokens


def test_a_picture_of_another_size_than_the_towers_is_told(parts, tmp_path, capsys):
    tower = save_tower(tmp_path / "small", "dinov2")
    settings = (tower / "preprocessor_config.json").read_text().replace("24", "16")
    (tower / "preprocessor_config.json").write_text(settings)
    assert init(parts | {"small": str(tower)}, tmp_path / "model", "small") == 0
    assert "of 4 x 4 patches. The tower was made for 6 x 6: its positions" in capsys.readouterr().out


def test_settings_for_generation_survive(parts, tmp_path):
    init(parts, tmp_path / "model", "clip", "llama_3")
    settings = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "model").generation_config
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()
    assert settings.eos_token_id == [vocabulary["<|eot_id|>"], vocabulary["<|end_of_text|>"]]
    assert settings.pad_token_id == vocabulary["<|end_of_text|>"]
    assert settings.suppress_tokens == [vocabulary["<image>"]]


def test_the_image_token_is_reused_and_rows_are_added_only_if_needed(parts, tmp_path, capsys):
    assert init(parts, tmp_path / "grown") == 0
    printed = capsys.readouterr().out
    rows = len(TOKENIZERS["qwen2"]())
    grown = load_file(tmp_path / "grown" / "model.safetensors")["lm_head.weight"]
    assert f"<image>, id {rows}, added; embeddings grew from {rows} to {len(grown)} rows" in printed
    assert len(grown) % 64 == 0

    roomy = save_llm(tmp_path / "roomy", vocab_size=rows + 1)
    assert init(parts | {"roomy": str(roomy)}, tmp_path / "same", "clip", "roomy") == 0
    assert f"added; the {rows + 1} rows of embeddings have room for it" in capsys.readouterr().out
    assert len(load_file(tmp_path / "same" / "model.safetensors")["lm_head.weight"]) == rows + 1


def save_llm_with_idle_tokens(folder):
    """Qwen2 whose tokenizer has a special token without a use, and one that it looks for in normalised text."""
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.add_tokens(["<|idle|>"], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<idle>", special=False, normalized=True)])
    save_llm(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.mark.parametrize("token", ["<|idle|>", "<idle>"])
def test_an_idle_token_becomes_the_image_token_and_no_row_is_added(token, parts, tmp_path, capsys):
    """From the template to training and back, and nobody can type or say it."""
    rows = save_llm_with_idle_tokens(tmp_path / "llm")
    parts = parts | {"idle": str(tmp_path / "llm")}
    assert init(parts, tmp_path / "model", "clip", "idle", "--image-token", token) == 0
    idle = AutoTokenizer.from_pretrained(tmp_path / "llm").get_vocab()[token]
    assert f"{token}, id {idle}, reused; the {rows} rows of embeddings have room for it" in capsys.readouterr().out
    old, new = load_file(tmp_path / "llm" / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(old["lm_head.weight"], new["lm_head.weight"])
    assert torch.equal(old["model.embed_tokens.weight"], new["model.language_model.embed_tokens.weight"])

    data = [{"id": "r", "image": "0.png", "conversations": [
        {"from": "human", "value": f"<image>\nWhat is {token}?"}, {"from": "gpt", "value": f"A {token}."},
    ]}]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(data))
    tiny.picture().save(tmp_path / "0.png")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    record = open_records(tmp_path / "data.json")[0]
    batch = ConversationCollator(processor, 200)([record])
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert (batch["input_ids"] == idle).sum() == 4
    assert processor.decode(learned) == f"A {token}.<|im_end|>"
    assert idle not in learned

    options = {"data": tmp_path / "data.json", "out": tmp_path / "run"}
    result = train(small("instruct", steps=1, batch_size=1), model=tmp_path / "model", **options)
    model = AutoModelForImageTextToText.from_pretrained(result, dtype=torch.float32)
    assert model.config.image_token_id == idle
    prompt = tiny.asked(AutoProcessor.from_pretrained(result), f"What is {token}?", tiny.picture())
    assert (prompt["input_ids"] == idle).sum() == 4
    with torch.no_grad():
        model.lm_head.weight[idle] = 100 * model.model(**prompt).last_hidden_state[0, -1]
        assert model(**prompt).logits[0, -1].argmax() == idle
    assert idle not in model.generate(**prompt, max_new_tokens=3)[0, prompt["input_ids"].shape[1] :]
    assert ms_resampler.ask("What is it?", tiny.picture(), result, max_new_tokens=3).visual_tokens == [4]


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (
            "<|endoftext|>",
            "<|endoftext|> is the tokenizer's pad_token, and cannot be the image token: name a new token",
        ),
        ("<|im_end|>", "<|im_end|> is the tokenizer's eos_token, and cannot be the image token"),
        ("<|im_start|>", "does not write texts, and <|im_start|> once for an image: give another template or token."),
        ("a", "a is a piece of ordinary words, and cannot be the image token"),
    ],
)
def test_a_token_with_a_use_is_no_image_token(token, sentence, parts, tmp_path, capsys):
    assert init(parts, tmp_path / "model", "clip", "qwen2", "--image-token", token) == 2
    assert sentence in capsys.readouterr().err


def test_tied_embeddings_stay_tied(parts, tmp_path, capsys):
    tied = save_llm(tmp_path / "tied", tie_word_embeddings=True)
    assert init(parts | {"tied": str(tied)}, tmp_path / "model", "clip", "tied") == 0
    assert "tied" in capsys.readouterr().out
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in weights
    model = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_table_adds_up(parts, tmp_path, capsys):
    init(parts, tmp_path / "model")
    lines = capsys.readouterr().out.splitlines()
    counts = [int(line[14:].split()[0].replace(",", "")) for line in lines[1:6]]
    assert sum(counts[:4]) == counts[4]
    model = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert counts[4] == sum(p.numel() for p in model.parameters())
    assert [line.split()[-2:] for line in lines[1:5]] == [
        ["frozen", "frozen"],
        ["trained"] * 2,
        *[["frozen", "trained"]] * 2,
    ]


DIALOGUE = [
    {"role": "user", "content": "Which is older?"},
    {"role": "assistant", "content": "The first."},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize(("name", "template"), [("qwen2", CHATML), ("llama_3", LLAMA_3)])
def test_a_template_made_for_texts_says_the_same_with_images(name, template):
    tokenizer = TOKENIZERS[name]()
    aware = ChatFormat(image_aware(template, "<image>", tokenizer), tokenizer)
    plain = ChatFormat(template, tokenizer)
    assert aware.template != template
    assert aware.render(DIALOGUE) == plain.render(DIALOGUE)
    listed = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in DIALOGUE]
    assert aware.render(listed) == plain.render(DIALOGUE)
    listed[0]["content"].insert(0, {"type": "image"})
    first = DIALOGUE[0] | {"content": "<image>\n" + DIALOGUE[0]["content"]}
    assert aware.render(listed) == plain.render([first, *DIALOGUE[1:]])
    assert image_aware(aware.template, "<image>", tokenizer) == aware.template


def test_a_tokenizer_without_a_template_speaks_as_vicuna(parts, tmp_path, capsys):
    assert init(parts, tmp_path / "model", "clip", "llama_2") == 0
    assert "Chat template: vicuna; answers end with </s>." in capsys.readouterr().out
    assert "USER: " in (tmp_path / "model" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--projector", "telescope"], "projector_type"),
        (["--set", "scope_sigma=1"], "`scope_sigma` is not a field of MSResamplerProjectorConfig; did you mean"),
        (["--visual-tokens", "100"], "A budget of 100 visual tokens is impossible for 6 x 6 = 36 patches"),
        (["--projector", "pixel_shuffle", "--visual-tokens", "4x6"], "`pixel_shuffle` joins whole patches"),
        (["--vision-feature-layer", "9"], "`vision_feature_layer` 9 does not exist"),
        (["--chat-template", "vicuna"], "needs the token </s>"),
        (["--chat-template", "no.jinja"], "There is no chat template 'no.jinja'"),
        (["--chat-template", "ENDLESS"], "ends answers with no token of its own"),
        (["--chat-template", "DEAF"], "does not write texts, and <image> once for an image"),
        (["--vision", "QWEN"], "The vision tower `qwen2` does not take images"),
        (["--llm", "nobody/nothing"], "nobody/nothing cannot be loaded: "),
        (["--vision", "no/such/folder"], "neither a folder nor the name"),
        (["--llm", "CLIP"], "which is more than a language model"),
    ],
)
def test_what_does_not_fit_is_a_sentence_and_leaves_nothing(parts, tmp_path, more, sentence, capsys):
    (tmp_path / "endless.jinja").write_text("{% for m in messages %}{{ m['role'] + m['content'] }}\n{% endfor %}")
    (tmp_path / "deaf.jinja").write_text("{{ messages[0]['role'] }}")
    names = {"QWEN": parts["qwen2"], "CLIP": parts["clip"]}
    names |= {"ENDLESS": str(tmp_path / "endless.jinja"), "DEAF": str(tmp_path / "deaf.jinja")}
    before = sorted(tmp_path.iterdir())
    assert init(parts, tmp_path / "model", "clip", "qwen2", *(names.get(word, word) for word in more)) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_are_missing_are_named(parts, tmp_path, capsys):
    broken = save_tower(tmp_path / "broken", "dinov2")
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    assert init(parts | {"broken": str(broken)}, tmp_path / "model", "broken") == 2
    assert "of its own architecture, such as " in capsys.readouterr().err


def test_a_folder_that_is_there_is_left_alone(parts, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert init(parts, tmp_path / "model") == 2
    assert "is there already" in capsys.readouterr().err


def test_a_full_disk_leaves_no_folder(parts, tmp_path, capsys, monkeypatch):
    def full(self, folder, **kwargs):
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MSResamplerForConditionalGeneration, "save_pretrained", full)
    assert init(parts, tmp_path / "model") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


MEASURED = """
import sys
from pathlib import Path
import transformers.models.clip.modeling_clip, transformers.models.llama.modeling_llama
from ms_resampler import init

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before, (vision, llm, out) = peak(), sys.argv[1:]
init(vision, llm, out, projector={"hidden_size": 16, "num_attention_heads": 4, "visual_tokens": 4})
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_one_copy_of_the_weights(parts, tmp_path):
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
    config = tiny.text_config("llama", **size, num_key_value_heads=16)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "big")
    TOKENIZERS["qwen2"]().save_pretrained(tmp_path / "big")
    weights = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert weights > 500e6
    command = [sys.executable, "-c", MEASURED, parts["clip"], str(tmp_path / "big"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert weights < int(done.stdout) < 1.25 * weights


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a model in it, which fails if it is imported."""
    folder = tmp_path / "site" / "llm_in_a_package"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    save_llm(tmp_path / "llm", "qwen2", "llama")
    llm, tokenizer = (kind.from_pretrained(tmp_path / "llm") for kind in (AutoModelForCausalLM, AutoTokenizer))
    write_gguf(folder / "data" / "tiny.gguf", llm, tokenizer)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_package_that_holds_a_language_model_is_named(parts, package, tmp_path, capsys):
    parts = parts | {"package": package.name, "file": str(package / "data" / "tiny.gguf")}
    assert init(parts, tmp_path / "named", "clip", "package") == 0
    assert init(parts, tmp_path / "given", "clip", "file") == 0
    named, given = (load_file(tmp_path / out / "model.safetensors") for out in ("named", "given"))
    assert named.keys() == given.keys()
    assert all(torch.equal(named[name], given[name]) for name in named)
    capsys.readouterr()
    (package / "more.gguf").write_bytes(b"")
    assert init(parts, tmp_path / "none", "clip", "package") == 2
    told = "is an installed package, and must hold one .gguf file to be a model; it has"
    assert f"{package.name} {told} tiny.gguf, more.gguf." in capsys.readouterr().err
    assert init(parts | {"package": "json"}, tmp_path / "none", "clip", "package") == 2
    assert f"json {told} none." in capsys.readouterr().err
    assert init(parts | {"package": "math"}, tmp_path / "none", "clip", "package") == 2  # a module, but no package
    assert "math cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["folder", "cache of the Hub"])
def test_a_folder_or_a_model_on_the_hub_comes_before_a_package(place, parts, package, tmp_path):
    cache = Path(constants.HF_HUB_CACHE) / f"models--{package.name}"
    folder = tmp_path / package.name if place == "folder" else cache / "snapshots" / "abc"
    shutil.copytree(parts["qwen2"], folder)
    if place != "folder":
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("abc")
    try:
        assert init(parts | {"package": package.name}, tmp_path / "model", "clip", "package") == 0
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "model").config.text_config.model_type == "qwen2"


def write_gguf(file, llm, tokenizer):
    """A Llama of transformers' as llama.cpp's converter writes it, its matrices in blocks of eight bits."""
    config, state = llm.config, llm.state_dict()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = tokenizer.added_tokens_encoder
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token in special] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    expected = {}
    for name, tensor in state.items():
        weight = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        stored = weight
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns pairs of neighbours, transformers halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            stored = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        blocks = gguf.quantize(stored, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), blocks, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_a_gguf_language_model_is_dequantised(parts, tmp_path, capsys):
    save_llm(tmp_path / "llm", "qwen2", "llama")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    expected = write_gguf(tmp_path / "tiny.gguf", llm, tokenizer)
    assert init(parts | {"gguf": str(tmp_path / "tiny.gguf")}, tmp_path / "model", "clip", "gguf") == 0
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in expected.items():
        ours = "lm_head.weight" if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        assert_close(weights[ours][: len(tensor)], tensor.to(weights[ours].dtype), **EXACT)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    words = "Which is older? The first."
    assert processor.tokenizer(words)["input_ids"] == tokenizer(words)["input_ids"]
    answer = ms_resampler.ask("What is it?", tiny.picture(), tmp_path / "model", max_new_tokens=3)
    assert answer.visual_tokens == [4]
    MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for length in (0, 4, 30, 1000, len(content) // 2, len(content) - 1000):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        assert init(parts | {"gguf": str(tmp_path / "cut.gguf")}, tmp_path / "none", "clip", "gguf") == 2
        assert f"{tmp_path / 'cut.gguf'} cannot be loaded: " in capsys.readouterr().err.splitlines()[-1]
    assert init(parts | {"gguf": str(tmp_path / "no.gguf")}, tmp_path / "none", "clip", "gguf") == 2
    assert f"There is no file {tmp_path / 'no.gguf'}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_python_makes_the_same_model_and_leaves_the_random_state(parts, tmp_path):
    fields = {"visual_tokens": 4, "hidden_size": 16, "num_attention_heads": 4}
    before = torch.get_rng_state()
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        made = ms_resampler.init(parts["clip"], parts["qwen2"], tmp_path / name, projector=fields, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert init(parts, tmp_path / "command") == 0
    one, two, other, command = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other", "command")
    )
    assert all(torch.equal(two[name], value) and torch.equal(command[name], value) for name, value in one.items())
    changed = {name for name, value in one.items() if not torch.equal(other[name], value)}
    assert changed
    assert all(name.startswith("model.projector.") for name in changed)
    saved = {name: value for name, value in made.model.state_dict().items() if name in other}
    assert all(torch.equal(value, other[name]) for name, value in saved.items())


def test_prefix_tokens_and_layers_are_options(parts, tmp_path):
    more = ["--vision-prefix-tokens", "1", "--vision-feature-layer", "1", "-1"]
    assert init(parts, tmp_path / "model", "clip", "qwen2", *more) == 0
    config = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "model").config
    assert (config.vision_prefix_tokens, config.vision_feature_layer) == (1, [1, -1])
