"""LLaVA-NeXT and LLaVA-OneVision: converted, they answer as transformers' classes do, tiles and newlines included."""

import json

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import ms_resampler
from ms_resampler.conversion.comparison import largest_difference
from ms_resampler.conversion.convert import plan_conversion
from ms_resampler.conversion.from_llava import NEWLINE
from ms_resampler.evaluation.answering import LocalModel

SIDE = tiny.IMAGE_SIZE
PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
SIZES = [(24, 24), (20, 20), (40, 23), (60, 60), (30, 100), (100, 45), (64, 49)]
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory):
    """A small LLaVA-NeXT, as transformers saves it; its grids have one of a single tile."""
    folder = tmp_path_factory.mktemp("llava_next")
    torch.manual_seed(0)
    parts = {"vision_config": tiny.tower_config(), "text_config": tiny.text_config("llama"), "image_token_id": 3}
    config = LlavaNextConfig(**parts, image_grid_pinpoints=PINPOINTS)
    tiny.loud(LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    LlavaNextProcessor(
        images,
        tiny.tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=tiny.CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    """A small LLaVA-OneVision with tied embeddings, for at most 9 tiles, and what its processor needs."""
    folder = tmp_path_factory.mktemp("onevision")
    torch.manual_seed(0)
    text = tiny.text_config("qwen2", tie_word_embeddings=True)
    config = LlavaOnevisionConfig(
        vision_config=tiny.tower_config("siglip_vision_model", vision_use_head=False),
        text_config=text,
        image_token_index=3,
        image_grid_pinpoints=[[SIDE * rows, SIDE * columns] for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4)],
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
    )
    tiny.loud(LlavaOnevisionForConditionalGeneration(config)).save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=config.image_grid_pinpoints
    ).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def converted(llava_next, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "ours"
    ms_resampler.convert(llava_next, out)
    return AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out), out


@pytest.mark.parametrize("size", SIZES)
def test_llava_next_computes_the_same_for_pictures_of_any_proportions(size, llava_next, converted):
    model, processor, _ = converted
    theirs = LlavaNextForConditionalGeneration.from_pretrained(llava_next).eval()
    question = "What is this?", tiny.picture(size=size)
    ours_in = tiny.asked(processor, *question)
    theirs_in = tiny.asked(AutoProcessor.from_pretrained(llava_next), *question)
    ours_text = ours_in["input_ids"].masked_fill(ours_in["input_ids"] == processor.tokenizer.get_vocab()[NEWLINE], 3)
    assert_close(ours_text, theirs_in["input_ids"])
    with torch.no_grad():
        ours, expected = model(**ours_in).logits, theirs(**theirs_in).logits
    assert_close(ours[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)


def test_one_view_ends_with_the_newline(llava_next, converted):
    """transformers' rule for a picture of a single view, which their processor never makes."""
    model, processor, _ = converted
    theirs = LlavaNextForConditionalGeneration.from_pretrained(llava_next).eval()
    processor.tiles, whole = None, processor.tiles
    inputs = tiny.asked(processor, "What is this?", tiny.picture())
    processor.tiles = whole
    with torch.no_grad():
        states = theirs.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        features = theirs.model.multi_modal_projector(states[:, 1:])
        (packed,), _ = theirs.model.pack_image_features(
            features[None], torch.tensor([[SIDE, SIDE]]), "default", theirs.model.image_newline
        )
        newline = processor.tokenizer.get_vocab()[NEWLINE]
        ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == newline, 3)
        embeds = theirs.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == 3)[..., None], packed)
        expected = theirs.lm_head(theirs.model.language_model(inputs_embeds=embeds).last_hidden_state)
        found = model(**inputs).logits
    assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)


def test_the_newline_is_a_word_that_is_never_said(llava_next, converted):
    model, processor, out = converted
    place = processor.tokenizer.get_vocab()[NEWLINE]
    state = load_file(llava_next / "model.safetensors")
    (newline,) = (value for name, value in state.items() if name.endswith("image_newline"))
    assert_close(model.get_input_embeddings().weight[place], newline, rtol=0, atol=0)
    assert json.loads((out / "generation_config.json").read_text())["suppress_tokens"] == [3, place]
    rows = {row.source: row for row in plan_conversion(llava_next).rows}
    (row,) = (row for name, row in rows.items() if name.endswith("image_newline"))
    assert (row.target, row.what) == ("model.language_model.embed_tokens.weight", "changed")


def test_evaluation_asks_with_the_newlines_too(converted):
    model, processor, _ = converted
    picture = tiny.picture(size=(60, 60))
    answerer = LocalModel(model, processor)
    encoded = answerer.encode([picture])
    whole = tiny.asked(processor, "What is this?", picture)
    assert_close(answerer.tokenize(["What is this?"], [encoded])["input_ids"], whole["input_ids"])


def test_verification_compares_llava_next(llava_next, converted):
    difference, scale = largest_difference(llava_next, converted[2])
    assert difference < 1e-5 < scale


def their_answer(theirs, picture, folder, others=()):
    """transformers' logits of a picture in a prompt of words, whose image tokens are as many as the model makes."""
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    images = processor([picture, *others], return_tensors="pt")
    images["batch_num_images"] = torch.tensor([1 + len(others)])
    words = tiny.words(4, 6)
    with torch.no_grad():
        packed = theirs.get_image_features(**images).pooler_output
        ids = torch.tensor([[*words[0], *[3] * sum(map(len, packed)), *words[1]]])
        return theirs(input_ids=ids, **images).logits, words


def test_onevision_computes_the_same_up_to_its_number_of_tiles(onevision, tmp_path):
    ms_resampler.convert(onevision, tmp_path / "ours")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(onevision).eval()
    newline = processor.tokenizer.get_vocab()[NEWLINE]
    assert max(rows * columns for rows, columns in processor.tiles) == 9
    for size in SIZES:
        expected, words = their_answer(theirs, tiny.picture(size=size), onevision)
        inputs = processor(images=[tiny.picture(size=size)], text="<image>", return_tensors="pt")
        ids = torch.cat([torch.tensor([words[0]]), inputs["input_ids"], torch.tensor([words[1]])], dim=1)
        with torch.no_grad():
            found = model(**inputs | {"input_ids": ids, "attention_mask": None}).logits
        for answer in (found, expected):
            answer[..., newline] = 0  # an idle row of theirs, and the head is tied to the embeddings
        assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["avg_pool", "ms_resampler"])
@pytest.mark.parametrize("source", ["llava_next", "onevision"])
def test_scopes_start_as_the_mean_of_each_cell_of_the_whole_picture(kind, source, request, tmp_path):
    folder = request.getfixturevalue(source)
    fields = SMALL if kind == "ms_resampler" else {}
    ms_resampler.convert(folder, tmp_path / "out", projector={"projector_type": kind, "visual_tokens": 16, **fields})
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=[tiny.picture(size=(48, 48))], text="<image>", return_tensors="pt", tiles=(2, 2))
    assert (inputs["input_ids"] == 3).sum() == 16
    assert processor.newline_token is None
    theirs = AutoModelForImageTextToText.from_pretrained(folder).eval()
    layer = -2 if source == "llava_next" else -1
    with torch.no_grad():
        states = theirs.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer]
        overview, *tiles = states[:, 1:] if source == "llava_next" else states
        rows = [torch.cat([tile.unflatten(0, (6, 6)) for tile in tiles[row : row + 2]], dim=1) for row in (0, 2)]
        whole = torch.cat(rows)
        pooled = [
            torch.nn.functional.adaptive_avg_pool2d(x.permute(2, 0, 1), tuple(grid)).flatten(1).mT
            for x, grid in (
                (overview.unflatten(0, (6, 6)), inputs["tilings"][0, 2].tolist()),
                (whole, inputs["token_grids"][0].tolist()),
            )
        ]
        expected = theirs.model.multi_modal_projector(torch.cat(pooled))
        images = {name: inputs[name] for name in ("pixel_values", "tilings", "token_grids")}
        found = model.get_image_features(**images, return_dict=True).pooler_output[0]
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grids_of_another_size_are_refused(llava_next, tmp_path):
    for file in llava_next.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_grid_pinpoints": [[24, 30]]}))
    with pytest.raises(ValueError, match="no multiples of 24 pixels"):
        ms_resampler.convert(tmp_path, tmp_path / "out")
