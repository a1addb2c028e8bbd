"""Large pictures in tiles in the Space: what is shown, covered, compared and refused; without a server."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import space_server
import tiny_models
import torch
from PIL import Image

import answering  # isort: skip (space_server made it importable)
import api
import ask_page
import compare_page
import conversation
import examples
import known
import layers
import measures
import proof
import scope_view
import settings
import tiles
from pictures import Refusal

QUESTION = "What is this?"
NINE = settings.Settings(visual_tokens=16, tiles=9, max_new_tokens=8)


@pytest.fixture(scope="module")
def answerer():
    return space_server.make_answerer()


@pytest.fixture
def large_file(tmp_path):
    tiny_models.picture(size=(48, 72)).save(tmp_path / "large.png")
    return str(tmp_path / "large.png")


def prompt_about(answerer, *pictures, wanted=NINE):
    content = [{"type": "image", "image": picture} for picture in pictures]
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    return answerer.prepare(turns, list(pictures), wanted)


# --- What is shown ----------------------------------------------------------------------------------------------


def test_a_picture_of_whole_tiles_is_shown_as_it_is(answerer):
    picture = tiny_models.picture(size=(48, 72))
    (maps,) = answerer.look([picture], NINE)
    assert (maps.tiles, maps.patch_grid) == ((2, 3), (12, 18))
    assert np.abs(np.asarray(maps.picture).astype(int) - np.asarray(picture)).max() <= 1


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (40, 160)])
def test_maps_lie_on_the_whole_picture_at_its_own_proportions(answerer, size):
    blocks = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    picture = Image.fromarray(blocks).resize(size[::-1], Image.Resampling.NEAREST)
    (maps,) = answerer.look([picture], NINE)
    rows, columns = maps.patch_grid
    assert (maps.picture.height, maps.picture.width) == (4 * rows, 4 * columns)
    assert rows / columns == pytest.approx(size[0] / size[1], rel=0.1)
    middles = np.asarray(maps.picture.resize((4, 4), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(middles - blocks).max() <= 4
    assert maps.attentions.shape == (3, 16, rows * columns)
    np.testing.assert_allclose(maps.attentions.sum(-1), 1, atol=1e-4)


@pytest.mark.parametrize("count", [16, 30, 36])
def test_the_tokens_are_as_many_as_asked_for_and_the_overviews_come_first(answerer, count):
    pictures = [tiny_models.picture(seed, size) for seed, size in enumerate([(60, 90), (24, 24), (200, 50)])]
    for maps in answerer.look(pictures, replace(NINE, visual_tokens=count)):
        seen, laid = maps.overview_grid, maps.token_grid
        assert maps.read == count == seen[0] * seen[1] + laid[0] * laid[1] == maps.weights.shape[1]
        assert (seen == (0, 0)) == (maps.tiles == (1, 1))
        rows, columns = ((np.arange(side) + 0.5) / side for side in (seen if seen[0] else laid))
        first = [(y, x) for y in rows for x in columns]
        patch = 1 / min(6, *maps.patch_grid)  # cells are of whole patches
        np.testing.assert_allclose(maps.places[: len(first)], first, atol=patch / 2)
        np.testing.assert_allclose(maps.places[-1], (1 - 0.5 / laid[0], 1 - 0.5 / laid[1]), atol=patch / 2)


def test_a_picture_of_one_tile_is_answered_as_without_tiles(answerer):
    picture = tiny_models.picture(size=(24, 24))
    plain, tiled = (prompt_about(answerer, picture, wanted=replace(NINE, tiles=tile)) for tile in (None, 9))
    answers = [list(answerer.reply(prompt, NINE))[-1].text for prompt in (plain, tiled)]
    assert answers[0] == answers[1] != ""
    one, other = (answerer.encode(prompt)[2][0] for prompt in (plain, tiled))
    np.testing.assert_array_equal(one.attentions, other.attentions)


def test_the_view_and_files_tell_the_overview(answerer):
    prompt = prompt_about(answerer, tiny_models.picture(size=(60, 90)))
    first, *_ = answerer.reply(prompt, NINE)
    (maps,) = first.maps
    usual = layers.Usual([(maps.token_grid, np.full((1, 3, 12), 0.5)), ((1, 1), np.full((1, 3, 1), 0.3))])
    value = scope_view.view_value(answerer.scopes, first, usual, NINE)
    assert value["asked"] == {"visual_tokens": 16, "system_prompt": "", "tiles": 9}
    assert value["pictures"][0]["overview_grid"] == list(maps.overview_grid) == [2, 2]
    np.testing.assert_allclose(usual.for_tokens(maps), [[[0.4] * 4 + [0.5] * 12] * 3])
    told = measures.in_json(maps)
    assert (told["overview_grid"], told["tiles"]) == ([2, 2], list(maps.tiles))


@pytest.mark.parametrize("kind", ["ms_resampler", "ms_resampler_branches"])
def test_layers_of_pictures_in_tiles_are_those_of_the_model(kind):
    deep = space_server.make_answerer(projector={"projector_type": kind, "num_hidden_layers": 2})
    prompt = prompt_about(deep, tiny_models.picture(), tiny_models.picture(1, (60, 90)))
    read = deep.encode(prompt)[2]
    for number, expected in enumerate(read):
        maps, told = deep.by_layer(prompt, number)
        last = told[-1].within(maps, None, None)
        np.testing.assert_allclose(last.attentions, expected.attentions, atol=1e-5)
        np.testing.assert_allclose(last.weights, expected.weights, atol=1e-5)
        assert [[len(heads) for heads in layer.heads] for layer in told] == deep.scope_heads
    words = deep.attend(prompt, "ab cd")
    assert [len(word.shares) for word in words] == [32, 32]


def test_layers_of_an_overview_read_with_its_picture_are_told_apart():
    deep = space_server.make_answerer(projector={"num_hidden_layers": 2})
    deep.processor.newline_token, deep.processor.overview_share = "a", 0.5  # LLaVA-NeXT's: one tile has one, too
    prompt = prompt_about(deep, tiny_models.picture(size=(20, 24)), wanted=replace(NINE, visual_tokens=8))
    (expected,) = deep.encode(prompt)[2]
    assert (expected.tiles, expected.overview_grid, expected.token_grid) == ((1, 1), (2, 2), (2, 2))
    maps, told = deep.by_layer(prompt, 0)
    np.testing.assert_allclose(told[1].weights, expected.weights, atol=1e-5)
    np.testing.assert_allclose(told[1].within(maps, None, None).attentions, expected.attentions, atol=1e-5)


# --- What is covered and refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 72), (60, 90), (90, 40)])
def test_what_is_covered_is_covered_in_its_tiles_and_in_the_overview(answerer, size):
    inputs = prompt_about(answerer, tiny_models.picture(size=size)).inputs
    (cut,), views = tiles.cuts_of(inputs["tilings"], (6, 6)), inputs["pixel_values"]
    rows, columns = cut.patches
    chosen = (0, columns + 1, rows * columns - 1)
    covered = tiles.cover_views(views, chosen, cut, 4)
    before, after = tiles.whole(views, cut, 4), tiles.whole(covered, cut, 4)
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    expected[0, 0] = expected[1, 1] = expected[-1, -1] = True
    changed = (before != after).any(0)
    assert torch.equal(changed, expected.repeat_interleave(4, 0).repeat_interleave(4, 1))
    torch.testing.assert_close(after[:, 0, 0], before.mean((1, 2)))
    seen = (covered[0] != views[0]).any(0)
    assert seen[0, 0]
    assert seen[-1, -1]
    assert seen.float().mean().item() == pytest.approx(3 / (rows * columns), abs=0.02)
    differs = covered != views
    assert torch.equal(differs.any(1), differs.all(1))  # all three colours


def test_an_answer_in_tiles_rests_on_what_is_covered(answerer, monkeypatch):
    monkeypatch.setattr(settings.Settings, "max_new_tokens", 8)
    prompt = prompt_about(answerer, tiny_models.picture(size=(60, 90)))
    (maps,) = answerer.encode(prompt)[2]
    found = answerer.prove(prompt, "abc", proof.Change(0, tuple(range(maps.patches // 2))))
    assert found.before != pytest.approx(found.after, rel=1e-3)
    again = answerer.prove(prompt, "abc", proof.Change(0, (0,)))
    assert abs(again.after - again.before) < abs(found.after - found.before)


@pytest.mark.parametrize("count", [0, 10, 2.5, "many"])
def test_a_number_of_tiles_out_of_range_is_refused(count):
    with pytest.raises(Refusal, match="number of tiles must be"):
        settings.checked(None, "", 0, 1, 8, count)
    assert settings.checked(None, "", 0, 1, 8, 9.0).tiles == 9


def test_what_takes_no_tiles_says_so():
    picture = tiny_models.picture(size=(60, 90))
    grid = space_server.make_answerer(projector={"projector_type": "pixel_shuffle", "visual_tokens": [3, 3]})
    nine = replace(NINE, visual_tokens=None)
    with pytest.raises(Refusal, match="`pixel_shuffle` is made for the grid of one tile"):
        grid.look([picture], nine)
    grid.processor.tiles_apart = True
    with pytest.raises(Refusal, match="read each tile with all visual tokens; please ask without tiles"):
        grid.look([picture], nine)
    native = space_server.make_answerer("siglip2_vision_model")
    native.processor = tiny_models.tiny_processor("siglip2_vision_model")
    with pytest.raises(Refusal, match="reads pictures at their own proportions, without tiles"):
        native.look([picture], NINE)


def test_of_a_picture_in_tiles_most_views_decide_whether_it_is_foreign(answerer, monkeypatch):
    seen = []
    told = answering.Answerer(answerer.model, answerer.processor, "tiny", known=known.Known({}, 1, frozenset(), 1, []))
    monkeypatch.setattr(known.Known, "is_foreign", lambda _, states: seen.append(states) or len(seen) <= foreign)
    for foreign, verdict in ((4, True), (3, False)):
        seen.clear()
        told.forget()
        (maps,) = told.look([tiny_models.picture(size=(48, 72))], NINE)
        assert (len(seen), maps.foreign) == (7, foreign > 3)
        assert maps.foreign == verdict


# --- On the pages and by the API ------------------------------------------------------------------------------------


def test_the_same_question_with_one_tile_and_with_nine(answerer, large_file, monkeypatch):
    monkeypatch.setattr(settings.Settings, "max_new_tokens", 8)
    page = compare_page.ComparePage(answerer, answerer, examples.examples_for("tiny"))
    message = {"text": QUESTION, "files": [large_file]}
    *_, (_, one, one_view, other, other_view, _) = page.compare(message, 1, False, 16, 16, None, 9)
    shown = [view["pictures"][0] for view in (one_view, other_view)]
    assert [(view["tiles"], view["patch_grid"]) for view in shown] == [([1, 1], [6, 6]), ([2, 3], [12, 18])]
    assert [view["read"] for view in shown] == [16, 16]
    assert one
    assert other
    assert "note" not in one_view


def test_a_layer_of_a_picture_in_tiles_is_told(answerer, large_file, monkeypatch):
    monkeypatch.setattr(settings.Settings, "max_new_tokens", 8)
    page = ask_page.AskPage(answerer, examples.examples_for("tiny"))
    history = [conversation.user_turn(QUESTION, [large_file], []), conversation.assistant_turn("ab")]
    asked = {"number": 0, "request": 1, "visual_tokens": 16, "system_prompt": "", "tiles": 9, "picture": 0}
    told = page.layer(history, SimpleNamespace(**asked, layer=0, scope=0, head=1))["layer"]
    assert told["layer"] == 0
    proved = page.prove(history, SimpleNamespace(**asked, patches=[215], scope=None))  # of 12 x 18
    assert proved["proof"]["patches"] == (215,)


@pytest.fixture
def knowing(monkeypatch):
    made = space_server.make_answerer()
    made.known = known.Known({}, 1.0, frozenset({"what", "is", "this"}), 0.0, [QUESTION])
    monkeypatch.setattr(known.Known, "is_foreign", lambda *_: False)
    monkeypatch.setattr(settings.Settings, "max_new_tokens", 8)
    return made


def test_both_sides_of_a_comparison_have_the_note(knowing, large_file):
    page = compare_page.ComparePage(knowing, knowing, examples.examples_for("tiny"))
    chosen = (1, False, 4, 9)
    message = {"text": "What is Paris?", "files": [large_file]}
    *_, (_, _, one, _, other, _) = page.compare(message, *chosen)
    button = {"value": QUESTION, "label": QUESTION}
    assert one["note"] == other["note"]
    assert one["note"] == {"text": "The model has not learned the word “Paris”.", "buttons": [button], "about": None}
    *_, (asked, _, one, *_) = page.take(SimpleNamespace(value=QUESTION, about=None), message, *chosen)
    assert asked == QUESTION
    assert "note" not in one
    scene = page.examples.shown[2]
    *_, (asked, _, one, *_) = page.take(SimpleNamespace(value="2", about=None), {"text": "", "files": []}, *chosen)
    assert (asked, one["example"]) == (scene.question, 2)
    assert (one["note"]["about"], "has not learned" in one["note"]["text"]) == (2, True)
    *_, (asked, _, one, *_) = page.take(SimpleNamespace(value="Why?", about=2), {"text": "", "files": []}, *chosen)
    assert (asked, one["example"], one["note"]["about"]) == ("Why?", None, 2)
    reduced = page.sides[2]
    assert reduced.reducers
    *_, (_, _, _, _, other, _) = page.compare(message, 2, False, 4, 4)
    assert other["note"]["buttons"] == [button]


def test_the_api_tells_what_is_foreign_and_takes_tiles(knowing, large_file, monkeypatch):
    told = api.Api(knowing)
    file = {"path": large_file, "meta": {"_type": "gradio.FileData"}}
    plain = (None, "", 0, 1, 8)
    *_, last = told.ask([file], QUESTION, *plain, None)
    assert (last["note"], last["tiles"], last["patches"]) == (None, [[1, 1]], [36])
    *_, last = told.ask([file], "Is Paris this?", 16, *plain[1:], 9)
    assert last["note"] == {"sentence": "The model has not learned the word “Paris”.", "questions": [QUESTION]}
    assert (last["tiles"], last["patches"], last["visual_tokens"]) == ([[2, 3]], [216], [16])
    (image,) = told.scopes([file], 16, 9)["images"]
    assert (image["patch_grid"], image["overview_grid"]) == ([12, 18], [2, 2])
    monkeypatch.setattr(known.Known, "is_foreign", lambda *_: True)
    knowing.forget()
    *_, last = told.ask([file], QUESTION, *plain, None)
    assert last["note"]["sentence"].startswith("This picture is unlike")
    assert last["note"]["questions"] == []  # none about this picture
