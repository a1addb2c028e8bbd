"""Visual token reducers: what the originals chose, and how a whole model works with what is left.

tests/reference_reducers holds inputs and outputs of the authors' code.
"""

import json
import re
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors import safe_open
from tiny_models import IMAGE, collate, pixels, tiny_model, words
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, DynamicCache, LlamaConfig, LlamaModel

from ms_resampler import reducers_ms_resampler as reducers
from ms_resampler.reducers_ms_resampler import REDUCERS, TowerView, read_reducer
from ms_resampler.reducing_ms_resampler import TEXT, Cutting, next_tokens
from ms_resampler.training.liger import fuse_loss
from ms_resampler.training.loss import skip_unlearned

REFERENCES = Path(__file__).with_name("reference_reducers")


def reference(name):
    """The tensors of a file, floats as float32, and what they are."""
    with safe_open(REFERENCES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["meta"])
    return {key: x.float() if x.is_floating_point() else x for key, x in tensors.items()}, about


def reducer(kind, **settings):
    return read_reducer({"reducer_type": kind, **settings})


# Before the language model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "keep"), [("fastervlm_t58", 58), ("fastervlm_t36_batch2", 36)])
def test_fastervlm_is_the_original(name, keep):
    tensors, _ = reference(name)
    for attention_hP, kept in zip(tensors["in.cls_attn"], tensors["out.keep"], strict=True):
        assert reducer("fastervlm", keep=keep).choose(attention_hP).tolist() == kept.tolist()


@pytest.mark.parametrize(("name", "rate"), [("hired_llava15_r020", 0.2), ("hired_llava15_r010_n144", 0.1)])
def test_hired_is_the_original(name, rate):
    tensors, about = reference(name)
    query, keys = (tensors[key][0].unflatten(-1, (about["heads"], -1)) for key in ("in.q_cls", "in.k"))
    view = TowerView(x_PC=keys.flatten(1), q_hd=query, k_hPd=keys.transpose(0, 1))
    assert reducer("hired", keep=rate).choose(view.attention_hP).tolist() == tensors["out.keep"].tolist()


def test_hired_on_tiles_is_the_original():
    tensors, _ = reference("hired_next_r02_a05")
    rule = reducer("hired", keep=0.2)
    parts = [tensors[key].split(tensors["in.partitions"].tolist()) for key in ("in.top_cls_attn", "out.mask")]
    bottom = iter(tensors["in.bottom_cls_attn"])
    for first, mask in zip(*parts, strict=True):
        views = [Attended(next(bottom)) for _ in mask]
        found = rule.reduce_tiles(views, first[0])
        assert found.flatten().tolist() == torch.cat([row.nonzero().flatten() for row in mask]).tolist()


def test_hired_on_tiles_refuses_to_leave_nothing():
    views = [Attended(torch.rand(2, 10)) for _ in range(5)]
    assert len(reducer("hired", keep=2).reduce_tiles(views, torch.rand(2, 10))) >= 1
    with pytest.raises(ValueError, match="hired leaves nothing of 5 views if `keep` is 1"):
        reducer("hired", keep=1).reduce_tiles(views, torch.rand(2, 10))


class Attended:
    """A view whose features are the numbers of its patches, with a given attention."""

    def __init__(self, attention_hP):
        self.attention_hP, self.x_PC = attention_hP, torch.arange(-1, attention_hP.shape[1] - 1)[:, None]


@pytest.mark.parametrize("name", ["visionzip_d53_c10", "visionzip_d20_c7_batch2"])
def test_visionzip_is_the_original(name):
    tensors, about = reference(name)
    rows = zip(*(tensors[key] for key in ("in.features", "in.cls_attn", "in.key_mean", "out.tokens")), strict=True)
    for x_PC, attention_hP, key_Pd, tokens in rows:
        found = reducers.VisionZip.merge(x_PC, attention_hP, key_Pd, about["dominant"], about["contextual"])
        assert_close(found, tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("prumerge_adaptive", "prumerge", {}),
        ("prumerge_fixed_r0125_batch2", "prumerge", {"keep": 0.125}),
        ("prumerge_plus_adaptive", "prumerge_plus", {}),
    ],
)
def test_prumerge_is_the_original(name, kind, settings):
    tensors, _ = reference(name)
    for image, x_PC in enumerate(tensors["in.features"]):
        view = TowerView(x_PC=x_PC, q_hd=tensors["in.q"][image], k_hPd=tensors["in.k"][image][None])
        chosen = reducer(kind, **settings).choose(view.attention_hP[0, 1:])
        assert chosen.tolist() == tensors["out.keep_in_order"][image].tolist()
        assert_close(reducer(kind, **settings).reduce(view), tensors["out.tokens"][image], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "ratio"), [("divprune_r0098", 0.098), ("divprune_r025_n100", 0.25)])
def test_divprune_is_the_original(name, ratio):
    tensors, _ = reference(name)
    chosen = reducer("divprune", keep=ratio).choose(tensors["in.features"])
    assert chosen.tolist() == tensors["out.selected_in_order"].tolist()
    assert sorted(chosen.tolist()) == tensors["out.keep"].tolist()


@pytest.mark.parametrize("side", [12, 24])
def test_mustdrops_windows_and_key_set_are_the_original(side):
    tensors, _ = reference(f"mustdrop_vision_{side}")
    rule = reducer("mustdrop", keep=192)
    found = rule.merge_windows(tensors["in.hidden"][0], (side, side))
    assert_close(found[None], tensors["out.hidden"], rtol=0, atol=1e-5)
    attention_hP = tensors["in.cls_attn"][0]
    view = TowerView(attention_hP.mT, torch.ones(4, 1), attention_hP.log()[..., None])  # whose softmax is as given
    assert_close(view.attention_hP, attention_hP)
    assert rule.key_set(view).tolist() == tensors["out.key_set"].tolist()


# In the language model ----------------------------------------------------------------------------------------------

IN_LAYERS = {
    "fastv_k2_r05": ("fastv", {"keep": 0.5, "layer": 2}),
    "fastv_k3_r075_n144": ("fastv", {"keep": 36, "layer": 3}),
    "pyramiddrop_l246_n144": ("pyramiddrop", {"layers": [2, 4, 6]}),
    "pyramiddrop_l15_n100": ("pyramiddrop", {"layers": [1, 5], "shares": [0.7, 0.3]}),
    "dart_k2_m128": ("dart", {"keep": 128}),
    "dart_k3_m30_n144": ("dart", {"keep": 30, "layer": 3, "pivots": 2, "text_pivots": 3}),
    "sparsevlm_v1_n256": ("sparsevlm", {"layers": [2, 4, 6], "counts": [130, 80, 40]}),
    "sparsevlm_v1_n144": ("sparsevlm", {"layers": [1, 3, 6], "counts": [64, 30, 16]}),
    "sparsevlm_plus_n144": ("sparsevlm_plus", {"layers": [2, 4, 6], "counts": [72, 36, 18], "heads": 2}),
    "fitprune_r60": ("fitprune", {"deleted": [14, 33, 89, 36, 36, 20, 55, 21]}),
    "mustdrop_llm_n144": ("mustdrop", {"layers": [2, 4, 5, 6], "thresholds": [0.0055, 0.03]}),
    "mustdrop_llm_n100": ("mustdrop", {"layers": [1, 3, 5], "thresholds": [0.012, 0.06]}),
    "fitprune_r90": ("fitprune", {"deleted": [262, 153, 80, 19, 13, 1, 2, 0]}),
}


def test_fitprunes_schemes_are_the_originals():
    tensors, _ = reference("fitprune_schemes")
    schemes = zip(tensors["reduction_ratio"].tolist(), tensors["delete_per_layer"], strict=True)
    (nothing, deleted), *schemes = schemes
    assert nothing == deleted.sum() == 0
    assert [saved for saved, _ in schemes] == list(reducers.FITPRUNE)
    for saved, deleted in schemes:
        rule = reducer("fitprune", saved=saved)
        assert [rule.kept(layer, 576, 32) for layer in range(32)] == (576 - deleted.cumsum(0)).tolist()


def tiny_llama(attention):
    """The language model of the references."""
    tensors, about = reference("tiny_llama")
    model = LlamaModel(LlamaConfig(**about["config"], attn_implementation=attention)).eval()
    model.load_state_dict(
        {key.removeprefix("state."): x for key, x in tensors.items() if key.startswith("state.")}, strict=False
    )
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", IN_LAYERS)
def test_in_the_layers_it_is_the_original(name, attention, monkeypatch):
    """What is kept, the hidden states, the cache, and the next token on that cache."""
    tensors, about = reference(name)
    kind, settings = IN_LAYERS[name]
    if kind == "dart":  # a rule that the authors leave to chance: the order of a set
        order, take = tensors["out.pivot_visit_order"].long(), reducers.DART.take
        monkeypatch.setattr(reducers.DART, "take", lambda self, view, visual, _: take(self, view, visual, order))
    if kind == "sparsevlm":  # the same noise
        noises, merge = iter([tensors[f"in.noise{stage}"][0] for stage in range(3)]), reducers.merge_clusters
        monkeypatch.setattr(reducers, "merge_clusters", lambda x_ND, clusters, _: merge(x_ND, clusters, next(noises)))
    model, cache, embeds = tiny_llama(attention), DynamicCache(), tensors["in.embeds"]
    picture = torch.full(embeds.shape[:2], TEXT)
    picture[:, about["visual_start"] : about["visual_start"] + about["visual_len"]] = 0
    with torch.no_grad():
        key_sets = [tensors["in.key_set"]] if kind == "mustdrop" else None
        with Cutting(model, reducer(kind, **settings), embeds, picture, key_sets).hooked() as cutting:
            hidden = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        lengths = [cache.get_seq_length(layer) for layer in range(8)]
        with next_tokens(model, cache.kept):
            following = model(inputs_embeds=tensors["in.next_embed"], past_key_values=cache, use_cache=True)
    expected = tensors.get("out.hidden", tensors.get("out.hidden_text"))
    assert_close(hidden[:, -expected.shape[1] :], expected, rtol=0, atol=1e-5)
    assert_close(following.last_hidden_state, tensors["out.next_hidden"], rtol=0, atol=1e-5)
    assert lengths == tensors["out.cache_len"].tolist()
    if "sparsevlm" in kind:
        return  # its references number what is kept anew at every stage
    kept = tensors[max(key for key in tensors if key.startswith("out.keep"))].tolist()
    if kind == "fitprune":  # the original's last layer deletes, too, where nothing reads what is left
        assert set(kept) <= set(cutting.rows.index_BL[0].tolist())
    else:
        assert cutting.rows.index_BL[0].tolist() == kept


# In a whole model ---------------------------------------------------------------------------------------------------

KINDS = {
    "fastervlm": {"keep": 9},
    "hired": {"keep": 0.3},
    "visionzip": {"keep": 12},
    "prumerge": {"keep": 0.25},
    "prumerge_plus": {"keep": 0.25},
    "divprune": {"keep": 9},
    "fastv": {"keep": 9, "layer": 1},
    "pyramiddrop": {"layers": (1, 2, 3)},
    "dart": {"keep": 12, "layer": 1, "pivots": 2},
    "sparsevlm_plus": {"keep": 9, "layers": (0, 1, 2)},
    "fitprune": {"keep": 12},
    "mustdrop": {"layers": (0, 1, 2), "thresholds": (0.03, 0.06)},
}
DEEP = {"num_hidden_layers": 17}
IN_FIRST_LAYERS = ("fastv", "pyramiddrop", "dart", "sparsevlm", "sparsevlm_plus", "mustdrop")  # need three or more
LLAVA = {"projector": {"projector_type": "mlp", "visual_tokens": [6, 6]}, "text_changes": {"num_hidden_layers": 4}}


def plain_sums(weight, hidden, targets, cap):
    """The sum of losses, as Liger's kernel gives it."""
    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def whole_model(text="llama", attention="sdpa"):
    model = tiny_model(text=text, **LLAVA)
    model.set_attn_implementation(attention)
    return model


def rows_with_pictures():
    """Three prompts with one, no and two pictures, and which pictures these are."""
    text, picture = words(3, 12, 2, 4, 5, 8), [IMAGE] * 36
    rows = [text[0] + picture + text[2], text[1], text[3] + picture + text[4] + picture + text[5]]
    return rows, [slice(0, 1), slice(1, 1), slice(1, 3)]


def batch(side="left"):
    rows, _ = rows_with_pictures()
    return {**collate(rows, side), "pixel_values": pixels(3)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_prompt_gives_alone(kind, attention, side):
    model = whole_model(attention=attention).set_reducer(kind, **KINDS[kind])
    rows, images = rows_with_pictures()
    with torch.no_grad():
        prompt = batch(side)
        position_ids = (prompt["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # on which DART's choice depends
        together = model(**prompt, position_ids=position_ids)
        for number, (row, of_row) in enumerate(zip(rows, images, strict=True)):
            shown = {} if of_row.start == of_row.stop else {"pixel_values": pixels(3)[of_row]}
            alone = model(input_ids=torch.tensor([row]), **shown)
            places = together.kept_positions[number]
            found = together.logits[number, places >= 0] if side == "left" else together.logits[number]
            last = found[-1] if side == "left" else found[(places == len(row) - 1).nonzero().item()]
            assert_close(last, alone.logits[0, -1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "text"),
    [*product(KINDS, ["llama", "qwen2", "gemma3_text", "phi3"]), ("dart", "phi"), ("sparsevlm_plus", "phi")],
)
def test_batched_answers_are_single_ones_and_prompts_come_back_whole(kind, text):
    model = whole_model(text).set_reducer(kind, **KINDS[kind])
    rows, images = rows_with_pictures()
    prompt = batch()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**prompt, **options)
    length = prompt["input_ids"].shape[1]
    assert torch.equal(together.sequences[:, :length], prompt["input_ids"])
    assert together.sequences.shape == (3, length + 5)
    for number, (row, of_row) in enumerate(zip(rows, images, strict=True)):
        shown = {} if of_row.start == of_row.stop else {"pixel_values": pixels(3)[of_row]}
        alone = model.generate(torch.tensor([row]), **shown, **options)
        assert together.sequences[number, -5:].tolist() == alone.sequences[0, -5:].tolist()
        for found, expected in zip(together.logits, alone.logits, strict=True):
            assert_close(found[number], expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "cohere"])
def test_rows_of_attention_are_the_models_own(text, monkeypatch):
    """Recomputed with the scale, the norms and the cap of the model, for a batch with padding."""
    changes = {"num_hidden_layers": 3} | ({"attn_logit_softcapping": 0.1} if text == "gemma2" else {})
    model = tiny_model(text=text, projector=LLAVA["projector"], text_changes=changes)
    model.set_attn_implementation("eager")
    expected = model(**batch(), output_attentions=True).attentions[1][:, :, -1]
    seen, scores = [], reducers.FastV.scores
    monkeypatch.setattr(reducers.FastV, "scores", lambda self, view: seen.append(view) or scores(self, view))
    model.set_reducer("fastv", keep=4)(**batch())
    for view, row in zip(seen, [0, 2, 2], strict=True):  # a row has two pictures
        assert_close(view.attention(view.text[-1:])[:, 0], expected[row], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["fastv", "pyramiddrop", "dart", "sparsevlm", "sparsevlm_plus"])
def test_a_single_token_stays_where_one_word_asks(kind):
    layers = {key: value for key, value in KINDS.get(kind, {"layers": (0, 1, 2)}).items() if key in ("layer", "layers")}
    model = whole_model().set_reducer(kind, keep=1, **layers | ({"pivots": 1} if kind == "dart" else {}))
    text = words(3, 1)
    result = model(input_ids=torch.tensor([text[0] + [IMAGE] * 36 + text[1]]), pixel_values=pixels(1))
    places = result.kept_positions[0].tolist()
    assert places[:3] == [0, 1, 2]
    assert places[-1] == 39
    assert len(places) == (6 if kind == "sparsevlm" else 5)  # which has a merged one besides
    assert result.logits.isfinite().all()


def test_what_is_longer_than_a_sliding_window_is_refused():
    rows, _ = rows_with_pictures()
    prompt = {"input_ids": torch.tensor(rows[:1]), "pixel_values": pixels(1)}
    for window, new_tokens in ((40, 1), (43, 6)):
        changes = {"num_hidden_layers": 4, "sliding_window": window}
        model = tiny_model(text="gemma3_text", projector=LLAVA["projector"], text_changes=changes)
        model.set_reducer("fastv", **KINDS["fastv"])
        with pytest.raises(ValueError, match=f"at most {window} tokens here, the model's sliding window"):
            model.generate(**prompt, max_new_tokens=new_tokens, eos_token_id=-1)


@pytest.mark.parametrize("kind", ["visionzip", "divprune", "fastv", "pyramiddrop"])
def test_beams_and_sampling_work(kind):
    model = whole_model().set_reducer(kind, **KINDS[kind])
    beams = model.generate(
        **batch(), max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False, return_dict_in_generate=True
    )
    prompt = batch()["input_ids"]
    assert torch.equal(beams.sequences[:, : prompt.shape[1]], prompt.repeat_interleave(2, dim=0))
    torch.manual_seed(0)
    assert model.generate(**batch(), max_new_tokens=4, do_sample=True, eos_token_id=-1).shape[1] == prompt.shape[1] + 4


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("fastervlm", {"keep": 1.0}), ("hired", {"keep": 1.0}), ("divprune", {"keep": 36}), ("fastv", {"keep": 1.0}),
     ("pyramiddrop", {"layers": (1, 2, 3), "shares": (1.0, 1.0, 1.0)}), ("fitprune", {"deleted": (0, 0, 0, 0)})],
)  # fmt: skip
def test_where_all_tokens_stay_nothing_changes(kind, settings):
    model = whole_model()
    expected, real = model(**batch()).logits, batch()["attention_mask"].bool()
    found = model.set_reducer(kind, **settings)(**batch()).logits
    assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.set_reducer(None)(**batch()).logits, expected)


@pytest.mark.parametrize("kind", ["fastv", "pyramiddrop", "fitprune"])
def test_what_was_dropped_is_not_in_the_cache(kind):
    model = whole_model().set_reducer(kind, **KINDS[kind])
    rows, _ = rows_with_pictures()
    cache = model(input_ids=torch.tensor(rows[:1]), pixel_values=pixels(1), use_cache=True).past_key_values
    lengths = [cache.get_seq_length(layer) for layer in range(4)]
    assert lengths[0] == len(rows[0])
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < len(rows[0]) - 18


@pytest.mark.parametrize("kind", ["visionzip", "divprune", "fastv"])
def test_the_loss_is_that_of_the_text_and_everything_around_learns(kind):
    model = whole_model().set_reducer(kind, **KINDS[kind])
    before, answer = words(3, 9)
    ids = torch.tensor([before + [IMAGE] * 36 + answer])
    labels = ids.masked_fill(torch.arange(48) < 41, -100)
    result = model(input_ids=ids, pixel_values=pixels(1), labels=labels)
    logits = result.logits[0, result.kept_positions[0] >= 40][:-1]
    assert_close(result.loss, torch.nn.functional.cross_entropy(logits, ids[0, 41:]))
    result.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.projector.parameters())


@pytest.mark.parametrize("kind", ["visionzip", "divprune", "fastv", "mustdrop"])
def test_embeddings_give_what_ids_give(kind):
    model, prompt = whole_model().set_reducer(kind, **KINDS[kind]), batch()
    exact = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(**prompt, **exact)[:, -4:]
    ids = prompt.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        logits = model(input_ids=ids, **prompt).logits
        assert_close(model(inputs_embeds=embeds, **prompt).logits, logits)
    assert torch.equal(model.generate(inputs_embeds=embeds, **prompt, **exact), expected)


def test_checkpointing_is_refused_in_the_layers():
    model = whole_model().set_reducer("fastv", **KINDS["fastv"]).train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing; switch it off"):
        model(**batch(), labels=batch()["input_ids"])


@pytest.mark.parametrize("kind", ["fastervlm", "hired", "visionzip", "prumerge", "prumerge_plus", "divprune"])
@pytest.mark.parametrize("keep", [1, 2, 7, 36])
def test_a_count_is_exact(kind, keep):
    images = whole_model().set_reducer(kind, keep=keep).get_image_features(pixels(2), return_dict=True)
    assert [len(tokens) for tokens in images.pooler_output] == [keep, keep]


def test_a_reducer_is_saved_with_the_model(tmp_path):
    model = whole_model().set_reducer("pyramiddrop", layers=(1, 2, 3), keep=4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.reducer == model.reducer
    assert_close(loaded(**batch()).logits, model(**batch()).logits)


def test_after_a_trained_projector_its_tokens_are_reduced():
    model = tiny_model(projector={"projector_type": "token_packer", "visual_tokens": [3, 3]})
    model.set_reducer("divprune", keep=4)
    ids = torch.tensor([words(3)[0] + [IMAGE] * 9 + words(2)[0]])
    result = model(input_ids=ids, pixel_values=pixels(1))
    assert result.logits.shape[1] == ids.shape[1] - 5
    assert result.image_hidden_states.shape[0] == 4


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("divprune", {"keep": 0}, "at least 1"),
        ("divprune", {"keep": 1.5}, r"no share in \(0, 1\]"),
        ("divprune", {"keep": True}, "a number of visual tokens or a share"),
        ("divprune", {}, "divprune needs `keep`"),
        (None, {"keep": 2}, "Without a reducer there is no `keep`"),
        (["fastv"], {"keep": 2}, r"There is no `reducer_type` \['fastv'\]"),
        ("divprun", {"keep": 2}, "There is no `reducer_type` 'divprun'; did you mean `divprune`?"),
        ("nothing", {"keep": 2}, "There is no `reducer_type` 'nothing'; use one of fastervlm, hired, "),
        ("divprune", {"keep": 2, "layer": 3}, "divprune has no setting `layer`; it has keep."),
        ("fastv", {"keep": 2, "layers": 3}, "fastv has no setting `layers`; did you mean `layer`?"),
        ("fastv", {"keep": 2, "layer": "3"}, "`layer` of fastv is a whole number from 0 on, got '3'"),
        ("fastv", {"keep": 2, "layer": True}, "`layer` of fastv is a whole number from 0 on, got True"),
        ("fastv", {"keep": 2, "layer": 2.0}, "`layer` of fastv is a whole number from 0 on, got 2.0"),
        ("visionzip", {"keep": 2, "contextual": -1}, "`contextual` of visionzip is a whole number from 0 on"),
        ("dart", {"keep": 2, "pivots": 0}, "`pivots` of dart is a whole number from 1 on, got 0"),
        ("hired", {"keep": 2, "overview": "half"}, "`overview` of hired is a number from 0 on, got 'half'"),
        ("hired", {"keep": 2, "overview": 1}, "`overview` is a share between 0 and 1"),
        ("sparsevlm_plus", {"keep": 2, "heads": 0}, "`heads` of sparsevlm_plus is a whole number from 1 on"),
        ("sparsevlm", {"counts": 4}, "`counts` of sparsevlm is a list of whole numbers from 1 on, got 4"),
        ("sparsevlm", {"counts": [3, 0, 1]}, "`counts` of sparsevlm is a list of whole numbers from 1 on"),
        ("sparsevlm", {"counts": [3, 2, 1], "keep": 2}, "`keep` and `counts` of sparsevlm exclude each other"),
        ("pyramiddrop", {"layers": []}, "`layers` of pyramiddrop is a list of whole numbers from 0 on"),
        ("pyramiddrop", {"layers": (1, 2, 3), "shares": [0.5, 1.5, 0.1]}, r"`shares` of pyramiddrop are in \(0, 1\]"),
        ("mustdrop", {"thresholds": [0.1]}, "`thresholds` of mustdrop is a list of 2 numbers from 0 on"),
        ("fitprune", {"saved": 65}, "fitprune has no scheme for `saved` 65; use 10, 20"),
        ("fitprune", {"saved": 60, "deleted": [1, 1, 1, 1]}, "`saved` and `deleted` of fitprune exclude each other"),
        ("fastv", {"keep": 2, "layer": 4}, "the language model has 4 layers"),
        ("fastv", {"keep": 2, "layer": 0}, "the language model has 4 layers"),
        ("pyramiddrop", {"layers": (1, 2)}, "2 `layers` and 3 `shares`"),
        ("fitprune", {"deleted": (1, 2)}, "2 numbers in `deleted`, for 4 layers"),
        ("mustdrop", {"keep": 100}, "give `thresholds`"),
    ],
)
def test_what_cannot_be_is_refused(kind, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        whole_model().set_reducer(kind, **settings)


def test_more_than_there_is_cannot_be_deleted():
    model = whole_model().set_reducer("fitprune", deleted=[20, 16, 0, 0])
    with pytest.raises(ValueError, match="fitprune cannot delete 36 of 36 visual tokens"):
        model(**batch())


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"mustdrop"}))
def test_more_than_there_is_cannot_be_kept(kind):
    layers = {key: value for key, value in KINDS[kind].items() if key in ("layer", "layers")}
    with pytest.raises(ValueError, match=f"{kind} cannot keep 37 of 36 visual tokens"):
        whole_model().set_reducer(kind, keep=37, **layers)(**batch())


@pytest.mark.parametrize("kind", ["prumerge", "prumerge_plus"])
def test_of_a_share_below_one_patch_the_token_of_the_rest_is_left(kind):
    features = whole_model().set_reducer(kind, keep=0.001).get_image_features(pixels(1), return_dict=True)
    assert [len(tokens) for tokens in features.pooler_output] == [1]


@pytest.mark.parametrize(("kind", "share", "tokens"), [("prumerge", 1.0, 37), ("prumerge_plus", 0.6, 57)])
def test_shares_of_which_merging_makes_more_tokens_are_refused(kind, share, tokens):
    with pytest.raises(ValueError, match=f"{kind} makes {tokens} tokens of 36 patches"):
        whole_model().set_reducer(kind, keep=share).get_image_features(pixels(1))


@pytest.mark.parametrize("kind", ["fastervlm", "visionzip", "prumerge", "divprune"])
def test_before_the_language_model_a_static_cache_holds_what_is_left(kind):
    model = whole_model().set_reducer(kind, **KINDS[kind])
    exact = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "disable_compile": True}
    expected = model.generate(**batch(), **exact)
    assert torch.equal(model.generate(**batch(), **exact, cache_implementation="static"), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sparsevlm_merges_in_a_batch_as_alone(side, monkeypatch):
    merge = reducers.merge_clusters
    monkeypatch.setattr(reducers, "merge_clusters", lambda x_ND, clusters, noise_N: merge(x_ND, clusters, 0 * noise_N))
    model = whole_model().set_reducer("sparsevlm", keep=9, layers=(0, 1, 2))
    rows, images = rows_with_pictures()
    with torch.no_grad():
        prompt = batch(side)
        together = model(**prompt)
        length = prompt["input_ids"].shape[1]
        for number, (row, of_row) in enumerate(zip(rows, images, strict=True)):
            shown = {} if of_row.start == of_row.stop else {"pixel_values": pixels(3)[of_row]}
            alone = model(input_ids=torch.tensor([row]), **shown)
            end = length if side == "left" else len(row)
            last = (together.kept_positions[number] == end - 1).nonzero().item()
            assert_close(together.logits[number, last], alone.logits[0, -1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tower", ["clip_vision_model", "vit", "dinov2", "dinov2_with_registers"])
def test_towers_with_a_cls_token_are_read(tower):
    """The patches that stay are those that the tower's own attention weights say."""
    model = tiny_model(tower, **LLAVA)
    model.set_attn_implementation("eager")
    expected = model.get_image_features(pixels(2), output_attentions=True, return_dict=True)
    layer = model.config.feature_layers[0] % 4 - 1
    score_BN = expected.attentions[layer][:, :, 0].mean(1)[:, model.model.tower_shape.prefix_tokens :]
    reduced = model.set_reducer("fastervlm", keep=9).get_image_features(pixels(2), return_dict=True)
    for tokens, whole, score_N in zip(reduced.pooler_output, expected.pooler_output, score_BN, strict=True):
        assert_close(tokens, whole[score_N.topk(9).indices.sort().values])


@pytest.mark.parametrize("make", [skip_unlearned, partial(fuse_loss, fused=plain_sums)])
@pytest.mark.parametrize("kind", ["divprune", "fastv"])
def test_losses_of_training_are_those_of_the_model(kind, make):
    model = whole_model().set_reducer(kind, **KINDS[kind])
    labels = batch()["input_ids"].masked_fill(batch()["attention_mask"] == 0, -100)
    expected = model(**batch(), labels=labels).loss
    make(model)
    assert_close(model(**batch(), labels=labels).loss, expected)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot read the attention of the vision tower `dinov3_vit`"):
        tiny_model("dinov3_vit", **LLAVA).set_reducer("fastervlm", keep=4)
    with pytest.raises(ValueError, match="siglip_vision_model` has none"):
        tiny_model("siglip_vision_model", **LLAVA).set_reducer("fastervlm", keep=4)
    with pytest.raises(ValueError, match="one token a patch"):
        tiny_model().set_reducer("visionzip", keep=4)
    with pytest.raises(ValueError, match="layers as Llama has them"):
        tiny_model(text="gpt2").set_reducer("fastv", keep=4, layer=1)
    with pytest.raises(ValueError, match="`falcon_h1` has others"):  # state spaces beside the attention
        tiny_model(text="falcon_h1").set_reducer("fastv", keep=4, layer=1)
    model = whole_model().set_reducer("fastv", keep=4)
    with pytest.raises(ValueError, match="static cache"):
        model.generate(**batch(), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="fastv chooses once"):
        model.generate(**batch(), use_cache=False, max_new_tokens=2)


def test_a_second_turn_reads_what_the_first_left():
    model = whole_model().set_reducer("pyramiddrop", **KINDS["pyramiddrop"])
    text, more = words(4, 3)
    row = [IMAGE] * 36 + text
    cache = model(input_ids=torch.tensor([row, row]), pixel_values=pixels(2), use_cache=True).past_key_values
    mask = torch.ones(2, len(row) + 3, dtype=torch.long)
    mask[0, len(row)] = 0
    with pytest.raises(ValueError, match="cannot have padding"):
        model(input_ids=torch.tensor([more, more]), attention_mask=mask, past_key_values=cache)
    with torch.no_grad():
        at_once = model(input_ids=torch.tensor([more, more]), past_key_values=cache).logits
        cache = model(input_ids=torch.tensor([row, row]), pixel_values=pixels(2), use_cache=True).past_key_values
        for place, token in enumerate(more):
            found = model(input_ids=torch.tensor([[token], [token]]), past_key_values=cache).logits[:, 0]
            assert_close(found, at_once[:, place], rtol=1e-4, atol=1e-5)


def refused(model, kind, keep):
    """Whether a model refuses a reducer, when it is set or when it runs."""
    try:
        model.set_reducer(kind, keep=keep)
        with torch.no_grad():
            prompt = {"input_ids": torch.tensor([words(3)[0] + [IMAGE] * 36 + words(4)[0]]), "pixel_values": pixels(1)}
            assert model(**prompt).logits.isfinite().all()
    except ValueError:
        return True
    finally:
        model.set_reducer(None)
    return False


@pytest.mark.parametrize(
    ("tower", "text", "layers", "fit"),
    [
        ("clip_vision_model", "llama", 17, set(REDUCERS)),
        ("clip_vision_model", "llama", 2, set(REDUCERS) - set(IN_FIRST_LAYERS)),
        ("siglip_vision_model", "qwen2", 17, {"divprune", *IN_FIRST_LAYERS, "fitprune"} - {"mustdrop"}),
        ("siglip_vision_model", "gpt2", 4, {"divprune"}),
    ],
)
def test_what_fits_a_model_runs_and_the_rest_is_refused(tower, text, layers, fit):
    kept = {"mustdrop": 64}
    changes = {"num_hidden_layers": layers} if text != "gpt2" else {"n_layer": layers}
    model = tiny_model(tower, text=text, projector=LLAVA["projector"], text_changes=changes)
    found = model.fitting_reducers([4, 36])
    assert set(found) == fit - set(kept)
    assert {name: [one.keep for one in fitting] for name, fitting in found.items()} == {name: [4, 36] for name in found}
    assert {name for name in REDUCERS if not refused(model, name, kept.get(name, 4))} == fit


def test_mustdrop_fits_at_its_own_counts_and_where_windows_are_whole():
    def at(side):
        tower = {"image_size": 4 * side}
        projector = {"projector_type": "mlp", "visual_tokens": [side, side]}
        model = tiny_model(text="llama", tower_changes=tower, projector=projector, text_changes=DEEP)
        return {name: [one.keep for one in fitting] for name, fitting in model.fitting_reducers([9, 64, 128]).items()}

    assert at(9)["mustdrop"] == [64]  # of 81 tokens
    assert at(12)["mustdrop"] == [64, 128]
    assert "mustdrop" not in at(10)
    assert not {"prumerge", "prumerge_plus"} & set(at(5))  # they merge 32 patches into one
    assert at(5)["fastervlm"] == [9]


def test_none_fits_in_layers_with_a_window_shorter_than_a_picture():
    changes = {"num_hidden_layers": 4, "sliding_window": 30}
    model = tiny_model(text="gemma3_text", projector=LLAVA["projector"], text_changes=changes)
    assert not any(one.in_layers for fitting in model.fitting_reducers([4]).values() for one in fitting)


def test_none_fits_before_pre_fusion():
    fields = {"projector_type": "llava_mini", "fusion_layers": 1, "query_grid": [2, 2], "visual_tokens": 4}
    model = tiny_model(text="llama", projector=fields, text_changes={"num_hidden_layers": 4})
    assert set(model.fitting_reducers([2])) == {"fastv", "pyramiddrop", "dart", "fitprune"}


def test_the_places_of_what_a_tower_reducer_chose_are_told():
    model = whole_model()
    whole = model.get_image_features(pixels(2), return_dict=True).pooler_output
    for kind in ("fastervlm", "hired", "divprune"):
        reduced = model.set_reducer(kind, keep=9).get_image_features(pixels(2), return_dict=True)
        for tokens, kept, all_tokens in zip(reduced.pooler_output, reduced.kept_tokens, whole, strict=True):
            assert_close(tokens, all_tokens[kept])
    merged = model.set_reducer("visionzip", keep=9).get_image_features(pixels(2), return_dict=True)
    assert merged.kept_tokens is None


def test_every_reducer_is_described_and_known():
    purposes = {read_reducer({"reducer_type": name, **KINDS.get(name, {"keep": 64})}).purpose for name in REDUCERS}
    assert len(purposes) == len(REDUCERS)
    for purpose in purposes:
        assert re.fullmatch(r"The [^`.]+ \(\S.+(arXiv \d{4}\.\d{5}|SparseVLM's later code)\)\.", purpose), purpose
    assert reducer("divprune", keep=1).purpose == (
        "The tokens that are least alike, in raster order (DivPrune, arXiv 2503.02175)."
    )
    assert set(KINDS) | {"sparsevlm"} == set(REDUCERS)  # whose noise makes it differ from run to run
    config = tiny_models.tiny_config(reducer_config={"reducer_type": "divprune", "keep": 2})
    assert read_reducer(config.reducer_config).count(4) == 2
