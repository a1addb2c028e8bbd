"""Temporal scopes: against attention written out over all patches of all frames, and through the whole model."""

import math

import pytest
import reference_resampler
import tiny_models as tiny
import torch
from test_resampler import SMALL, TEXT, VISION, check_gradients, initialise, relative_error
from torch.testing import assert_close

from ms_resampler import MSResamplerForConditionalGeneration, MSResamplerProjectorConfig
from ms_resampler.clips_ms_resampler import ClipResampler
from ms_resampler.places_ms_resampler import GLOBAL
from ms_resampler.resampler_ms_resampler import MultiScopeResampler

SIDE, PATCHES = tiny.IMAGE_SIZE, tiny.IMAGE_SIZE // tiny.PATCH_SIZE
SCOPES = {"video_form": "scopes"}


def make(seed: int = 0, **changes) -> ClipResampler:
    """A small resampler of clips whose every parameter matters."""
    torch.manual_seed(seed)
    config = MSResamplerProjectorConfig(**SMALL | SCOPES | changes)
    resampler = ClipResampler(config, VISION, TEXT).apply(initialise)
    with torch.no_grad():
        for parameter in resampler.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return resampler


def of_images(resampler: ClipResampler) -> MultiScopeResampler:
    """The resampler that has its weights, without those of time."""
    alone = MultiScopeResampler(resampler.config, VISION, TEXT)
    alone.load_state_dict({name: value for name, value in resampler.state_dict().items() if ".time." not in name})
    return alone.to(resampler.input_proj.weight.dtype)


def features(frames: int, patch_grid, batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames * math.prod(patch_grid), VISION, generator=generator)


def written_out(resampler, x, patch_grid, token_grid, clip):
    weights = {name: tensor.double().numpy() for name, tensor in resampler.state_dict().items()}
    config = reference_resampler.described(resampler.config)
    return [
        reference_resampler.resample_clip(weights, config, x_NC, patch_grid, token_grid, clip) for x_NC in x.numpy()
    ]


@pytest.mark.parametrize(
    ("changes", "patch_grid", "token_grid", "clip"),
    [
        ({}, (3, 4), (2, 2), (4, 2)),
        ({}, (2, 3), (1, 3), (5, 3)),
        ({"num_hidden_layers": 2, "scope_sigmas": [0.5, None], "pooled_mlp": True}, (3, 3), (2, 1), (3, 3)),
        ({"moving_scopes": True}, (3, 4), (2, 2), (3, 2)),
        ({"scope_sigmas": [0.3, None, 2]}, (2, 2), (2, 2), (6, 1)),
    ],
    ids=str,
)
def test_rows_columns_and_time_are_a_softmax_over_all(changes, patch_grid, token_grid, clip):
    resampler, x = make(**changes).double(), features(clip[0], patch_grid, batch=2).double()
    with torch.no_grad():
        y, maps = resampler(x, patch_grid, token_grid, True, clip)
        assert torch.equal(resampler(x, patch_grid, token_grid, False, clip)[0], y)
    for row, expected in enumerate(written_out(resampler, x, patch_grid, token_grid, clip)):
        for actual, wanted in zip((y[row], maps.weights_BSM[row], maps.attentions_BSMN[row]), expected, strict=True):
            assert tuple(actual.shape) == wanted.shape
            assert relative_error(actual, wanted) < 1e-12


@pytest.mark.parametrize("loudness", [100, 1e4])
def test_one_frame_may_be_far_louder_than_the_others(loudness):
    resampler, x = make().double(), features(4, (2, 3)).double()
    with torch.no_grad():
        resampler.layers[0].score[2].weight *= loudness
        y, _ = resampler(x, (2, 3), (1, 2), False, (4, 2))
    assert relative_error(y[0], written_out(resampler, x, (2, 3), (1, 2), (4, 2))[0][0]) < 1e-9


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_frame_is_exactly_an_image(moving, dtype):
    resampler, x = make(moving_scopes=moving, pooled_mlp=True).to(dtype), features(1, (4, 5), batch=2).to(dtype)
    with torch.no_grad():
        y, maps = resampler(x, (4, 5), (2, 3), True)
        expected, seen = of_images(resampler)(x, (4, 5), (2, 3), True)
    assert torch.equal(y, expected)
    assert torch.equal(maps.places_BM2, seen.places_BM2)
    assert torch.equal(maps.weights_BSM, seen.weights_BSM)
    assert_close(maps.attentions_BSMN, seen.attentions_BSMN, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moving", [False, True])
def test_frames_that_are_alike_give_the_image_at_every_step(moving):
    resampler, x = make(moving_scopes=moving).double(), features(1, (4, 4)).double()
    with torch.no_grad():
        y, _ = resampler(x.repeat(1, 7, 1), (4, 4), (2, 2), False, (7, 3))
        expected, _ = of_images(resampler)(x, (4, 4), (2, 2))
    assert_close(y, expected.repeat(1, 3, 1))


def test_scopes_of_time_read_now_around_now_or_all():
    """Where all patches sound alike, the attention over time is each scope's Gaussian."""
    resampler = make(scope_sigmas=[0.4, 1.0, None]).apply(initialise)
    with torch.no_grad():
        resampler.layers[0].score[2].weight.zero_()
        _, maps = resampler(features(40, (2, 2)), (2, 2), (1, 1), True, (40, 8))
    time_SKF = maps.attentions_BSMN[0].unflatten(-1, (40, 4)).sum(-1)
    at = (torch.arange(40) + 0.5) / 5 - 4.5  # pitches from the middle of the step 4
    for scope, tau in enumerate((0.4, 1.0)):
        odds = torch.exp(-(at**2) / (2 * tau**2))
        assert_close(time_SKF[scope, 4], odds / odds.sum(), rtol=1e-4, atol=1e-6)
    assert_close(time_SKF[2], torch.full((8, 40), 1 / 40))


def test_places_of_tokens_have_the_time_of_their_step_in_front():
    with torch.no_grad():
        _, maps = make()(features(6, (4, 4)), (4, 4), (2, 2), True, (6, 3))
    expected = torch.cartesian_prod(torch.tensor([1 / 6, 0.5, 5 / 6]), *[torch.tensor([0.25, 0.75])] * 2)
    assert_close(maps.places_BM2[0], expected)


def test_gradients_are_those_of_finite_differences():
    resampler, x = make(num_hidden_layers=2).double(), features(3, (2, 2)).double()

    check_gradients(resampler, x, (2, 2), (2, 1), False, (3, 2))
    time = resampler.layers[0].time
    ends = time.sigma < 1e29
    assert time.log_scale.grad[ends].abs().min() > 0
    assert time.log_scale.grad[~ends].abs().max() < 1e-50


@pytest.mark.parametrize("mode", ["module in bfloat16", "autocast"])
def test_bfloat16_stays_within_two_percent(mode):
    resampler, x = make(), features(4, (4, 4))
    expected = written_out(resampler, x, (4, 4), (2, 2), (4, 2))[0]
    if mode == "module in bfloat16":
        resampler, x = resampler.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y, maps = resampler(x, (4, 4), (2, 2), True, (4, 2))
    for actual, wanted in zip((y, maps.weights_BSM, maps.attentions_BSMN), expected, strict=True):
        assert relative_error(actual[0], wanted) < 0.02


def test_initialisation_restores_time_as_configured():
    resampler = make(scope_sigmas=[0.5, 2, None], scope_heads=[2, 1, 1])
    time = resampler.layers[0].time
    for tensor in time.state_dict().values():
        tensor.fill_(math.nan)
    resampler.apply(initialise)
    assert torch.equal(time.sigma, torch.tensor([[0.5, 0.5, 2.0, GLOBAL]]))
    assert not time.log_scale.any()
    assert not time.offset.any()


def test_a_model_of_images_has_no_weights_of_time():
    plain, scopes = (set(tiny.tiny_model(projector=changes).state_dict()) for changes in ({}, SCOPES))
    assert scopes - plain == {f"model.projector.layers.0.time.{name}" for name in ("sigma", "log_scale", "offset")}
    assert not plain - scopes


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"video_form": "pooled"}, "`video_form` is one of frames, scopes, got 'pooled'"),
        (SCOPES | {"projector_type": "mlp"}, '"scopes" needs `ms_resampler`: `mlp` reads clips as "frames"'),
        (SCOPES | {"projector_type": "ms_resampler_branches"}, '"scopes" needs `ms_resampler`'),
    ],
)
def test_only_the_default_has_scopes_of_time(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MSResamplerProjectorConfig(**fields)


def test_features_must_be_those_of_all_frames():
    with pytest.raises(ValueError, match="Got 20 patch features for a grid of 9 x 2 patches"):
        make()(features(5, (2, 2)), (3, 2), (1, 1), False, (3, 1))


# The model


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(projector=SCOPES)


def frames(count: int, seed: int = 0, size=(30, 40)):
    return [tiny.picture(seed + number, size) for number in range(count)]


def processor(**changes):
    return tiny.tiny_processor(visual_tokens=8, **{"video_form": "scopes"} | changes)


@pytest.mark.parametrize("side", ["left", "right"])
def test_clips_and_images_give_in_a_batch_what_each_gives_alone(side, model):
    processor_ = processor(padding_side=side)
    images, videos = (
        [[tiny.picture(9)], [], [], [tiny.picture(8), tiny.picture(7)]],
        [[frames(5)], [], [frames(3, 20)], [frames(5, 40)]],
    )
    texts = ["<image> say <video>", "no picture at all", "<video>?", "<image> and <video> or<image>"]
    batch = processor_(images=images, videos=videos, text=texts, return_tensors="pt")
    assert batch["clips"].tolist() == [[1, 1], [5, 2], [3, 1], [1, 1], [5, 2], [1, 1]]
    with torch.no_grad():
        together = model(**batch).logits
        for row, (text, pictures, clips) in enumerate(zip(texts, images, videos, strict=True)):
            alone = processor_(images=pictures or None, videos=clips or None, text=[text], return_tensors="pt")
            kept = batch["attention_mask"][row].bool()
            assert_close(together[row][kept], model(**alone).logits[0], rtol=1e-4, atol=1e-5)


def test_the_model_reads_the_clip_that_its_projector_reads(model):
    inputs = processor()(videos=[frames(11)], text="<video>", return_tensors="pt")
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model.get_image_features(**pixels, output_scopes=True)
        x = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        clip, grid = tuple(inputs["clips"][0].tolist()), tuple(inputs["token_grids"][0].tolist())
        y, maps = model.model.projector(x.flatten(0, 1)[None], (PATCHES, PATCHES), grid, True, clip)
    assert_close(found.pooler_output[0], y[0])
    assert_close(found.scope_attentions[0], maps.attentions_BSMN[0])
    assert_close(found.token_places[0], maps.places_BM2[0])
    assert (found.clips, found.token_counts, found.patch_grids) == ([clip], [8], [(PATCHES, PATCHES)])
    assert found.scope_attentions[0].shape == (3, 8, 11 * PATCHES**2)


def test_a_clip_of_one_frame_is_answered_as_its_image(model):
    image = tiny.picture()
    clip = processor()(videos=[[image]], text="<video>?", return_tensors="pt")
    plain = processor()(images=[image], text="<image>?", return_tensors="pt")
    with torch.no_grad():
        assert_close(model(**clip).logits, model(**plain).logits, rtol=0, atol=0)


def test_tiles_of_a_clip_are_one_grid_in_every_frame(model):
    inputs = processor(tiles=4)(
        videos=[frames(3, size=(50, 50))],
        images=[tiny.picture(size=(50, 50))],
        text="<video><image>",
        return_tensors="pt",
    )
    assert inputs["tilings"].tolist()[0] == [[2, 2], [12, 12], [0, 0]]
    assert len(inputs["pixel_values"]) == 3 * 4 + 5
    assert (inputs["input_ids"] == tiny.IMAGE).sum() == 16
    found = model.get_image_features(
        **{n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}, output_scopes=True
    )
    assert [attention.shape[-1] for attention in found.scope_attentions] == [3 * 144, 144]
    assert model(**inputs).logits.isfinite().all()


def test_siglip_2_reads_the_frames_at_their_proportions():
    naflex, kind = tiny.tiny_model("siglip2_vision_model", projector=SCOPES), "siglip2_vision_model"
    inputs = tiny.tiny_processor(kind, visual_tokens=8, **SCOPES)(
        videos=[frames(10, size=(30, 90))],
        images=[tiny.picture(size=(60, 60))],
        text="<image><video>",
        return_tensors="pt",
    )
    alone = tiny.tiny_processor(kind, visual_tokens=8, **SCOPES)(
        videos=[frames(10, size=(30, 90))], return_tensors="pt"
    )
    with torch.no_grad():
        together = naflex.get_image_features(
            **{n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
        )
        assert_close(
            together.pooler_output[1], naflex.get_image_features(**alone).pooler_output[0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 7}, {"use_cache": False}])
def test_clips_are_generated_from(options, model):
    inputs = processor()(videos=[frames(4)], images=[tiny.picture()], text="<video> or <image>?", return_tensors="pt")
    short = {"max_new_tokens": 4, "do_sample": False}
    pixels = {name: inputs[name] for name in ("pixel_values", "token_grids", "clips")}
    with torch.no_grad():
        encoded = {"mm_encoder_outputs": {"image": model.get_image_features(**pixels, return_dict=True)}}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert_close(model.generate(**inputs, **short, **options), model.generate(**text, **encoded, **short, **options))


def test_reducers_of_tokens_shorten_clips_too():
    reduced = tiny.tiny_model(projector=SCOPES).set_reducer("divprune", keep=3)
    inputs = processor()(videos=[frames(4)], text="<video>?", return_tensors="pt")
    assert reduced(**inputs).kept_positions.shape[1] == inputs["input_ids"].shape[1] - 5


def test_a_model_of_clips_is_saved_and_loaded(tmp_path, model):
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded = MSResamplerForConditionalGeneration.from_pretrained(tmp_path).eval()
    reader = type(processor()).from_pretrained(tmp_path)
    assert (loaded.config.projector_config.video_form, reader.video_form) == ("scopes", "scopes")
    inputs = reader(videos=[frames(4)], text="<video>?", return_tensors="pt")
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_the_model_refuses_clips_that_do_not_fit_it(model):
    inputs = processor()(videos=[frames(4)], return_tensors="pt")
    with pytest.raises(ValueError, match="Got 3 frames for clips of 4: give pixels and clips together"):
        model.get_image_features(**inputs | {"pixel_values": inputs["pixel_values"][:3]})
    with pytest.raises(ValueError, match="`clips` come with `token_grids`"):
        model.get_image_features(inputs["pixel_values"], clips=inputs["clips"])
    with pytest.raises(ValueError, match="A clip of 4 frames has 1 to 4 steps, got 5"):
        model.get_image_features(**inputs | {"clips": [(4, 5)]})
    with pytest.raises(ValueError, match="Got 2 clips for 1 token grids"):
        model.get_image_features(**inputs | {"clips": [(4, 2), (1, 1)]})
    with pytest.raises(ValueError, match='temporal scopes, which this projector lacks: set `video_form` to "frames"'):
        tiny.tiny_model().get_image_features(**inputs)
