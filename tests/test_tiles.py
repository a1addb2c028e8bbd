"""Pictures in tiles: cut, read as one grid of patches, under an exact budget."""

import json
import math
import random

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image
from tiny_runs import losses_of, make_start, options_in, small
from torch.testing import assert_close
from transformers import AutoProcessor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image

import ms_resampler
from ms_resampler import MSResamplerProcessor, modeling_ms_resampler
from ms_resampler.answers import load
from ms_resampler.evaluation.answering import LocalModel
from ms_resampler.projectors_ms_resampler import OWN_GRID
from ms_resampler.tiles_ms_resampler import MOST_TILES, Tiling, grids_of, lay_out, picture_patches, share_out
from ms_resampler.training.collate import ConversationCollator
from ms_resampler.training.run import train
from ms_resampler_cli.main import main

SIDE, PATCHES = tiny.IMAGE_SIZE, tiny.IMAGE_SIZE // tiny.PATCH_SIZE
PINPOINTS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]


def processed(size, processor=None, seed=0, text="What?", **options):
    """What the model reads of a picture of (height, width) pixels."""
    processor = processor or tiny.tiny_processor(visual_tokens=16)
    return processor(images=[tiny.picture(seed, size)], text=f"<image>{text}", return_tensors="pt", **options)


def of_images(inputs):
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


def features(model, inputs, **options):
    with torch.no_grad():
        return model.get_image_features(**of_images(inputs), return_dict=True, **options)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model()


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model", "dinov3_vit", "convnext"])
@pytest.mark.parametrize(("size", "tiles"), [((SIDE, SIDE), 9), ((17, 17), 9), ((61, 61), 1), ((61, 61), (1, 1))])
def test_a_picture_of_one_tile_is_exactly_the_plain_path(tower, size, tiles):
    model, processor = tiny.tiny_model(tower), tiny.tiny_processor(tower)
    plain, tiled = processed(size, processor), processed(size, processor, tiles=tiles)
    assert tiled.pop("tilings").tolist() == [[[1, 1], [*model.config.native_patch_grid], [0, 0]]]
    for name in plain:
        assert_close(tiled[name], plain[name], rtol=0, atol=0)
    tiled = processed(size, processor, tiles=tiles)
    with torch.no_grad():
        assert_close(model(**tiled).logits, model(**plain).logits, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_tiles_are_cut_as_llava_next_cuts_them(seed):
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for rows, columns in PINPOINTS],
    )
    draw, ours = random.Random(seed), tiny.tiny_processor(tiles=PINPOINTS)
    ours.visual_tokens = None
    for _ in range(20):
        image = tiny.picture(size=(draw.randint(20, 200), draw.randint(20, 200)))
        cut = ours(images=[image], text="<image>", return_tensors="pt")
        assert_close(cut["pixel_values"], theirs(image, return_tensors="pt")["pixel_values"][0], rtol=0, atol=0)
        (tiles, patches, _), whole = cut["tilings"][0].tolist(), cut["tilings"][0, 0] * PATCHES
        kept = unpad_image(torch.zeros(1, *whole.tolist()), (image.height, image.width))
        assert tuple(patches) == kept.shape[1:]
        assert tuple(tiles) in PINPOINTS


def test_the_grid_loses_least_of_the_picture_and_then_pads_least():
    draw = random.Random(0)
    for _ in range(200):
        height, width = draw.randint(1, 400), draw.randint(1, 400)
        tiling, _ = lay_out((height, width), (SIDE, SIDE), (PATCHES, PATCHES), grids_of(9), 1, (1, 1), 0.0)

        def kept_and_wasted(grid, height=height, width=width):
            scale = min(grid[0] * SIDE / height, grid[1] * SIDE / width)
            kept = min(int(height * scale) * int(width * scale), height * width)
            return -kept, grid[0] * grid[1] * SIDE * SIDE - kept

        grids = [(rows, columns) for rows in range(1, 10) for columns in range(1, 10) if rows * columns <= 9]
        assert kept_and_wasted(tiling.tiles) == min(map(kept_and_wasted, grids))


def test_patches_of_tiles_are_at_their_place_in_the_picture(model):
    inputs = processed((90, 60), tiles=9)
    (rows, columns), (height, width), _ = inputs["tilings"][0].tolist()
    assert rows > 1 < columns
    with torch.no_grad():
        _, *views = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        top, left = (rows * PATCHES - height) // 2, (columns * PATCHES - width) // 2
        whole = [
            views[y // PATCHES * columns + x // PATCHES][1 + y % PATCHES * PATCHES + x % PATCHES]
            for y in range(top, top + height)
            for x in range(left, left + width)
        ]
        grid = tuple(inputs["token_grids"][0].tolist())
        expected, _ = model.model.projector(torch.stack(whole)[None], (height, width), grid)
    assert_close(features(model, inputs).pooler_output[0][-math.prod(grid) :], expected[0])


def position_free(monkeypatch, model):
    """Makes the tower return patch embeddings alone, which do not know what is beside them."""
    embed = model.model.vision_tower.embeddings.patch_embedding

    def run(pixel_values, mask, shapes, **kwargs):
        patches = embed(pixel_values).flatten(2).mT
        states = torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)
        return BaseModelOutput(states, hidden_states=(states,) * 4)

    monkeypatch.setattr(model.model, "_run_tower", run)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("size", [(48, 72), (96, 24), (50, 70), (90, 31)])
def test_seams_cannot_be_told_from_tokens_and_maps(moving, size, monkeypatch):
    model = tiny.tiny_model(projector={"moving_scopes": moving})
    position_free(monkeypatch, model)
    processor = tiny.tiny_processor(visual_tokens=24, tiles=16, overview_share=0.0)
    inputs = processed(size, processor)
    (rows, columns), (height, width), _ = inputs["tilings"][0].tolist()
    assert rows * columns > 1
    # the same picture whole, made without any of the code that cuts
    scale = min(rows * SIDE / size[0], columns * SIDE / size[1])
    inside = [min(math.ceil(side * scale), count * SIDE) for side, count in zip(size, (rows, columns), strict=True)]
    canvas = np.zeros((rows * SIDE, columns * SIDE, 3), dtype=np.uint8)
    y, x = ((whole - part) // 2 for whole, part in zip(canvas.shape, inside, strict=False))
    resized = tiny.picture(size=size).resize((inside[1], inside[0]), Image.Resampling.BICUBIC)
    canvas[y : y + inside[0], x : x + inside[1]] = np.asarray(resized)
    top, left = (canvas.shape[0] // 4 - height) // 2 * 4, (canvas.shape[1] // 4 - width) // 2 * 4
    seen = canvas[top : top + height * 4, left : left + width * 4]
    whole = processor.image_processor([seen], do_resize=False, do_center_crop=False, return_tensors="pt")
    expected = features(model, whole | {"token_grids": inputs["token_grids"]}, output_scopes=True)
    found = features(model, inputs, output_scopes=True)
    for name in ("pooler_output", "scope_weights", "scope_attentions", "token_places"):
        assert_close(getattr(found, name)[0], getattr(expected, name)[0], rtol=1e-5, atol=1e-6)


def test_the_overview_comes_first_and_is_the_squeezed_picture(model):
    image = tiny.picture(size=(90, 60))
    processor = tiny.tiny_processor(visual_tokens=16, tiles=9)
    inputs = processed((90, 60), processor)
    overview = tuple(inputs["tilings"][0, 2].tolist())
    assert math.prod(overview) == 4
    squeezed = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    alone = processor(images=[squeezed], text="<image>", visual_tokens=overview, return_tensors="pt", tiles=1)
    assert_close(features(model, inputs).pooler_output[0][:4], features(model, alone).pooler_output[0])


def test_maps_of_the_overview_lie_over_the_whole_picture(model):
    inputs = processed((96, 96), tiles=(4, 4))
    found = features(model, inputs, output_scopes=True)
    overview, patches = found.overview_grids[0], found.patch_grids[0]
    assert (found.token_counts, patches) == ([16], (24, 24))
    assert found.scope_weights[0].shape == (3, 16)
    assert_close(found.scope_attentions[0].sum(-1), torch.ones(3, 16))
    with torch.no_grad():
        x = model.model.vision_tower(inputs["pixel_values"][:1], output_hidden_states=True).hidden_states[-2][:, 1:]
        _, maps = model.model.projector(x, (PATCHES, PATCHES), overview, True)
    own = maps.attentions_BSMN[0].unflatten(-1, (PATCHES, PATCHES))
    spread = own.repeat_interleave(4, -1).repeat_interleave(4, -2).flatten(-2) / 16
    assert_close(found.scope_attentions[0][:, : math.prod(overview)], spread)


@pytest.mark.parametrize("budget", [1, 7, 16, 36, "auto", None])
def test_budgets_are_exact_and_told_without_the_picture(budget):
    processor = tiny.tiny_processor(tiles=9, auto_tokens=(20, 70))
    processor.visual_tokens, draw = budget, random.Random(str(budget))
    sizes = [(draw.randint(4, 200), draw.randint(4, 200)) for _ in range(70)]
    told = processor._get_num_multimodal_tokens(sizes)
    together = processor(images=[tiny.picture(size=size) for size in sizes], text="<image>" * 70, return_tensors="pt")
    assert (together["input_ids"] == tiny.IMAGE).sum() == sum(told["num_image_tokens"])
    assert len(together["pixel_values"]) == sum(told["num_image_patches"])
    counts = together["token_grids"].prod(-1) + together["tilings"][:, 2].prod(-1)
    assert counts.tolist() == told["num_image_tokens"]
    if isinstance(budget, int):
        assert set(told["num_image_tokens"]) == {budget}
    if budget == "auto":
        wanted = (together["tilings"][:, 1].prod(-1) / 4).clamp(20, 70)
        assert (counts - wanted).abs().max() <= 1
        assert len(set(counts.tolist())) > 4
    if budget is None:
        whole = together["tilings"][:, 1].prod(-1) + (together["tilings"][:, 0].prod(-1) > 1) * PATCHES**2
        assert_close(counts, whole)


@pytest.mark.parametrize(("share", "tokens"), [(0, 0), (0.25, 9), (0.5, 18), (0.75, 28)])
def test_the_overviews_share_is_the_nearest_with_which_both_have_a_grid(share, tokens):
    inputs = processed((72, 72), visual_tokens=36, tiles=9, overview_share=share)
    overview, grid = inputs["tilings"][0, 2].prod(), inputs["token_grids"][0].prod()
    # 27 tokens have no grid over a square, 28 = 4 x 7 do
    assert overview == {9: 8}.get(tokens, tokens)
    assert overview + grid == 36
    assert len(inputs["pixel_values"]) == 9 + (share > 0)


def test_a_grid_of_tokens_lies_over_the_picture_without_an_overview(model):
    inputs = processed((72, 48), visual_tokens=(5, 3), tiles=9)
    assert inputs["tilings"].tolist() == [[[3, 2], [18, 12], [0, 0]]]
    assert features(model, inputs).pooler_output[0].shape[0] == 15


def test_small_pictures_of_any_proportions_have_room_for_the_budget():
    processor = tiny.tiny_processor(visual_tokens=24, tiles=9)
    for size in [(10, 100), (3, 60), (100, 9), (2, 2)]:
        inputs = processed(size, processor)
        assert (inputs["input_ids"] == tiny.IMAGE).sum() == 24


@pytest.mark.parametrize("side", ["left", "right"])
def test_different_grids_give_in_a_batch_what_each_gives_alone(side, model):
    processor = tiny.tiny_processor(visual_tokens=12, tiles=9, padding_side=side)
    sizes = [[(60, 60)], [], [(24, 24), (30, 100), (100, 30)], [(72, 48)]]
    images = [[tiny.picture(seed=n, size=size) for n, size in enumerate(group)] for group in sizes]
    texts = ["say <image>what", "no picture at all", "<image> and <image> or<image>", "<image>?"]
    batch = processor(images=images, text=texts, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits
        for row, (text, group) in enumerate(zip(texts, images, strict=True)):
            alone = processor(images=[group] if group else None, text=[text], return_tensors="pt")
            kept = batch["attention_mask"][row].bool()
            assert_close(together[row][kept], model(**alone).logits[0], rtol=1e-4, atol=1e-5)


def test_the_tower_runs_a_few_views_at_a_time(model, monkeypatch):
    inputs, seen = processed((144, 144), tiles=36), []
    whole = features(model, inputs, output_hidden_states=True)
    tower = model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    monkeypatch.setattr(modeling_ms_resampler, "VIEWS_AT_ONCE", 5)
    few = features(model, inputs, output_hidden_states=True)
    handle.remove()
    assert seen == [5] * 7 + [2]
    assert_close(few.pooler_output[0], whole.pooler_output[0])
    assert_close(few.last_hidden_state, whole.last_hidden_state)
    assert [state.shape for state in few.hidden_states] == [state.shape for state in whole.hidden_states]
    assert len(few.last_hidden_state) == 37


WHOLE = {"mlp": None, "avg_pool": 12, "ldp_v2": 12, "c_abstractor": 12, "mqt": 4, "resampler": 12}


@pytest.mark.parametrize("kind", WHOLE)
def test_other_projectors_lay_their_tokens_over_the_whole_picture(kind):
    tokens = [PATCHES, PATCHES] if kind == "mlp" else 4
    model = tiny.tiny_model(projector={"projector_type": kind, "visual_tokens": tokens})
    processor = tiny.tiny_processor(tiles=9)
    processor.visual_tokens = WHOLE[kind]
    inputs = processed((72, 48), processor)
    count = 18 * 12 + PATCHES**2 if kind == "mlp" else WHOLE[kind]
    assert len(features(model, inputs).pooler_output[0]) == count == (inputs["input_ids"] == tiny.IMAGE).sum()


@pytest.mark.parametrize("kind", sorted(OWN_GRID))
def test_projectors_made_for_one_grid_read_every_tile_apart(kind):
    layers = [-2, -1] if kind in ("token_packer", "delta_llava", "saep") else -2
    model = tiny.tiny_model(projector={"projector_type": kind}, vision_feature_layer=layers)
    inputs = processed((48, 72), tiny.tiny_processor(tiles=6, tiles_apart=True))
    assert (inputs["input_ids"] == tiny.IMAGE).sum() == 7 * 4
    alone = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    assert_close(features(model, inputs).pooler_output[0], torch.cat(alone))
    model(**inputs)
    with pytest.raises(ValueError, match=f"`{kind}` is made for the grid of one tile: .*tiles_apart=True"):
        features(model, processed((48, 72), tiny.tiny_processor(tiles=6)))


def test_siglip_2_reads_its_own_grids_and_takes_no_tiles():
    model, processor = tiny.tiny_model("siglip2_vision_model"), tiny.tiny_processor("siglip2_vision_model")
    inputs = processed((30, 90), processor)
    assert "tilings" not in inputs
    assert features(model, inputs).patch_grids == [tuple(inputs["spatial_shapes"][0].tolist())]
    with pytest.raises(ValueError, match="without tiles: leave out `tiles`, and set `max_num_patches`"):
        processed((30, 90), processor, tiles=4)
    with pytest.raises(ValueError, match="without tiles"):
        processor._get_num_multimodal_tokens([(30, 90)], tiles=4)


@pytest.mark.parametrize(
    "tiles", [0, -1, MOST_TILES + 1, True, (5, 8), (0, 2), "many", [], [(1, 2), 3], [(1, 2), (1, 40)]]
)
def test_what_are_no_tiles_is_refused(tiles):
    with pytest.raises(ValueError, match=f"`tiles` is a count from 1 to {MOST_TILES}"):
        grids_of(tiles)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tiles": 4, "overview_share": 1.0}, "`overview_share` is at least 0 and below 1, got 1.0"),
        ({"tiles": 4, "do_resize": False}, "leave out `do_resize=False`"),
        ({"tiles": 2, "visual_tokens": 1000}, "1000 visual tokens is impossible|budget of 1000 visual tokens"),
        ({"tiles": (1, 1), "visual_tokens": (7, 7)}, "budget of 49 visual tokens is impossible for"),
        ({"tiles": 4, "visual_tokens": "many"}, "got 'many'"),
        ({"tiles": 4, "visual_tokens": 0}, "A budget of 0 visual tokens"),
    ],
)
def test_what_tiles_cannot_give_is_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        processed((60, 60), **options)


def test_tiles_are_cut_from_pictures_and_byte_arrays_only():
    processor, image = tiny.tiny_processor(tiles=4), tiny.picture(size=(60, 60))
    from_array = processor(images=[np.asarray(image)], text="<image>", return_tensors="pt")
    assert_close(from_array["pixel_values"], processed((60, 60), processor)["pixel_values"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="not from a Tensor: give one of those, or leave out `tiles`"):
        processor(images=[torch.rand(3, 60, 60)], text="<image>")


def test_the_model_refuses_tiles_that_do_not_fit_it(model):
    inputs = of_images(processed((60, 60), tiles=9))
    with pytest.raises(ValueError, match="Got 9 views for tilings of 10"):
        model.get_image_features(**inputs | {"pixel_values": inputs["pixel_values"][:9]})
    with pytest.raises(ValueError, match="`tilings` come with `token_grids`"):
        model.get_image_features(inputs["pixel_values"], tilings=inputs["tilings"])
    fused = tiny.tiny_model(text="llama", projector={"projector_type": "llava_mini", "fusion_layers": 1})
    with pytest.raises(ValueError, match="Pre-fusion reads the patches of single views"):
        fused.get_image_features(**inputs)
    pruned = tiny.tiny_model(projector={"projector_type": "mlp", "visual_tokens": [6, 6]})
    pruned.set_reducer("visionzip", keep=8)
    with pytest.raises(ValueError, match="visionzip chooses patches of single views"):
        pruned.get_image_features(**inputs)


def test_reducers_of_tokens_shorten_tiled_pictures_too():
    model = tiny.tiny_model().set_reducer("divprune", keep=6)
    inputs = processed((60, 60), tiles=9)
    assert features(model, inputs).token_counts == [16]
    output = model(**inputs)
    assert output.kept_positions.shape[1] == inputs["input_ids"].shape[1] - 10
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 7}, {"use_cache": False}])
def test_tiled_pictures_are_generated_from(options, model):
    processor = tiny.tiny_processor(visual_tokens=16, tiles=9)
    inputs = tiny.asked(processor, "What?", tiny.picture(size=(60, 60)), tiny.picture(size=(30, 90)))
    short = {"max_new_tokens": 5, "do_sample": False}
    encoded = {"mm_encoder_outputs": {"image": features(model, inputs)}}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert_close(model.generate(**inputs, **short, **options), model.generate(**text, **encoded, **short, **options))


def test_a_processor_keeps_its_tiles_and_an_older_one_has_none(tmp_path):
    tiny.tiny_processor().save_pretrained(tmp_path / "plain")
    saved = (tmp_path / "plain" / "processor_config.json").read_text()
    assert not {"tiles", "overview_share", "tiles_apart", "auto_tokens"} & {*json.loads(saved)}
    assert MSResamplerProcessor.from_pretrained(tmp_path / "plain").tiles is None
    tiny.tiny_processor(tiles=(2, 3), overview_share=0.5, auto_tokens=(4, 8)).save_pretrained(tmp_path / "tiled")
    loaded = MSResamplerProcessor.from_pretrained(tmp_path / "tiled")
    assert (tuple(loaded.tiles), loaded.overview_share, loaded.auto_tokens) == ((2, 3), 0.5, (4, 8))
    assert processed((50, 50), loaded)["tilings"].tolist() == [[[2, 3], [12, 12], [1, 2]]]


def test_the_picture_keeps_at_least_one_row_or_column_of_patches():
    assert picture_patches((1, 5000), (6, 54)) == (2, 54)
    assert picture_patches((5000, 1), (54, 5)) == (54, 1)


def test_a_total_is_shared_exactly_among_images():
    processor = tiny.tiny_processor(tiles=4)
    draw = random.Random(0)
    sizes = [(draw.randint(8, 120), draw.randint(8, 120)) for _ in range(20)]
    images = [tiny.picture(size=size) for size in sizes]
    for total in (20, 100, 157, 240):
        inputs = processor(images=[images], text=["<image>" * 20], visual_tokens_total=total, return_tensors="pt")
        assert (inputs["input_ids"] == tiny.IMAGE).sum() == total
        counts = inputs["token_grids"].prod(-1) + inputs["tilings"][:, 2].prod(-1)
        assert (counts - total / 20).abs().max() <= 3
        assert (
            processor._get_num_multimodal_tokens(sizes, visual_tokens_total=total)["num_image_tokens"]
            == counts.tolist()
        )


def test_every_prompt_has_its_total():
    processor = tiny.tiny_processor()
    images = [[tiny.picture()], [tiny.picture(seed=n) for n in range(3)]]
    inputs = processor(images=images, text=["<image>", "<image>" * 3], visual_tokens_total=24, return_tensors="pt")
    assert inputs["token_grids"].prod(-1).tolist() == [24, 8, 8, 8]


def test_a_total_with_auto_goes_by_area():
    processor = tiny.tiny_processor(tiles=9, visual_tokens="auto", auto_tokens=(4, 100))
    images = [tiny.picture(size=(24, 24)), tiny.picture(size=(72, 72))]
    inputs = processor(images=images, text="<image><image>", visual_tokens_total=60, return_tensors="pt")
    counts = inputs["token_grids"].prod(-1) + inputs["tilings"][:, 2].prod(-1)
    # a ninth of a quarter of the patches of the other, 9 and 81
    assert counts.tolist() == [6, 54]


@pytest.mark.parametrize(
    ("total", "options", "sentence"),
    [
        (2, {}, "`visual_tokens_total` 2 is too small: the 3 images need one token each"),
        (1000, {}, "cannot be shared exactly among 3 images; use a total such as .*108"),
        (30, {"visual_tokens": 4}, "Give `visual_tokens_total`, or `visual_tokens` of each image, not both"),
    ],
)
def test_a_total_that_cannot_be_is_a_sentence(total, options, sentence):
    processor = tiny.tiny_processor()
    with pytest.raises(ValueError, match=sentence):
        processor(images=[tiny.picture()] * 3, text="<image>" * 3, visual_tokens_total=total, **options)


def test_shares_are_as_even_as_the_possible_counts_allow():
    draw = random.Random(0)
    for _ in range(30):
        pictures = draw.randint(2, 4)
        possible = [sorted(draw.sample(range(1, 20), 6)) for _ in range(pictures)]
        total = sum(draw.choice(counts) for counts in possible)
        shares = share_out(total, [1] * pictures, lambda picture, count, possible=possible: count in possible[picture])
        ways = [()]
        for counts in possible:
            ways = [(*way, count) for way in ways for count in counts]
        exact = [way for way in ways if sum(way) == total]
        off = [sum(abs(count - total / pictures) for count in way) for way in exact]
        assert sum(shares) == total
        assert sum(abs(count - total / pictures) for count in shares) == pytest.approx(min(off))


def test_long_pages_are_read_at_their_own_proportions(model):
    processor = tiny.tiny_processor(visual_tokens=36, tiles=12)
    for size in [(400, 100), (100, 400), (1000, 100)]:
        inputs = processed(size, processor)
        assert (inputs["input_ids"] == tiny.IMAGE).sum() == 36
        height, width = inputs["tilings"][0, 1].tolist()
        assert height / width == pytest.approx(size[0] / size[1], rel=0.2)
    pages = [tiny.picture(seed=n, size=(400, 100)) for n in range(3)]
    inputs = processor(images=pages, text="<image>" * 3, visual_tokens_total=60, return_tensors="pt")
    assert sum(map(len, features(model, inputs).pooler_output)) == 60


def test_tilings_are_read_from_tuples_as_from_tensors(model):
    inputs = processed((60, 60), tiles=9)
    lists = {"token_grids": [tuple(grid) for grid in inputs["token_grids"].tolist()]}
    lists["tilings"] = [Tiling(*map(tuple, row)) for row in inputs["tilings"].tolist()]
    again = model.get_image_features(inputs["pixel_values"], return_dict=True, **lists)
    assert_close(again.pooler_output[0], features(model, inputs).pooler_output[0])


def test_questions_in_python_and_in_the_terminal_take_tiles_and_totals(tmp_path, capsys):
    tiny.save_tiny(tmp_path / "model", text="qwen2")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        tiny.picture(seed=number, size=(60, 90)).save(file)
    model, processor = load(tmp_path / "model")
    inputs = tiny.asked(processor, "What?", *files[:1], tiles=6, visual_tokens=16)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answer = ms_resampler.ask("What?", files[0], model, processor, tiles=6, visual_tokens=16, max_new_tokens=4)
    assert answer.text == processor.decode(ids[0], skip_special_tokens=True).strip()
    assert answer.visual_tokens == [16]
    assert "tilings" in inputs
    images = [part for file in files for part in ("--image", str(file))]
    common = ["--model", str(tmp_path / "model"), "--max-new-tokens", "1", "--json", "--tiles", "2x3"]
    assert main(["chat", "What?", *images, *common, "--visual-tokens-total", "30"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [image["visual_tokens"] for image in told["images"]] == [10, 10, 10]
    assert sum(told["scope_weights"].values()) == pytest.approx(1, abs=1e-3)


def test_evaluation_encodes_pictures_in_tiles(model):
    processor, picture = tiny.tiny_processor(visual_tokens=16), tiny.picture(size=(60, 90))
    answerer = LocalModel(model, processor, "auto", tiles=(2, 3))
    encoded = answerer.encode([picture, tiny.picture()])
    inputs = processor(images=[picture], text="<image>", return_tensors="pt", visual_tokens="auto", tiles=(2, 3))
    assert_close(encoded[0].tokens, features(model, inputs).pooler_output[0])
    assert answerer.visual_tokens(encoded[0]) == (inputs["input_ids"] == tiny.IMAGE).sum()
    assert (answerer.tokenize(["What?"], [encoded])["input_ids"] == tiny.IMAGE).sum() == sum(
        len(one.tokens) for one in encoded
    )


@pytest.mark.parametrize("frozen_features", [False, True])
def test_a_run_trains_on_tiles_and_saves_them(frozen_features, tmp_path):
    start = make_start(tmp_path, records=4)
    recipe = small("align", steps=2, batch_size=2, tiles=4, token_budgets=(9, 16))
    features = {"features": tmp_path / "features"} if frozen_features else {}
    result = train(recipe, **options_in(start, tmp_path / "run", **features))
    assert AutoProcessor.from_pretrained(result).tiles == 4
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "run"))
    with pytest.raises(ValueError, match="`tiles` is a count from 1 to"):
        train(small("align", tiles=99), **options_in(start, tmp_path / "other"))


def test_batches_of_training_hold_tiles_as_generation_has_them(model):
    processor = tiny.tiny_processor(visual_tokens=12, tiles=4)
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    records = [
        {"id": str(n), "image": tiny.picture(seed=n, size=size), "conversations": said}
        for n, size in enumerate([(24, 24), (60, 30)])
    ]
    batch = ConversationCollator(processor, max_length=256)(records)
    losses = []
    for record in records:
        losses.append(model(**ConversationCollator(processor, max_length=256)([record])).loss)
    assert len(batch["pixel_values"]) == 1 + int(batch["tilings"][1, 0].prod()) + 1
    assert_close(model(**batch).loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_hired_keeps_a_budget_of_every_view_and_the_text_is_shortened():
    """Against the tower's own attention, for two pictures of different tiles and one of a single tile."""
    model = tiny.tiny_model(projector={"projector_type": "mlp"})
    model.set_attn_implementation("eager")
    processor = tiny.tiny_processor(tiles=4)
    processor.visual_tokens = None
    sizes = [(2 * SIDE, 2 * SIDE), (SIDE, 2 * SIDE), (SIDE, SIDE)]
    inputs = processor(
        images=[[tiny.picture(n, size)] for n, size in enumerate(sizes)],
        text=["<image>What?", "<image>Why?", "<image>How?"],
        padding=True,
        return_tensors="pt",
    )
    whole = features(model, inputs)
    model.set_reducer("hired", keep=12)
    found = features(model, inputs)
    rule = model.reducer
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    layer = model.config.feature_layers[0]
    read, first = tower.attentions[layer % len(tower.hidden_states) - 1][:, :, 0], tower.attentions[0][:, :, 0]
    start = 0
    for tokens, count, tiling in zip(found.pooler_output, whole.token_counts, inputs["tilings"].tolist(), strict=True):
        views = tiling[0][0] * tiling[0][1] + (tiling[2] != [0, 0])
        budgets = rule.budgets(first[start], views - 1) if views > 1 else [12]
        states = tower.hidden_states[layer][start : start + views, 1:]
        kept = [read[start + n, :, 1:].sum(0).topk(budget).indices.sort().values for n, budget in enumerate(budgets)]
        x_TC = torch.cat([state[places] for state, places in zip(states, kept, strict=True)])
        with torch.no_grad():
            assert_close(tokens, model.model.projector.mlp(x_TC), rtol=1e-4, atol=1e-5)
        assert len(tokens) <= 12 < count
        start += views
    assert found.token_counts == whole.token_counts
    together = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for row, size in enumerate(sizes):
        alone = processed(size, processor, seed=row, text=["What?", "Why?", "How?"][row])
        assert_close(model.generate(**alone, max_new_tokens=3, do_sample=False)[0, -3:], together[row, -3:])
