"""Moving scopes: space as it starts, where it goes, and what stays the same wherever it goes."""

import pytest
import torch
from test_resampler import GRIDS, MOVING, features, fresh, make

from ms_resampler.places_ms_resampler import MovingSpace, cell_centres


def moving_space(seed: int = 0) -> MovingSpace:
    torch.manual_seed(seed)
    space = MovingSpace(16)
    space.density.weight.data.normal_(std=0.2)
    return space.double()


@pytest.mark.parametrize("changes", [{}, {"pooled_mlp": True, "num_hidden_layers": 2}], ids=str)
def test_it_starts_as_the_resampler_whose_scopes_do_not_move(changes):
    """An old checkpoint is loaded, and everything is as before, where the grids divide evenly."""
    fixed, moving = make(**changes).double(), fresh(**MOVING, **changes).double()
    missing, unexpected = moving.load_state_dict(fixed.state_dict(), strict=False)
    assert sorted(missing) == ["space.code_proj.weight", "space.density.weight"]
    assert not unexpected
    x = features((4, 6)).double()
    (y, maps), (expected, expected_maps) = (model(x, (4, 6), (2, 3), output_scopes=True) for model in (moving, fixed))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vars(maps), vars(expected_maps), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(maps.places_BM2, cell_centres((2, 3), dtype=torch.float64).expand(2, -1, -1))


@pytest.mark.parametrize(("patch_grid", "token_grid"), GRIDS)
def test_every_row_of_tokens_holds_as_much_and_no_two_change_places(patch_grid, token_grid):
    space, u = moving_space(), torch.randn(3, patch_grid[0] * patch_grid[1], 16, dtype=torch.float64)
    with torch.no_grad():
        places, _ = space(u, patch_grid, token_grid)
        much_BH = space.how_much(u, patch_grid).sum(-1)
    assert (places.y_BH.diff() > 0).all()
    assert (places.x_BHW.diff() > 0).all()
    torch.testing.assert_close(places.rows_BYH.mean(1), much_BH)
    for share in (places.rows_BYH, places.columns_BHXW):
        torch.testing.assert_close(share.sum(-1), torch.ones_like(share[..., 0]))
    at_B2YX = places.of_tokens(3).mT.unflatten(-1, token_grid)
    assert (at_B2YX[:, 0].diff(dim=1) > 0).all()
    assert (at_B2YX[:, 1].mean(1).diff() > 0).all()


def test_tokens_go_where_there_is_much_to_tell():
    """A quarter of the picture is unlike the rest: most tokens gather there."""
    space, u_BHWD = moving_space(), torch.full((1, 12, 12, 16), -1.0, dtype=torch.float64)
    space.density.weight.data.fill_(0.05)
    u_BHWD[:, :6, 6:] = 1
    with torch.no_grad():
        places, _ = space(u_BHWD.flatten(1, 2), (12, 12), (4, 4))
    y, x = places.of_tokens(1)[0].unbind(-1)
    inside = ((y < 0.5) & (x > 0.5)).sum()
    assert inside >= 9
    assert ((y >= 0.5) | (x <= 0.5)).sum() >= 1
    even, _ = moving_space()(torch.zeros(1, 144, 16, dtype=torch.float64), (12, 12), (4, 4))
    torch.testing.assert_close(even.of_tokens(1)[0], cell_centres((4, 4), dtype=torch.float64))


def test_a_token_is_told_its_place():
    """The same patches everywhere, and no neighbours: only the code of its place tells a token from another."""
    moving = make(**MOVING, scope_sigmas=[0.5, None])
    with torch.no_grad():
        moving.space.density.weight.zero_()
        moving.patch_conv.weight.zero_()
        told = moving(features((1, 1)).expand(-1, 16, -1), (4, 4), (2, 2))[0]
        moving.space.code_proj.weight.zero_()
        untold = moving(features((1, 1)).expand(-1, 16, -1), (4, 4), (2, 2))[0]
    torch.testing.assert_close(untold, untold[:, :1].expand(-1, 4, -1), rtol=1e-5, atol=1e-5)
    assert (told - told[:, :1]).abs().amax(-1)[:, 1:].min() > 0.1
