"""LLaVA-Mini's pre-fusion: its originals' outputs, and whole models that fuse a prompt once and decode plainly."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, LlamaConfig

from ms_resampler.fusion_ms_resampler import PreFusion, words_of_prompt
from ms_resampler.projectors_ms_resampler import PROJECTORS, rename
from ms_resampler.training.loss import skip_unlearned
from ms_resampler.training.parameters import part_of

ORIGINALS = Path(__file__).parent / "reference_projectors"
MINI = {"projector_type": "llava_mini", "fusion_layers": 2, "query_grid": [1, 2], "visual_tokens": [1, 2]}


def original(name):
    """Tensors, projector, pre-fusion and word embeddings of an original's file."""
    with safe_open(ORIGINALS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no dict
        meta = json.loads(file.metadata()["meta"])
    tensors = {key: value.float() if value.is_floating_point() else value.long() for key, value in tensors.items()}
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    state["compressor.pos_embed"] = tensors["pos.compressor"]
    side = meta["compressor_size"]
    config = SimpleNamespace(
        feature_width=16,
        text_width=32,
        text_config=LlamaConfig(num_hidden_layers=8, **meta["llama"]),
        projector_config=SimpleNamespace(
            query_grid=(side, side), num_attention_heads=meta["num_heads"], fusion_layers=meta["prefusion_layers"]
        ),
    )
    projector, fusion = PROJECTORS["llava_mini"](config), PreFusion(config)
    torch.testing.assert_close(projector.position, state["compressor.pos_embed"], rtol=0, atol=1e-6)
    names = rename(projector.state_dict(), projector.original_names)
    names |= {key: key.replace("decoder.layers", "prefusion_layers") for key in fusion.state_dict()}
    words = state.pop("embed_tokens.weight")
    assert sorted(names.values()) == sorted(state)
    projector.load_state_dict({key: state[names[key]] for key in projector.state_dict()})
    fusion.load_state_dict({key: state[names[key]] for key in fusion.state_dict()})
    return tensors, projector, fusion, words


@pytest.mark.parametrize("name", ["llava_mini_c1", "llava_mini_c2_hd"])
@torch.no_grad()
def test_llava_mini_computes_what_its_original_computed(name):
    """In high resolution, tiles are joined to one map, and fusion sees it, then the whole image."""
    tensors, projector, fusion, words = original(name)
    x_BNC, ids_BL = tensors["in.features"], tensors["in.input_ids"]
    if name == "llava_mini_c1":
        visual_BMT, patches_BNT = projector(x_BNC, (8, 8), (1, 1), with_patches=True)
    else:
        tiles_1NC = x_BNC[:4].unflatten(1, (4, 4)).unflatten(0, (2, 2)).transpose(1, 2).reshape(1, 64, 16)
        visual_BMT, patches_BNT = projector(tiles_1NC, (8, 8), (2, 2), with_patches=True)
        patches_BNT = torch.cat([patches_BNT, projector.mlp(x_BNC[4:])], dim=1)
    torch.testing.assert_close(visual_BMT, projector.mlp(tensors["out.compressor"]), rtol=0, atol=1e-5)

    positions = []
    fusion.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    text_BLT, words_BL = F.embedding(ids_BL.clamp(min=0), words), ids_BL > 0
    visual_BMT, fused_BLT = fusion(patches_BNT, visual_BMT, text_BLT, words_BL)
    assert torch.equal(positions[0], tensors["out.position_ids"])
    torch.testing.assert_close(visual_BMT, tensors["out.vision"], rtol=0, atol=1e-5)
    fused_BLT = torch.where(words_BL[..., None], fused_BLT, text_BLT)
    torch.testing.assert_close(fused_BLT, tensors["out.text"], rtol=0, atol=1e-5)


def mini(text="llama", **changes):
    return tiny.tiny_model(text=text, projector=MINI | changes)


def prompts(images_of_rows=((2,), (), (1, 3), (1,)), size=(24, 24)):
    """Prompts of words and images, the pictures, and each row's."""
    lengths, rows, count = iter(tiny.words(*range(3, 20))), [], 0
    owners = []
    for images in images_of_rows:
        row = list(next(lengths))
        for _ in images:
            row += [tiny.IMAGE] * 2 + next(lengths)
        rows.append(row)
        owners.append(slice(count, count + len(images)))
        count += len(images)
    return rows, tiny.pixels(count, size), owners


def by_hand(model, row, pixels, words=None):
    """The embeddings of one prompt: every image fused with the text, one after the other, and the text's mean."""
    base, ids = model.model, torch.tensor([row])
    text_1LT = base.get_input_embeddings()(ids)
    words_1L = (ids != tiny.IMAGE) if words is None else words
    visual, texts = [], []
    for image in pixels:
        tower = base.vision_tower(image[None], output_hidden_states=True, interpolate_pos_encoding=True)
        state = tower.hidden_states[-2][:, 1:]
        grid = (image.shape[1] // 4, image.shape[2] // 4)
        tokens_1MT = base.projector(state, grid, (1, 2))
        tokens_1MT, fused_1LT = base.fusion(base.projector.mlp(state), tokens_1MT, text_1LT, words_1L)
        visual.append(tokens_1MT[0])
        texts.append(fused_1LT)
    if not texts:
        return text_1LT
    text_1LT = torch.where(words_1L[..., None], torch.stack(texts).mean(0), text_1LT)
    text_1LT[0, ids[0] == tiny.IMAGE] = torch.cat(visual)
    return text_1LT


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_is_fused_prompt_by_prompt(side):
    model, (rows, pixels, owners) = mini(), prompts()
    batch = tiny.collate(rows, side)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**batch, pixel_values=pixels, position_ids=positions).logits
    for row, mask, images, got in zip(rows, batch["attention_mask"].bool(), owners, logits, strict=True):
        expected = model.lm_head(model.model.language_model(inputs_embeds=by_hand(model, row, pixels[images]))[0])
        torch.testing.assert_close(got[mask], expected[0], rtol=1e-4, atol=1e-5)
    plain = mini(fusion_layers=0)
    assert plain.model.fusion is None
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".fusion." not in k})
    other = plain(**batch, pixel_values=pixels, position_ids=positions).logits
    without = batch["attention_mask"][1].bool()  # a prompt without images
    torch.testing.assert_close(other[1][without], logits[1][without], rtol=1e-4, atol=1e-5)
    assert (other[0] - logits[0]).abs().max() > 0.1


def greedy(model, embeds_1LT, steps):
    """A prompt's continuation, computed from all embeddings at every step."""
    found = []
    for _ in range(steps):
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeds_1LT, use_cache=False)[0])[0, -1]
        logits[tiny.IMAGE] = -torch.inf
        found.append(int(logits.argmax()))
        word_11T = model.get_input_embeddings()(torch.tensor([[found[-1]]]))
        embeds_1LT = torch.cat([embeds_1LT, word_11T], dim=1)
    return found


@torch.no_grad()
def test_words_that_are_decoded_are_not_fused():
    model, (rows, pixels, owners) = mini(), prompts()
    batch = tiny.collate(rows)
    expected = [greedy(model, by_hand(model, row, pixels[images]), 5) for row, images in zip(rows, owners, strict=True)]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    start = batch["input_ids"].shape[1]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        answers = model.generate(**batch, pixel_values=pixels, **how, **options)
        assert answers[:, start:].tolist() == expected, options
    alone = {"input_ids": torch.tensor([rows[2]]), "pixel_values": pixels[owners[2]]}
    looked_up = model.generate(**alone, **how, prompt_lookup_num_tokens=3)
    assert looked_up[0, len(rows[2]) :].tolist() == expected[2]
    beams = model.generate(**batch, pixel_values=pixels, **how, num_beams=3)
    for row, images, answer in zip(rows, owners, beams[:, start:], strict=True):
        pictures = {"pixel_values": pixels[images]} if images.start != images.stop else {}
        single = model.generate(input_ids=torch.tensor([row]), **pictures, **how, num_beams=3)
        assert torch.equal(single[0, len(row) :], answer)


@torch.no_grad()
def test_images_of_different_sizes_are_fused_with_their_own_prompts():
    """Encoded apart, because pixels of different sizes make no batch."""
    model, (rows, _, _) = mini(), prompts(((1,), (1, 1)))
    sizes = [(24, 24), (24, 16), (16, 24)]
    images = [tiny.pixels(1, size, seed)[0] for seed, size in enumerate(sizes)]
    encoded = [model.get_image_features(image[None]) for image in images]
    features = encoded[0]
    for name in ("pooler_output", "patch_grids"):
        features[name] = [one for each in encoded for one in each[name]]
    features["deepstack_features"] = [[one for each in encoded for one in each.deepstack_features[0]]]
    batch = tiny.collate(rows, "right")
    logits = model(**batch, mm_encoder_outputs={"image": features}).logits
    for row, pictures, got in zip(rows, (images[:1], images[1:]), logits, strict=True):
        expected = model.lm_head(model.model.language_model(inputs_embeds=by_hand(model, row, pictures))[0])
        torch.testing.assert_close(got[: len(row)], expected[0], rtol=1e-4, atol=1e-5)


def test_answers_are_not_fused_while_training(tmp_path):
    model, (rows, pixels, _) = mini(), prompts(((1,), (1,)))
    batch = tiny.collate(rows)
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    outputs = model(**batch, pixel_values=pixels, labels=labels)
    with torch.no_grad():
        embeds = by_hand(model, rows[1], pixels[1:], torch.tensor([rows[1]]).ne(tiny.IMAGE) & labels[1:].eq(-100))
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeds)[0])
    torch.testing.assert_close(outputs.logits[1], logits[0], rtol=1e-4, atol=1e-5)
    outputs.loss.backward()
    parts = {part_of(name) for name, p in model.named_parameters() if ".fusion." in name and p.grad.abs().sum() > 0}
    assert parts == {"projector"}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        again = loaded(**batch, pixel_values=pixels, labels=labels)
    torch.testing.assert_close(again.logits, outputs.logits, rtol=0, atol=0)
    skip_unlearned(loaded)
    torch.testing.assert_close(loaded(**batch, pixel_values=pixels, labels=labels).loss, outputs.loss)


def test_what_is_fused_is_the_prompts_words():
    images = torch.tensor([[False, True, False, False, False]])
    padded = torch.tensor([[1, 1, 1, 1, 0]])
    prompt = torch.tensor([[True, True, True]])
    assert words_of_prompt(images).tolist() == [[True, False, True, True, True]]
    assert words_of_prompt(images, padded).tolist() == [[True, False, True, True, False]]
    assert words_of_prompt(images, padded, prompt).tolist() == [[True, False, True, False, False]]
    seen = torch.zeros(1, 1, 5, 9).masked_fill(torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1]).bool(), -1e9)
    assert words_of_prompt(images, seen).tolist() == [[True, False, True, False, False]]
    assert words_of_prompt(images, seen == 0).tolist() == [[True, False, True, False, False]]


@pytest.mark.parametrize("text", ["mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_other_language_models_have_their_own_layers(text):
    model, (rows, pixels, _) = mini(text), prompts(((1,),))
    assert len(model.model.fusion.decoder.layers) == 2
    assert type(model.model.fusion.decoder.layers[0]) is type(model.model.language_model.layers[0])
    expected = model.lm_head(model.model.language_model(inputs_embeds=by_hand(model, rows[0], pixels))[0])
    torch.testing.assert_close(model(torch.tensor(rows), pixels).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(ValueError, match=r"types llama, mistral, qwen2, qwen3, not `gemma`; with 0 there is"):
        tiny.tiny_config(text="gemma", projector=MINI)
    with pytest.raises(ValueError, match="`visual_words` and `fusion_layers` exclude each other"):
        tiny.tiny_config(text="llama", projector=MINI, visual_words=[5, 6])
    model, (rows, pixels, _) = mini(), prompts(((1,),))
    inputs = {"input_ids": torch.tensor(rows), "pixel_values": pixels}
    with pytest.raises(ValueError, match="at once: leave out `prefill_chunk_size`"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=4, pad_token_id=0)
    cache = {tiny.CACHE: model(torch.tensor(tiny.words(3)), use_cache=True)[tiny.CACHE]}
    with pytest.raises(ValueError, match="at once: give all of it with its images, and an empty cache"):
        model(**inputs, **cache)
