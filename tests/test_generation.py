"""generate(): every way of decoding against the plainest one, the whole text again for every token."""

from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from components import save_llm, save_tower
from tiny_models import ragged_batch, ragged_rows
from tiny_runs import make_start, options_in, small
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, StaticCache, pipeline

from ms_resampler import TINY
from ms_resampler.training.run import train
from ms_resampler_cli.main import main

NEW, END = 8, 2
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@torch.no_grad()
def by_hand(model, inputs: dict, new: int = NEW) -> torch.Tensor:
    """The likeliest `new` tokens after each prompt, from the whole text at every step; no cache, no generate.

    Neither the end token, which `min_new_tokens` forbids, nor the image token, which is no answer, is taken.
    """
    inputs = dict(inputs)
    for _ in range(new):
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        scores = model(**inputs, position_ids=positions, use_cache=False).logits[:, -1]
        scores[:, [END, tiny.IMAGE]] = -torch.inf
        token = scores.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
    return inputs["input_ids"][:, -new:]


def answers(model, inputs: dict, **options) -> torch.Tensor:
    return model.generate(**inputs, **GREEDY | options)[:, inputs["input_ids"].shape[1] :]


def one_prompt() -> dict[str, torch.Tensor]:
    """The prompt with three images of different budgets."""
    rows, images, grids, owned = ragged_rows()
    return {**tiny.collate([rows[2]]), "pixel_values": images[owned[2]], "token_grids": grids[owned[2]]}


@pytest.fixture(scope="module")
def expected(model) -> torch.Tensor:
    """What the ragged batch (one, no, three and one images; different budgets) must be answered."""
    return by_hand(model, ragged_batch())


@pytest.mark.parametrize("text", ["llama", "qwen3", "gemma2"])
def test_greedy_equals_the_likeliest_token_of_the_whole_text(text):
    other = tiny.tiny_model(text=text)
    got = answers(other, ragged_batch())
    assert got.unique().numel() > 1
    assert_close(got, by_hand(other, ragged_batch()))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 1},
        {"num_beams": 1, "return_dict_in_generate": False},
    ],
    ids=["no-cache", "static", "chunks-of-5", "chunks-of-1", "plain"],
)
def test_caches_and_chunks_do_not_change_the_answer(model, expected, options):
    assert_close(answers(model, ragged_batch(), **options), expected)


def test_texts_without_any_image(model):
    text = tiny.collate(tiny.words(9, 4))
    assert_close(answers(model, text), by_hand(model, text))


def test_prompt_lookup_equals_greedy(model):
    """The prompt ends in an image token, so that its first guess would be more of them."""
    prompt = one_prompt()
    assert prompt["input_ids"][0, -1] == tiny.IMAGE
    assert_close(answers(model, prompt, prompt_lookup_num_tokens=3), by_hand(model, prompt))


@pytest.mark.parametrize("assistant", ["itself", "another"])
def test_assisted_equals_greedy(model, assistant):
    helper = model if assistant == "itself" else tiny.tiny_model(text_changes={"num_hidden_layers": 1})
    prompt = one_prompt()
    assert_close(answers(model, prompt, assistant_model=helper), by_hand(model, prompt))


def test_embeddings_and_pixels(model, expected):
    batch = ragged_batch()
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    assert_close(model.generate(inputs_embeds=embeds, **batch, **GREEDY), expected)


def test_images_encoded_before(model, expected):
    batch = ragged_batch()
    with torch.no_grad():
        images = model.get_image_features(batch.pop("pixel_values"), token_grids=batch.pop("token_grids"))
    assert_close(answers(model, batch, mm_encoder_outputs={"image": images}), expected)


def test_images_encoded_before_and_pixels_are_refused(model):
    prompt = one_prompt()
    images = model.get_image_features(prompt["pixel_values"], token_grids=prompt["token_grids"])
    with pytest.raises(ValueError, match="cannot pass both"):
        model.generate(**prompt, mm_encoder_outputs={"image": images}, max_new_tokens=1)


def test_the_image_token_is_never_an_answer(tmp_path):
    """Even if the model thinks so; saved settings keep it that way."""
    model = tiny.tiny_model(text_changes={"tie_word_embeddings": False})
    text = tiny.collate(tiny.words(6))
    with torch.no_grad():
        model.lm_head.weight[tiny.IMAGE] = 100 * model.model(**text).last_hidden_state[0, -1]
        assert model(**text).logits[0, -1].argmax() == tiny.IMAGE
    assert tiny.IMAGE not in answers(model, text)
    model.save_pretrained(tmp_path)
    assert tiny.IMAGE not in answers(type(model).from_pretrained(tmp_path), text)


def test_images_are_encoded_once(model):
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    answers(model, ragged_batch(), num_beams=3)
    hook.remove()
    assert seen == [5]


def test_images_of_one_budget_are_projected_together_unpadded(model):
    """Five images of four budgets: four calls, in which every token is one that was asked for; then no more calls."""
    calls = []
    hook = model.model.projector.register_forward_hook(
        lambda _, args, out: calls.append((len(args[0]), args[2], tuple(out[0].shape[:2])))
    )
    answers(model, ragged_batch())
    hook.remove()
    assert calls == [(2, (2, 2), (2, 4)), (1, (1, 2), (1, 2)), (1, (2, 3), (1, 6)), (1, (1, 1), (1, 1))]


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_in_a_batch_equal_beams_alone(model, beams):
    rows, images, grids, owned = ragged_rows()
    options = {"num_beams": beams, "num_return_sequences": 2}
    together = answers(model, ragged_batch(), **options)
    for n, (row, own) in enumerate(zip(rows, owned, strict=True)):
        alone = tiny.collate([row])
        if images[own].numel():
            alone |= {"pixel_values": images[own], "token_grids": grids[own]}
        assert_close(together[2 * n : 2 * n + 2], answers(model, alone, **options))


@torch.no_grad()
def test_beams_find_what_a_search_by_hand_finds(model):
    """Two steps of search with five beams: the likeliest pair among the followers of the five first words."""
    prompt = one_prompt()
    first = model(**prompt).logits[:, -1].log_softmax(-1)[0]
    first[[END, tiny.IMAGE]] = -torch.inf
    best, kept = (-torch.inf, None), first.topk(5)
    for score, token in zip(*kept, strict=True):
        step = {**prompt, "input_ids": torch.cat([prompt["input_ids"], token.view(1, 1)], 1)}
        step["attention_mask"] = torch.ones_like(step["input_ids"])
        second = model(**step).logits[:, -1].log_softmax(-1)[0]
        second[[END, tiny.IMAGE]] = -torch.inf
        total, word = (score + second).max(0)
        best = max(best, (total.item(), [token.item(), word.item()]))
    got = answers(model, prompt, num_beams=5, max_new_tokens=2, min_new_tokens=2)
    assert got.tolist() == [best[1]]


def test_several_samples_of_a_prompt_equal_the_prompt_repeated(model):
    """The images of a prompt go with every one of its copies, in order."""
    rows, images, grids, owned = ragged_rows()
    copies = tiny.collate([row for row in rows for _ in range(2)])
    order = [n for own in owned for _ in range(2) for n in range(own.start, own.stop)]
    copies |= {"pixel_values": images[order], "token_grids": grids[order]}
    drawn = {"do_sample": True, "top_k": 20}
    torch.manual_seed(3)
    got = answers(model, ragged_batch(), num_return_sequences=2, **drawn)
    torch.manual_seed(3)
    assert_close(got, answers(model, copies, **drawn))


@torch.no_grad()
def test_a_second_turn_continues_the_cache(model):
    """The second turn brings an image of its own; the first turn's are in the cache already."""
    rows, images, grids, _ = ragged_rows()
    cache = DynamicCache(config=model.config.text_config)
    first = {**tiny.collate([rows[0]]), "pixel_values": images[:1], "token_grids": grids[:1]}
    said = model.generate(**first, **{tiny.CACHE: cache}, **GREEDY)
    second_ids = torch.cat([said, torch.tensor([rows[3]])], dim=1)
    mask = torch.ones_like(second_ids)
    again = model.generate(
        input_ids=second_ids,
        attention_mask=mask,
        pixel_values=images[4:],
        token_grids=grids[4:],
        **{tiny.CACHE: cache},
        **GREEDY,
    )
    everything = {
        "input_ids": second_ids,
        "attention_mask": mask,
        "pixel_values": images[[0, 4]],
        "token_grids": grids[[0, 4]],
    }
    assert_close(again[:, -NEW:], by_hand(model, everything))


def test_siglip2_patches_of_different_grids():
    other = tiny.tiny_model("siglip2_vision_model")
    processor = tiny.tiny_processor("siglip2_vision_model")
    pictures = [tiny.picture(0, (24, 24)), tiny.picture(1, (20, 60))]
    batch = dict(
        processor(
            images=pictures,
            text=["<image>a", "what is this? <image>"],
            visual_tokens=[4, (2, 3)],
            return_tensors="pt",
        )
    )
    together = answers(other, batch)
    assert_close(together, by_hand(other, batch))
    assert_close(answers(other, batch, num_beams=2, num_return_sequences=1).shape, together.shape)


def test_the_language_models_own_generation_settings_end_the_text(model):
    """eos and pad come from the language model's configuration."""
    assert model.generation_config.eos_token_id == END
    assert model.generation_config.pad_token_id == 0


def test_scores_are_those_of_forward(model):
    prompt = one_prompt()
    out = model.generate(**prompt, **GREEDY, return_dict_in_generate=True, output_logits=True)
    text = {**prompt, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    with torch.no_grad():
        logits = model(**text).logits[:, prompt["input_ids"].shape[1] - 1 : -1]
    assert_close(torch.stack(out.logits, dim=1), logits, atol=1e-5, rtol=1e-5)


# --- batches by the defaults: nobody sets a side


QUESTIONS = [
    [{"type": "image", "image": tiny.picture(0)}, {"type": "text", "text": "What is in the picture?"}],
    [{"type": "text", "text": "Hi"}],
    [{"type": "image", "image": tiny.picture(n)} for n in (1, 2)] + [{"type": "text", "text": "And now?"}],
]


def assert_a_batch_is_answered_as_one_at_a_time(model, processor):
    """By `generate`, in every score of every token, and by the pipeline."""
    conversations = [[{"role": "user", "content": content}] for content in QUESTIONS]
    greedy = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}

    def ask(asked: list) -> tuple[list[str], torch.Tensor]:
        inputs = processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**inputs, **greedy, return_dict_in_generate=True, output_logits=True)
        texts = processor.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts, torch.stack(out.logits, dim=1)

    alone = [ask([conversation]) for conversation in conversations]
    texts, logits = ask(conversations)
    assert texts == [text for (text,), _ in alone]
    assert_close(logits, torch.cat([scores for _, scores in alone]), atol=1e-4, rtol=1e-4)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    pictured = [conversations[0], conversations[2]]  # the pipeline joins only inputs with the same keys
    replies = pipe(pictured, batch_size=2, generate_kwargs=greedy, return_full_text=False)
    assert [reply[0]["generated_text"] for reply in replies] == [texts[0], texts[2]]


@pytest.mark.parametrize("text", tiny.LANGUAGE_MODELS)
def test_batches_are_answered_as_one_at_a_time(text):
    assert_a_batch_is_answered_as_one_at_a_time(tiny.tiny_model(text=text), tiny.tiny_processor())


def made_by_init(folder: Path) -> Path:
    parts = ["--vision", str(save_tower(folder / "tower")), "--llm", str(save_llm(folder / "llm", "llama_3", "llama"))]
    small = ["--visual-tokens", "4", "--set", "hidden_size=16", "--set", "num_attention_heads=4"]
    assert main(["init", *parts, *small, "--out", str(folder / "made")]) == 0
    return folder / "made"


def made_by_convert(folder: Path) -> Path:
    made = made_by_init(folder)
    settings = made / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"left"', '"right"'))  # as earlier code saved it
    assert main(["convert", str(made), str(folder / "converted"), "--projector", "resampler"]) == 0
    return folder / "converted"


def made_by_train(folder: Path) -> Path:
    train(small("instruct", steps=1, save_steps=1), **options_in(make_start(folder, records=4), folder / "run"))
    return folder / "run" / "model"


def made_by_export(folder: Path) -> Path:
    assert main(["export", str(folder / "tiny")]) == 0
    return folder / "tiny"


@pytest.mark.parametrize(
    "make",
    [
        lambda _: TINY,
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in (made_by_init, made_by_convert, made_by_train, made_by_export)
        ),
    ],
    ids=["embedded", "init", "convert", "train", "export"],
)
def test_batches_of_every_saved_folder_are_answered_as_one_at_a_time(make, tmp_path, capsys):
    folder = make(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert_a_batch_is_answered_as_one_at_a_time(model, AutoProcessor.from_pretrained(folder))


# --- torch.compile (the first call of a model is left to eager: there transformers installs its hooks, behind a lock)


def prompt_of(words: int, images: int = 1) -> dict[str, torch.Tensor]:
    rows = [[7] * words + [tiny.IMAGE] * 4 + [9, 8]] * images
    return {"input_ids": torch.tensor(rows), "pixel_values": tiny.pixels(images)}


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["siglip2_vision_model", "dinov3_vit", "convnext"])
@torch.no_grad()
def test_forward_is_one_graph_compiled_once_a_budget(tower):
    torch._dynamo.reset()
    model, counter = tiny.tiny_model(tower), CompileCounter()
    model(**prompt_of(3))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for words in (3, 3, 5, 6, 11):  # the second length makes the length a symbol
        assert_close(compiled(**prompt_of(words)).logits, model(**prompt_of(words)).logits, atol=1e-5, rtol=1e-5)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 2]


@pytest.mark.slow
@torch.no_grad()
def test_sizes_and_budgets_are_compiled_once_each(model):
    torch._dynamo.reset()
    counter = CompileCounter()
    model.get_image_features(tiny.pixels())
    compiled = torch.compile(model.get_image_features, backend=counter, fullgraph=True)
    sizes = [(24, 24), (16, 24), (24, 16), (24, 24), (24, 16)]
    for size in sizes:
        expected = model.get_image_features(tiny.pixels(1, size)).pooler_output[0]
        assert_close(compiled(tiny.pixels(1, size)).pooler_output[0], expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == len(set(sizes))


@pytest.mark.slow
@torch.no_grad()
def test_a_prompt_with_mixed_budgets_is_one_graph_compiled_once(model):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for grids in ([(2, 2), (2, 3)], [(2, 2), (1, 2)], [(1, 2), (1, 2)], [(2, 2), (2, 3)], [(1, 2), (1, 2)]):
        ids = [token for rows, columns in grids for token in [7, *[tiny.IMAGE] * (rows * columns), 9]]
        prompt = {"input_ids": torch.tensor([ids]), "pixel_values": tiny.pixels(2)}
        expected = model(**prompt, token_grids=torch.tensor(grids)).logits
        with torch._dynamo.config.patch(error_on_recompile=len(frames) >= 3):
            assert_close(compiled(**prompt, token_grids=grids).logits, expected, atol=1e-5, rtol=1e-5)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 3, 3, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about torch
@torch.no_grad()
def test_compiled_to_machine_code(model):
    torch._dynamo.reset()
    expected = model(**prompt_of(3)).logits
    assert_close(torch.compile(model, fullgraph=True)(**prompt_of(3)).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_decoding_with_a_static_cache_is_one_graph(model):
    """What generate() compiles by itself on a GPU: prompts in eager, then one token at a time."""
    torch._dynamo.reset()
    prompt, cache, counter = one_prompt(), StaticCache(model.config.text_config, max_cache_len=32), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = by_hand(model, prompt, new=5)
    length, said = prompt["input_ids"].shape[1], []
    scores = model(**prompt, **{tiny.CACHE: cache}).logits[:, -1]
    for n in range(5):
        scores[:, [END, tiny.IMAGE]] = -torch.inf
        said.append(scores.argmax(-1, keepdim=True))
        position = torch.tensor([[length + n]])
        scores = compiled(input_ids=said[-1], position_ids=position, **{tiny.CACHE: cache}).logits[:, -1]
    assert_close(torch.cat(said, dim=1), expected)
    assert counter.frame_count <= 2
