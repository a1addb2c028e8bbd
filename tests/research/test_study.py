"""The study: what every run shares, fair conditions, statistics against scipy's and plain ones, and its report."""

import dataclasses
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from ms_resampler.branches_ms_resampler import cell_centres, sincos_positions
from ms_resampler.tiny.curriculum import ALL_NAMES
from ms_resampler.tiny.scenes import COLOURS
from research.study.__main__ import main
from research.study.conduct import (
    all_runs,
    best_rates,
    comparable_here,
    conduct,
    finished_runs,
    perform_study,
    seeds_of_elsewhere,
)
from research.study.data import (
    CHANNELS,
    GRID,
    LABELS,
    PATCH_PIXELS,
    PATCHES,
    STUDY_FAMILIES,
    DataSettings,
    Split,
    StudyData,
    content_words,
    data_folder,
    described_scene,
    patch_labels,
    questions_of,
    study_scene,
)
from research.study.plan import (
    ABLATIONS,
    AMID_PAPER,
    BASELINE,
    IN_WORLDS,
    LOCAL,
    OURS,
    PEERS,
    REFERENCE,
    TOLD,
    WITH_QUERIES,
    Study,
    count_parameters,
    further_runs,
    main_runs,
    make_projector,
    make_run,
    margin_runs,
    sweep_runs,
    world_runs,
)
from research.study.reader import WIDTH, Batches, Reader, pretrained_reader, reading_loss
from research.study.reduced import reducers_of, scores_of
from research.study.report import (
    ablation_table,
    check_report,
    elastic_table,
    margin_tables,
    report_text,
    rivals,
    world_tables,
    write_report,
)
from research.study.results import REPORT, RESULTS, Results, adopt, collect, compact, load, result_path, run_of, save
from research.study.run import Student, data_of, last_attention, learn, patches_right, perform
from research.study.statistics import (
    GROUPS,
    ROWS,
    corrected,
    difference,
    estimate,
    group_means,
    overall,
    resampled_means,
    score_matrix,
)
from research.study.worlds import (
    EVEN,
    LARGE_GRID,
    MARGINS,
    UNEVEN,
    amid_paper,
    grid_of,
    in_world,
    layout_of,
    merging,
)

RATES = dict.fromkeys((*PEERS, *REFERENCE), 2e-3)
SMALL = Study(
    arms=(OURS, BASELINE, WITH_QUERIES, "avg_pool", "token_packer", "mlp"),
    budgets=(16, 9),
    seeds=2,
    learning_rates=(1e-3, 2e-3),
    steps=3,
    batch_size=4,
    data=DataSettings(train_scenes=20, validation_scenes=6, test_scenes=60, tower_steps=2, reader_steps=2),
)


# --- Data -------------------------------------------------------------------------------------------------------


def test_a_patch_is_labelled_with_the_thing_over_its_centre():
    for index in range(20):
        scene = study_scene("train", index)
        labels = patch_labels(scene)
        for patch, (name, colour) in enumerate(labels.tolist()):
            x, y = ((n + 0.5) * PATCH_PIXELS for n in (patch % GRID[1], patch // GRID[1]))
            over = [t for t in scene.things if t.box[0] <= x < t.box[2] and t.box[1] <= y < t.box[3]]
            found = [] if name == 0 else [(ALL_NAMES[name - 1], list(COLOURS)[colour - 1])]
            assert found == [(thing.name, thing.colour) for thing in over]


def test_content_words_tell_questions_apart():
    assert content_words("Is the red 7 left of the word star?") == ["red", "7", "left", "star"]
    for index in range(200):
        scene = study_scene("train", index)
        answers: dict[tuple, set] = {}
        for asked in questions_of(scene, "train", index, 24):
            words = tuple(content_words(asked.question))
            assert 1 <= len(words) <= 5
            answers.setdefault(words, set()).add(asked.answer)
        assert all(len(different) == 1 for different in answers.values())


@pytest.mark.parametrize("margin", MARGINS.values())
def test_a_scene_amid_paper_is_the_scene_and_the_mean_of_its_paper(margin):
    """Patch by patch; codes of places are those of the larger picture."""
    torch.manual_seed(0)
    seen_BNC = torch.randn(3, PATCHES, CHANNELS)
    labels_BN2 = torch.randint(0, 2, (3, PATCHES, 2), dtype=torch.uint8)
    codes_NC, large_codes_NC = (0.5 * sincos_positions(cell_centres(grid), CHANNELS) for grid in (GRID, LARGE_GRID))
    nothing = torch.zeros(0)
    split = Split((seen_BNC + codes_NC).numpy(), labels_BN2, nothing, nothing, nothing, nothing)
    large = amid_paper(split, margin, 0.5)
    for pictures in (np.array([2, 0]), slice(0, 3)):
        numbers = np.arange(3)[pictures]
        x_BHWC = torch.from_numpy(large.features_BNC[pictures]) - large_codes_NC
        x_BHWC, labels_BHW2 = (part.unflatten(1, LARGE_GRID) for part in (x_BHWC, large.labels_BN2[pictures]))
        for picture, x_HWC, labels_HW2 in zip(numbers, x_BHWC, labels_BHW2, strict=True):
            paper = seen_BNC[picture][labels_BN2[picture, :, 0] == 0].mean(0)
            for row, column in np.ndindex(LARGE_GRID):
                inside = 0 <= row - margin < GRID[0] and 0 <= column - margin < GRID[1]
                patch = (row - margin) * GRID[1] + column - margin
                expected = seen_BNC[picture, patch] if inside else paper
                torch.testing.assert_close(x_HWC[row, column], expected, rtol=0, atol=2e-6)
                assert labels_HW2[row, column].tolist() == (labels_BN2[picture, patch].tolist() if inside else [0, 0])


def test_cells_amid_paper_are_the_places_or_lie_across_them():
    """One centre of a thing at most in each cell, or several; cells with patches of two things are fewer, or more."""
    shares = {}
    for name, margin in MARGINS.items():
        centres, things = [], []
        for index in range(50):
            scene = study_scene("train", index)
            number_HW, centre_HW = np.zeros((2, *LARGE_GRID), int)
            for number, thing in enumerate(scene.things, start=1):
                alone = dataclasses.replace(scene, things=[thing])
                inside = number_HW[margin : margin + GRID[0], margin : margin + GRID[1]]
                inside[patch_labels(alone)[:, 0].reshape(GRID) > 0] = number
                x, y = (int(part // PATCH_PIXELS) + margin for part in thing.centre)
                centre_HW[y, x] = number
            for kept, found_HW in ((centres, centre_HW), (things, number_HW)):
                cells = found_HW.reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)
                kept += [len(set(cell.tolist()) - {0}) for cell in cells]
        shares[name] = max(centres), np.mean(np.array([n for n in things if n]) > 1)
    assert shares["on the places"][0] == 1
    assert shares["across them"][0] > 1
    assert shares["on the places"][1] < 0.3 < 1.3 * shares["on the places"][1] < shares["across them"][1]


@pytest.mark.parametrize("world", UNEVEN)
def test_layouts_keep_the_order_of_places_and_stay_on_the_page(world):
    layout = layout_of(world, 0, 300)
    rows_B6, columns_B66 = layout.rows_B6, layout.columns_B66
    for lines in (rows_B6, columns_B66):
        assert (np.diff(lines, axis=-1) > 0).all()
        assert lines.min() == 0
        assert lines.max() == GRID[0] - 1
        assert (np.diff(lines, axis=-1)[..., ::2] == 1).all()  # the two rows, or columns, of a place touch
    assert np.array_equal(columns_B66[:, ::2], columns_B66[:, 1::2])
    parted = [(np.diff(lines, axis=-1) > 1).any() for lines in (rows_B6, columns_B66)]
    assert parted == {"quarter": [False, False], "lines": [True, False], "clusters": [True, True]}[world.split(",")[0]]
    assert layout_of(world, 1, 300).rows_B6.tolist() != rows_B6.tolist()
    again = layout_of(world, 0, 300)
    assert np.array_equal(again.columns_B66, columns_B66)
    for patch, (y, x) in enumerate(layout.points_BN2[7].tolist()):
        i, j = divmod(patch, GRID[1])
        assert 12 * y == pytest.approx(rows_B6[7, i // 2] + (0.25, 0.75)[i % 2])
        assert 12 * x == pytest.approx(columns_B66[7, i // 2, j // 2] + (0.25, 0.75)[j % 2])


@pytest.mark.parametrize("world", UNEVEN)
def test_a_page_has_the_scene_at_its_places_and_paper_elsewhere(world, tmp_path):
    torch.manual_seed(0)
    codes_NC = 0.5 * sincos_positions(cell_centres(GRID), CHANNELS)
    seen_BNC = torch.randn(6, PATCHES, CHANNELS)
    labels_BN2 = torch.randint(0, 2, (6, 6, 1, 6, 1, 2), dtype=torch.uint8).expand(-1, -1, 2, -1, 2, -1)
    labels_BN2 = labels_BN2.reshape(6, PATCHES, 2)
    nothing = torch.zeros(0)
    split = Split((seen_BNC + codes_NC).numpy(), labels_BN2, nothing, nothing, nothing, nothing)
    data = StudyData(tmp_path, dict.fromkeys(("train", "validation", "test"), split), [], [])
    page = in_world(data, world, 0.5).splits["test"]
    how = {name: torch.from_numpy(part).double() for name, part in merging(data, 0.5).items()}
    assert torch.equal(page.labels_BN2, labels_BN2)
    layout, papers = layout_of(world, 2, 6), set()
    for pictures in (np.array([4, 1]), slice(0, 6)):
        x_BHWC = torch.from_numpy(page.features_BNC[pictures]).double() - codes_NC
        for picture, x_HWC in zip(np.arange(6)[pictures], x_BHWC.unflatten(1, GRID), strict=True):
            seen_HWC, blank = seen_BNC[picture].unflatten(0, GRID).double(), np.ones(GRID, bool)
            for i, j in np.ndindex(6, 6):
                four = torch.cat([seen_HWC[2 * i + n // 2, 2 * j + n % 2] for n in range(4)])
                row, column = layout.rows_B6[picture, i], layout.columns_B66[picture, i, j]
                expected = (four - how["mean"]) @ how["components"]
                torch.testing.assert_close(x_HWC[row, column], expected, rtol=2e-3, atol=5e-3)  # half precision
                blank[row, column] = False
            assert blank.sum() == 144 - 36
            papers |= {tuple(patch.tolist()) for patch in x_HWC[blank].float().mul(100).round().int()}
    kinds = how["paper"] if world.endswith("textured") else how["paper"].mean(0, keepdim=True)
    assert papers <= {tuple(patch.tolist()) for patch in kinds.float().mul(100).round().int()}
    assert len(papers) > 100 if world.endswith("textured") else len(papers) == 1


def test_four_patches_become_one_along_their_principal_components(tmp_path):
    """As scikit-learn has them; paper is what has no label."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    torch.manual_seed(0)
    mixed = torch.randn(20, PATCHES, CHANNELS) @ torch.randn(CHANNELS, CHANNELS)
    labels_BN2 = torch.zeros(20, PATCHES, 2, dtype=torch.uint8)
    labels_BN2[:19] = 1
    nothing = torch.zeros(0)
    split = Split(mixed.numpy(), labels_BN2, nothing, nothing, nothing, nothing)
    how = merging(StudyData(tmp_path, {"train": split}, [], []), 0)
    four = mixed.reshape(20, 6, 2, 6, 2, CHANNELS).transpose(2, 3).reshape(720, 4 * CHANNELS).double().numpy()
    pca = decomposition.PCA(CHANNELS, svd_solver="full").fit(four)
    along = pca.transform(four)
    ours = (four - how["mean"]) @ how["components"]
    np.testing.assert_allclose(np.abs(ours), np.abs(along) / along.std(), atol=1e-3)
    np.testing.assert_allclose(how["paper"], ours[-36:], atol=1e-3)


@pytest.mark.slow
def test_budgets_together_are_all_learned_in_every_step(studied):
    out, _, _ = studied
    run = dataclasses.replace(make_run(SMALL, OURS, (16, 9), 0, 1e-3, together=True), steps=1)
    data = data_of(run, out)

    def student() -> Student:
        torch.manual_seed(0)
        return Student(make_projector(run.projector), pretrained_reader(data, SMALL.data.reader_steps))

    pictures, *asked = Batches(data, run.batch_size, run.seed).next()
    x_BNC = torch.from_numpy(data.splits["train"].features_BNC[pictures.numpy()].astype(np.float32))
    points = cell_centres(GRID)[None]
    alone = [
        reading_loss(student().reader, student().tokens(x_BNC, grid, points), *asked).item()
        for grid in ((4, 4), (3, 3))
    ]
    assert learn(student(), run, data, torch.device("cpu")) == pytest.approx(np.mean(alone), rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=1e-5)


def test_an_oracle_gives_the_scene_nearly_all_of_space():
    """Its 36 of 144 patches have all but the floor's share: of cells of equal mass, none is wholly on the page."""
    layout = layout_of("quarter", 0, 4)
    student = Student(make_projector(make_run(Study(), TOLD, [9], 0, 0, "quarter").projector), Reader(50, 20))
    student.tokens(torch.randn(4, PATCHES, CHANNELS), (3, 3), layout.points_BN2)
    inside_BHW = torch.zeros(4, *GRID)
    for picture, row, column in np.ndindex(4, 6, 6):
        inside_BHW[picture, layout.rows_B6[picture, row], layout.columns_B66[picture, row, column]] = 1
    space = student.projector.space
    assert torch.equal(space.told_BHW, inside_BHW)
    rho_BHW = space.how_much(torch.zeros(4, PATCHES, 112), GRID)
    torch.testing.assert_close(rho_BHW.sum((1, 2)), torch.ones(4))
    torch.testing.assert_close((rho_BHW * inside_BHW).sum((1, 2)), torch.full((4,), 0.95 + 0.05 / 4))


@pytest.mark.slow
def test_a_run_is_made_in_every_world(studied, tmp_path):
    out = tmp_path
    shutil.copytree(data_folder(studied[0], SMALL.data), data_folder(out, SMALL.data))
    for world in UNEVEN:
        run = make_run(SMALL, f"{OURS}, moving", [9], 0, 1e-3, world)
        assert run.patch_grid == grid_of(world) == GRID
        result = perform(run, out)
        assert np.shape(result["scopes"]["places"]) == (3, 9, 2)
        assert len(result["test"]["9"]["dense"]) == 2 * SMALL.data.test_scenes
        assert run_of(json.loads(json.dumps(result))).name == run.name


def test_worlds_are_compared_with_one_local_scope():
    runs = []
    for world, letters in (("lines", ("00", "11")), (EVEN, ("11", "00"))):
        for arm, right in zip((LOCAL, f"{LOCAL}, moving"), letters, strict=True):
            plain = scored(arm, "here", 0, right)
            nine = {part: {"9": plain[part]["16"]} for part in ("test", "validation")}
            runs.append(plain | nine | {"run": plain["run"] | {"world": world, "grids": [[3, 3]]}})
    results = Results({"budgets": [9]}, {LOCAL: 1e-3}, {}, runs)
    lines = [line.strip("| ").split(" | ") for line in world_tables(results).splitlines()]
    assert lines[0][1:] == ["lines", EVEN]
    assert lines[2] == [f"{LOCAL}: score", "12.5", "87.5"]
    assert [line[1:] for line in lines if line[0] == f"{LOCAL}, moving"] == [
        ["+75.0 (+75.0, +75.0)", "-75.0 (-75.0, -75.0)"]
    ]
    assert [line[:4] for line in lines[-2:]] == [
        ["lines", "+100.0*", "+100.0*", "+100.0*"],
        [EVEN, "-100.0*", "-100.0*", "-100.0*"],
    ]
    assert world_tables(dataclasses.replace(results, runs=runs[2:])) == ""


def test_an_examination_asks_each_family_at_most_once_and_misses_none():
    for index in range(30):
        scene = study_scene("test", index)
        asked = [question.family for question in questions_of(scene, "test", index, 24)]
        assert len(set(asked)) == len(asked)
        assert {"colour", "where", "count"} <= set(asked) <= set(STUDY_FAMILIES)


def test_a_description_says_what_stands_where():
    scene = study_scene("train", 5)
    things, centres = described_scene(scene)
    assert (things[:, 0] > 0).sum() == len(scene.things)
    for thing in scene.things:
        row = np.abs(centres * 96 - np.array(thing.centre[::-1])).sum(1).argmin()
        assert ALL_NAMES[things[row, 0] - 1] == thing.name
        assert list(COLOURS)[things[row, 1] - 1] == thing.colour


# --- Reader -----------------------------------------------------------------------------------------------------


def test_a_question_is_answered_alike_alone_and_beside_others():
    reader, y_BMD = Reader(50, 20).eval(), torch.randn(2, 9, WIDTH)
    words = torch.randint(1, 50, (2, 3, 6))
    words[0, 1, 2:] = 0
    together = reader(y_BMD, words)
    torch.testing.assert_close(reader(y_BMD[:1], words[:1, 1:2, :]), together[:1, 1:2])
    torch.testing.assert_close(reader(y_BMD[:1], words[:1, 1:2, :4]), together[:1, 1:2], msg="blanks count")
    assert not torch.allclose(together[:, 0], together[:, 1])


def test_patches_are_probed_alike_alone_and_all_together():
    reader, y_BMD = Reader(50, 20).eval(), torch.randn(2, 9, WIDTH)
    centres_N2, some = cell_centres(GRID), torch.tensor([3, 77])
    everything = reader.probe(y_BMD, centres_N2[None])
    torch.testing.assert_close(reader.probe(y_BMD, centres_N2[None, some]), everything[:, some])
    own_BP2 = torch.stack([centres_N2[some], centres_N2[[0, 9]]])
    expected = torch.stack([everything[0, some], everything[1, [0, 9]]])
    torch.testing.assert_close(reader.probe(y_BMD, own_BP2), expected)
    assert everything.shape == (2, PATCHES, sum(LABELS.values()))


def test_the_attention_that_is_kept_is_what_the_answer_reads():
    reader = Reader(50, 20).eval()
    y_BMD = torch.randn(2, 4, WIDTH)
    block = reader.blocks[-1]
    torch.nn.init.zeros_(block.k_proj.weight)  # every token alike: attention is even
    with last_attention(reader) as attention:
        reader(y_BMD, torch.randint(1, 50, (2, 3, 6)))
    torch.testing.assert_close(attention(), torch.full((2, 3, 4), 0.25))
    reader(y_BMD[:1], torch.randint(1, 50, (1, 5, 6)))
    assert attention().shape == (2, 3, 4), "what is read later is kept, too"


def test_patches_right_are_a_share_of_those_there_or_said_to_be():
    names, colours = LABELS.values()
    labels = torch.tensor([[[5, 2], [0, 0], [7, 1], [0, 0]]])
    said = [(5, 2), (3, 1), (7, 4), (0, 0)]  # right, a false alarm, a wrong colour, rightly nothing
    logits = torch.zeros(1, 4, names + colours)
    for patch, (name, colour) in enumerate(said):
        logits[0, patch, [name, names + colour]] = 1.0
    assert patches_right(logits, labels).tolist() == pytest.approx([1 / 3])


# --- Plan -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_widths_make_parameters_comparable_where_there_is_a_width():
    counts = {arm: count_parameters(make_run(Study(), arm, [16], 0, 0).projector) for arm in PEERS}
    without_a_width = {"avg_pool", "pixel_shuffle", "ldp", "ldp_v2", "mqt", "llava_mini", "saep"}
    smallest_is_larger = {"perceiver", "idefics2_perceiver"}
    for arm, count in counts.items():
        if arm not in without_a_width | smallest_is_larger:
            assert count == pytest.approx(counts[OURS], rel=0.08), arm
    assert all(counts[arm] < 2.1 * counts[OURS] for arm in smallest_is_larger)


def test_the_plan_is_complete():
    study = Study()
    main_plan = main_runs(study, RATES)
    fixed = [arm for arm in study.arms if arm != "mlp"]
    assert {(run.arm, run.tokens, run.seed) for run in main_plan} == {
        *((arm, str(budget), seed) for arm in fixed for budget in study.budgets for seed in range(5)),
        *(("mlp", "144", seed) for seed in range(5)),
    }
    assert len(main_plan) == 5 * (3 * len(fixed) + 1)
    assert len(sweep_runs(study)) == 3 * (len(study.arms) - 1)  # one has the rate of ours
    further = further_runs(study, RATES)
    assert {run.arm for run in further if len(run.grids) == 1} == set(ABLATIONS)
    assert {run.tokens for run in further} == {"16", "9 to 36"}
    assert {(run.arm, run.world, run.grids) for run in margin_runs(study, RATES)} == {
        (arm, world, ((4, 4),)) for arm in AMID_PAPER for world in ("on the places", "across them")
    }
    assert margin_runs(study, {OURS: 1e-3}) == []  # nothing to compare with
    assert [run.seed for run in world_runs(study, RATES)] == [seed for seed in range(5) for _ in range(5 * 7 - 1)]
    assert {(run.arm, run.world, run.grids) for run in world_runs(study, RATES)} == {
        (arm, world, ((3, 3),)) for arm in IN_WORLDS for world in (EVEN, *UNEVEN) if (arm, world) != (TOLD, EVEN)
    }
    assert world_runs(study, {OURS: 1e-3}) == []


def test_every_projector_of_the_plan_can_be_made():
    for run in {
        run.arm + run.tokens: run for run in [*main_runs(Study(), RATES), *further_runs(Study(), RATES)]
    }.values():
        assert count_parameters(run.projector) > 0


def test_a_result_is_known_by_all_that_decides_it():
    run = make_run(Study(), OURS, [16], 0, 2e-3)
    assert dataclasses.replace(run, arm="another name").name == run.name
    changes = {"seed": 1, "learning_rate": 1e-3, "steps": 7, "batch_size": 8, "grids": ((3, 3),)}
    changes |= {"world": "lines"}
    changes |= {"data": DataSettings(tower_steps=7), "projector": {**run.projector, "fusion": "mean"}}
    names = {dataclasses.replace(run, **{key: value}).name for key, value in changes.items()}
    assert len(names | {run.name}) == len(changes) + 1
    assert run.name == "da870040e1323b3c"  # or all that people have trained would be trained anew
    margin = make_run(Study(), OURS, [16], 5, 2e-3, "on the places")
    assert margin.name == "59423768d9635ae7"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--projectors mpl", "The study knows no projector 'mpl'; it knows ms_resampler, resampler, "),
        ("--projectors token_packer --budgets 25", "a grid of 12 x 12 patches cannot become 5 x 5 tokens"),
        ("--reducer fastv", "fastv reads a CLS token or a language model, and a study has none: use divprune"),
        ("--reducer divprune --budgets 200", "divprune cannot keep 200 of 144 visual tokens"),
        ("--reducer divprune", "There are no results of a study in "),
        ("--budgets 200", "A budget of 200 visual tokens is impossible for 12 x 12 = 144 patches"),
    ],
)
def test_what_cannot_be_studied_is_said_before_anything_is_trained(line, sentence, tmp_path, capsys):
    assert main([*shlex.split(line), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- Statistics -------------------------------------------------------------------------------------------------


def random_scores(seeds=3, pictures=40, level=0.6):
    rng = np.random.default_rng(1)
    scores = (rng.random((seeds, len(ROWS), pictures)) < level).astype(float)
    scores[:, :-1] = np.where(rng.random((len(ROWS) - 1, pictures)) < 0.3, np.nan, scores[:, :-1])
    return scores


def test_scores_are_read_back():
    letters = dict.fromkeys(STUDY_FAMILIES, "10-1")
    scores = score_matrix({**letters, "dense": bytes([0, 50, 100, 7]).hex()})
    np.testing.assert_array_equal(scores[0], [1, 0, np.nan, 1])
    np.testing.assert_array_equal(scores[-1], [0, 0.5, 1, 0.07])


def test_groups_are_means_of_families_and_overall_of_groups():
    scores = random_scores()
    means = estimate(scores).mean_G
    plain = {}
    for group in GROUPS:
        rows = [row for row, name in enumerate(ROWS.values()) if name == group]
        plain[group] = np.mean([np.nanmean(scores[:, row]) for row in rows])
    np.testing.assert_allclose(means, [*plain.values(), np.mean(list(plain.values()))])


def test_the_interval_of_one_seed_is_scipys_bootstrap():
    scores = np.random.default_rng(2).random((1, len(ROWS), 150))
    ours = estimate(scores)
    per_picture = group_means(scores[0].T)[:, -1]
    theirs = stats.bootstrap((per_picture,), np.mean, method="percentile", rng=np.random.default_rng(0))
    np.testing.assert_allclose([ours.low_G[-1], ours.high_G[-1]], theirs.confidence_interval, atol=0.002)


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(3)
    level = np.array([0.2, 0.4, 0.6, 0.8])[:, None, None]
    scores = (rng.random((4, len(ROWS), 400)) < level).astype(float)
    spread = resampled_means(scores)[:, -1].std()
    assert spread == pytest.approx(np.std([0.2, 0.4, 0.6, 0.8]) / 2, rel=0.15)


def test_a_difference_is_paired_over_seeds_and_pictures():
    ours, other = random_scores(level=0.7), random_scores(level=0.6)
    validation = np.array([0.02, 0.05, 0.03])
    found = difference(ours, other, validation)
    by_seed = [[group_means(np.nanmean(part[seed], axis=1))[-1] for seed in range(3)] for part in (ours, other)]
    assert found.p == pytest.approx(stats.ttest_rel(*by_seed).pvalue)
    gaps = np.subtract(*by_seed)
    assert found.estimate.mean_G[-1] == pytest.approx(gaps.mean())
    # What all seeds and pictures share leaves no doubt, however much scores vary.
    shifted = difference(ours + np.array([0.124, 0.125, 0.126])[:, None, None], ours, validation).estimate
    np.testing.assert_allclose([shifted.low_G, shifted.high_G], 0.125, atol=0.001)
    theirs = stats.ttest_1samp(validation, 0).confidence_interval()
    assert found.validation == pytest.approx((validation.mean(), *theirs))
    single = difference(ours[:1], other[:1], validation[:1])
    assert np.isnan([single.p, *single.validation[1:]]).all()
    assert single.validation[0] == 0.02


def test_p_values_are_adjusted_for_their_number():
    np.testing.assert_allclose(corrected([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])


# --- The whole ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of a few steps: folder, learning rates, results."""
    out = tmp_path_factory.mktemp("study")
    rates, results = perform_study(SMALL, out, workers=2)
    return out, rates, results


@pytest.mark.slow
def test_a_study_resumes_and_gives_the_same_again(studied, capsys):
    out, rates, results = studied
    files = sorted((out / "runs").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == len({json.dumps(result["run"]) for result in results})
    lost = json.loads(files[0].read_text())
    files[0].unlink()
    capsys.readouterr()
    again_rates, again = perform_study(SMALL, out, workers=1)
    assert again_rates == rates
    assert capsys.readouterr().out.count("min left)") == 1
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]
    anew = json.loads(files[0].read_text())
    assert {**anew, "seconds": 0} == {**lost, "seconds": 0}
    assert len(again) == len(results)


def test_a_student_reads_what_divprune_leaves_of_its_tokens():
    run = make_run(SMALL, "mlp", [9], 0, 1e-3)
    student = Student(make_projector(run.projector), Reader(words=9, answers=4))
    x_BNC = torch.randn(2, PATCHES, CHANNELS)
    (reducer,) = reducers_of("divprune", [9])
    with torch.inference_mode():
        whole, left, made = (
            student.tokens(x_BNC, GRID, cell_centres(GRID)[None]),
            student.tokens(x_BNC, GRID, cell_centres(GRID)[None], reducer),
            student.projector(x_BNC, GRID, GRID),
        )
    for found, tokens, y_ND in zip(left, whole, made, strict=True):
        assert torch.equal(found, tokens[reducer.choose(y_ND).sort().values])  # each with the code of its own place


@pytest.mark.slow
def test_the_mlps_runs_are_scored_with_fewer_of_their_tokens(tmp_path, capsys):
    small = dataclasses.replace(SMALL, arms=(OURS, "mlp"), learning_rates=(1e-3,), ablations=False)
    rates, results = perform_study(small, tmp_path, workers=1)
    costs = {"machine": "a machine", "projectors": {"mlp": {"forward_x": 1.0}}}
    save(collect(small, rates, costs, results), tmp_path / "study", tmp_path)
    of_mlp = [result for result in results if result["run"]["arm"] == "mlp"]
    whole, most, few = scores_of(run_of(of_mlp[0]), reducers_of("divprune", [9, 16]), tmp_path)
    assert whole == of_mlp[0]["test"]["144"]  # trained again, it is the same
    assert len({json.dumps(scores) for scores in (whole, most, few)}) == 3
    assert main(["--reducer", "divprune", "--out", str(tmp_path), "--budgets", "9", "16"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["| 144", "| 16", "| 9"]
    mean = np.mean([overall(result["test"]["144"]) for result in of_mlp])
    assert rows[0][-1] == f"{100 * mean:.1f} |"


KILLED = """
import os, time
from research.study.workers import worker_pool
if __name__ == "__main__":
    with worker_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_study_that_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    with subprocess.Popen([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None
        worker = int(study.stdout.readline())
        os.kill(worker, 0)
        study.kill()
    deadline = time.monotonic() + 30
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker outlives the study"
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_the_report_is_made_of_the_results_and_checked_against_them(studied, tmp_path, capsys):
    out, rates, results = studied
    costs = {"macs": 1_000_000, "forward": 1.0, "backward": 2.0, "forward_x": 1.0, "backward_x": 1.0}
    about = {"machine": "a machine", "projectors": dict.fromkeys(SMALL.arms, costs)}
    save(collect(SMALL, rates, about, results), tmp_path / "study", out)
    write_report(tmp_path)
    assert main(["--check", str(tmp_path)]) == 0
    text = (tmp_path / "study.md").read_text()
    assert all(arm in text for arm in SMALL.arms)
    table = text.split(f"Each change to `{OURS}`, minus")[1].split("\n\n")[1]
    changes = [arm for arm, (changed, _) in ABLATIONS.items() if changed == OURS]
    assert re.findall(r"^\| ([\w ,]+) \(2 seeds\) \|", table, flags=re.MULTILINE) == changes
    both = r"\d[\d.]+: [+-][^|]+"
    assert re.search(rf"\| avg_pool \(2 seeds\) \| one, at random \| {both} \| {both} \|", text), "elastic budgets"
    assert re.search(rf"\| ms_resampler \(2 seeds\) \| all \| {both} \| {both} \|", text), "budgets together"

    shutil.copytree(tmp_path, other := tmp_path / "other", ignore=shutil.ignore_patterns("other"))
    (other / "study.md").write_text(text.replace("overall", "0verall", 1))
    with pytest.raises(ValueError, match="is not the report of the results in"):
        check_report(other)
    stored = other / "study" / "study.json"
    stored.write_text(stored.read_text() + "\n")
    (other / "study.md").write_text(text)
    capsys.readouterr()
    assert main(["--check", str(other)]) == 2
    assert "was not drawn from the results in" in capsys.readouterr().err
    stored.write_text(stored.read_text().replace("forward_x", "forward_times"))
    with pytest.raises(ValueError, match="was stored by another version of the study"):
        load(other / "study")


def test_the_learning_rate_is_chosen_by_validation_alone():
    def result(arm, rate, score, letter):
        test = {**dict.fromkeys(STUDY_FAMILIES, letter), "dense": "00"}
        return {"run": {"arm": arm, "learning_rate": rate}, "validation": {"16": score}, "test": {"16": test}}

    swept = [result(OURS, 1e-3, 0.8, "0"), result(OURS, 2e-3, 0.7, "1")]
    assert best_rates(Study(arms=(OURS,)), swept) == {OURS: 1e-3}
    equals = [result(OURS, rate, 0.8, "1") for rate in (4e-3, 1e-3, 2e-3)]
    assert best_rates(Study(arms=(OURS,)), equals) == {OURS: 1e-3}  # in whatever order they were done
    assert best_rates(Study(arms=(OURS, LOCAL)), swept) == {OURS: 1e-3, LOCAL: 1e-3}


def test_the_command_line_changes_the_study(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("research.study.conduct.conduct", lambda *args, **options: asked.append((*args, options)))
    line = "--quick --projectors mqt mlp --budgets 36 --seeds 3 --learning-rates .1 .2 --steps 9 --scenes 50"
    assert main([*shlex.split(line), "--out", str(tmp_path), "--workers", "2"]) == 0
    assert main(["--finished", "--report", str(tmp_path)]) == 0
    assert main(["--no-ablations"]) == 0
    (changed, *places), (default, *elsewhere), (short, *_) = asked
    assert (changed.arms, changed.budgets, changed.seeds) == ((OURS, BASELINE, "mqt", "mlp"), (36,), 3)
    assert (changed.learning_rates, changed.steps, changed.data.train_scenes) == ((0.1, 0.2), 9, 50)
    assert places == [tmp_path, None, 2, {"train": True}]
    assert default == Study()
    assert elsewhere == [Path("runs/study"), tmp_path, None, {"train": False}]
    assert short == dataclasses.replace(Study(), ablations=False)


def test_a_result_of_an_early_version_is_refused(tmp_path):
    run = main_runs(SMALL, RATES)[0]
    (tmp_path / "runs").mkdir()
    result_path(tmp_path, run).write_text('{"test": {}}')
    with pytest.raises(ValueError, match=rf"{run.name}.json was made by another version of the study: remove it"):
        perform(run, tmp_path)


def test_a_study_goes_on_from_the_stored_results(tmp_path):
    """Every run of theirs is found under the name that the plan has for it today, with their tower and reader."""
    stored = load(RESULTS)
    assert adopt(RESULTS, tmp_path) == len(stored.runs)
    study = Study(seeds=stored.study["seeds"], arms=tuple(stored.rates))  # later projectors are not among them
    planned = all_runs(study, stored.rates)
    kept = {path.name for path in (tmp_path / "runs").iterdir()}
    assert kept == {result_path(tmp_path, run).name for run in planned} & kept
    assert len(kept) == len(stored.runs)
    for name in ("tower.safetensors", "reader.safetensors"):
        assert (data_folder(tmp_path, study.data) / name).read_bytes() == (RESULTS / name).read_bytes()


def test_stored_results_do_not_go_on_with_another_tower(tmp_path):
    tower = data_folder(tmp_path, DataSettings()) / "tower.safetensors"
    tower.parent.mkdir()
    tower.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"is not the one stored in .*: work in a new folder \(--out\)"):
        adopt(RESULTS, tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_stored_report_is_that_of_the_stored_results():
    check_report(REPORT)
    results = load(RESULTS)
    assert isinstance(results, Results)
    assert len(report_text(results)) > 5_000


def scored(arm, made_with, seed, letters, tokens="16"):
    test = {**dict.fromkeys(STUDY_FAMILIES, letters), "dense": "3232"}
    run = {"arm": arm, "learning_rate": 1e-3, "seed": seed, "grids": [[4, 4]], "world": EVEN, "together": False}
    validation = {tokens: 0.5 + seed * letters.count("1")}
    return {"run": run, "made_with": made_with, "parameters": 1, "validation": validation, "test": {tokens: test}}


def test_runs_are_compared_only_with_those_of_the_same_tower_and_machine():
    ours, other = (OURS, "fixed", "16"), ("avg_pool", "fixed", "16")
    runs = [
        scored(OURS, "here", 0, "11"),
        scored(OURS, "here", 1, "10"),
        scored(OURS, "there", 2, "00"),
        scored("avg_pool", "there", 0, "11"),  # the same seed, another tower
        scored("avg_pool", "here", 1, "00"),
        scored("avg_pool", "there", 2, "01"),
    ]
    results = Results({"budgets": [16]}, {OURS: 1e-3, "avg_pool": 1e-3}, {}, runs)
    assert results.blocks(ours, other) == [("here", 1), ("there", 2)]
    plain = [np.stack([score_matrix(run["test"]["16"]) for run in pair]) for pair in (runs[1:3], runs[4:])]
    found = results.estimates(ours, other)
    np.testing.assert_array_equal(found[ours].mean_G, estimate(plain[0]).mean_G)
    np.testing.assert_array_equal(found[other].mean_G, estimate(plain[1]).mean_G)
    compared = results.difference(ours, other)
    assert compared.p == difference(*plain, np.zeros(2)).p
    assert compared.validation[0] == pytest.approx(np.mean([1 * 1 - 1 * 0, 2 * 0 - 2 * 1]))
    apart = dataclasses.replace(results, runs=[runs[0], runs[3]])
    with pytest.raises(ValueError, match="No seed is finished yet for all of ms_resampler, avg_pool"):
        apart.blocks(ours, other)


@pytest.mark.slow
def test_what_is_finished_is_found_before_the_rest_is_done(studied, tmp_path):
    out, rates, results = studied
    shutil.copytree(out, cut := tmp_path / "out")
    found_rates, found = finished_runs(SMALL, cut)
    assert found_rates == rates
    # A run that another test did again took another time.
    timeless = [{json.dumps({**result, "seconds": 0}, sort_keys=True) for result in some} for some in (found, results)]
    assert timeless[0] == timeless[1]
    lost = {run.name for run in main_runs(SMALL, rates) if run.seed == 1}
    for name in lost:
        (cut / "runs" / f"{name}.json").unlink()
    assert {run_of(result).name for result in finished_runs(SMALL, cut)[1]} == {
        run_of(json.loads(json.dumps(result))).name for result in results
    } - lost


@pytest.mark.slow
def test_what_is_finished_is_reported_and_nothing_stored_is_lost(studied, tmp_path, monkeypatch):
    monkeypatch.setattr("research.study.costs.REPEATS", 1)
    out, _, results = studied
    shutil.copytree(out, cut := tmp_path / "out")
    docs = tmp_path / "docs"
    conduct(SMALL, cut, docs, train=False)  # of a study that was killed before its first report, too
    stored = (docs / "study" / "runs.jsonl.gz").read_bytes()
    assert len(gzip.decompress(stored).splitlines()) == len({json.dumps(result["run"]) for result in results})
    assert main(["--check", str(docs)]) == 0

    smaller = dataclasses.replace(SMALL, seeds=1)
    with pytest.raises(ValueError, match=r"holds \d+ results that this study does not ask for, .* seed 1: .*--seeds 2"):
        conduct(smaller, cut, docs, train=False)
    assert (docs / "study" / "runs.jsonl.gz").read_bytes() == stored

    conduct(smaller, cut, train=False)  # in OUT itself, which keeps every run, another study may replace the report

    result_path(cut, sweep_runs(SMALL)[0]).unlink()
    with pytest.raises(ValueError, match="1 runs of the choice of learning rates are missing"):
        conduct(SMALL, cut, tmp_path / "other", train=False)
    with pytest.raises(SystemExit):
        main(["--finished", "--check", str(docs)])


def test_what_nothing_here_compares_with_is_not_run(tmp_path, capsys):
    """Seed 0 is done elsewhere, seed 1 in part, seed 2 here."""
    study = dataclasses.replace(SMALL, seeds=3)
    runs = main_runs(study, dict.fromkeys(study.arms, 1e-3))
    ours = [run for run in runs if run.arm == OURS]
    done = {run.name: "here" if run.seed == 2 else "there" for run in ours if (run.seed, run.tokens) != (1, "9")}
    (tmp_path / "runs").mkdir()
    for run in ours:
        if run.name in done:
            result_path(tmp_path, run).write_text(json.dumps({"made_with": done[run.name]}))
    assert seeds_of_elsewhere(runs, tmp_path, "here") == {0}
    kept = comparable_here(runs, tmp_path, {0})
    assert kept == [run for run in runs if run.seed or run.arm == OURS]
    assert f"Left out: {len(runs) - len(kept)} runs of seeds 0, whose" in capsys.readouterr().out


def test_elastic_weights_that_share_no_seed_with_fixed_ones_are_named():
    elastic = [scored(arm, "here", 0, "11") for arm in ("mqt", "avg_pool")]
    for run in elastic:
        run["run"]["grids"].append([3, 3])
    runs = [*elastic, scored("mqt", "here", 0, "10"), scored("avg_pool", "there", 0, "10")]
    text = elastic_table(Results({"budgets": [16]}, dict.fromkeys(("mqt", "avg_pool"), 1e-3), {}, runs))
    row = r"^\| (\w+) \(1 seed\) \| one, at random \| 87.5: \+37.5 "
    assert re.findall(row, text, flags=re.MULTILINE) == ["mqt"]
    assert text.endswith("Left out (too few shared seeds): avg_pool at 16 tokens.")


def test_scores_amid_paper_stand_apart():
    """By margin, and beside those of pictures without it, which stay what they are; differences, and their change."""
    runs = []
    for world, ours, theirs in ((EVEN, "11", "10"), ("on the places", "10", "11"), ("across them", "11", "00")):
        for arm, letters in ((OURS, ours), ("token_packer", theirs)):
            plain = scored(arm, "here", 0, letters)
            runs.append(plain | {"run": plain["run"] | {"world": world}, "scopes": {"sigmas": world, "maps": 1}})
    results = Results({"budgets": [16]}, dict.fromkeys(AMID_PAPER, 1e-3), {}, runs)
    assert results.arms("16") == [OURS, "token_packer"]
    ours = (OURS, "fixed", "16")
    assert results.estimates(ours)[ours].mean_G[0] == 1
    assert [scopes["sigmas"] for scopes in results.scopes("16")] == [EVEN]
    assert ["maps" in compact(run)["scopes"] for run in runs] == [True, False, False, False, False, False]
    rows = [line.strip("| ").split(" | ") for line in margin_tables(results).splitlines()]
    assert [(name, arm, local.split()[0]) for name, arm, _, local, *_ in rows[2:6]] == [
        ("on the places", OURS, "50.0"),
        ("on the places", "token_packer", "100.0"),
        ("across them", OURS, "100.0"),
        ("across them", "token_packer", "0.0"),
    ]
    assert [(title, local.split()[0]) for title, _, _, local, *_ in rows[-3:]] == [
        ("token_packer, cells on the places (1 seed)", "-50.0"),
        ("token_packer, cells across them (1 seed)", "+100.0*"),
        ("change (1 seed)", "+150.0*"),
    ]
    assert margin_tables(dataclasses.replace(results, runs=runs[:5])) == ""


def test_a_table_leaves_out_what_shares_no_seed_with_the_default():
    test = {**dict.fromkeys(STUDY_FAMILIES, "01"), "dense": "0011"}

    def result(arm, made_with, seed, score):
        scores = {"16": {**test, "read": score}}
        run = {"arm": arm, "seed": seed, "learning_rate": 1e-3, "grids": [[4, 4]], "world": EVEN, "together": False}
        return {"run": run, "made_with": made_with, "validation": {"16": 0.5}, "test": scores}

    runs = [
        result(OURS, "here", 0, "11"),
        result("two scopes", "here", 0, "10"),
        result("mean fusion", "there", 0, "11"),
    ]
    runs += [result("two scopes, learned queries", "there", 0, "11")]
    runs += [result("mqt", "there", 0, "11"), result("saep", "here", 0, "11"), result(WITH_QUERIES, "here", 0, "10")]
    results = Results({"budgets": [16]}, dict.fromkeys((OURS, WITH_QUERIES, "mqt", "saep"), 1e-3), {}, runs)
    assert [arm for arm, _, _ in results.contenders("16")] == [OURS, WITH_QUERIES, "saep"]
    assert list(rivals(results, "16")) == ["saep", WITH_QUERIES]  # the strongest first
    table = ablation_table(results, OURS)
    assert re.findall(r"^\| (.+) \(1 seed\) \| ", table, flags=re.MULTILINE) == ["two scopes"]
    assert table.endswith("Left out (too few shared seeds): mean fusion.")
    table = ablation_table(results, WITH_QUERIES)
    assert table.endswith("Left out (too few shared seeds): two scopes.")


def test_what_has_few_seeds_does_not_take_those_of_a_table_of_five():
    """Where there are fewer anyway, all share what they have in common."""
    seeds = {OURS: range(6), "mqt": range(1, 6), "saep": range(3), "avg_pool": range(6)}
    runs = [scored(arm, "here", seed, "11") for arm, some in seeds.items() for seed in some]
    results = Results({"budgets": [16]}, dict.fromkeys(seeds, 1e-3), {}, runs)
    assert {arm for arm, _, _ in results.contenders("16")} == {OURS, "mqt", "avg_pool"}
    assert {arm: difference.seeds for arm, difference in rivals(results, "16").items()} == {
        "mqt": 5,
        "saep": 3,
        "avg_pool": 6,
    }
    few = dataclasses.replace(results, runs=[run for run in runs if run["run"]["seed"] < 4])
    assert {arm for arm, _, _ in few.contenders("16")} == set(seeds)
    assert len(few.blocks(*few.contenders("16"))) == 2
