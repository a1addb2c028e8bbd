"""Temporal scopes: the multi-scope resampler over the patches (t, y, x) of a clip.

    o_h = softmax over all patches of all frames of (s_h + B_h + C_h) (u W_v)
    C_h = -(a_t + e_h - p_t)^2 / (2 tau_h^2)            in pitches of time; 0 in the global scope

Tokens are a grid (steps, rows, columns) over the clip. B_h is the spatial prior of resampler_ms_resampler.py, and C_h
that of time: tau starts as the scope's sigma and e at zero, so that a token reads its place now, around now, or over
the clip; both are learned. As the product of both is a Gaussian over (t, y, x), the softmax goes by rows and columns
of each frame, and then over frames:

    m_f = logsumexp over the patches of frame f of (s_h + B_h)
    o_h = softmax over frames of (m_f + C_h) (o_h of frame f)

Cell means go by frames, and then over the frames of a step. A clip of one frame is read exactly as an image.

Shapes are named as in resampler_ms_resampler.py; F frames and K steps of a clip, A = B * F frames of all clips. Patches
and tokens of a clip, N and M, are in the order (t, y, x).
"""

from dataclasses import dataclass, replace

import torch.nn.functional as functional
from torch import Tensor, cat

from .places_ms_resampler import GLOBAL, EvenPlaces, Grid, ScopeMaps, centres, check_patches
from .resampler_ms_resampler import MultiScopeResampler, ScopeLayer, ScopePrior

IMAGE = (1, 1)  # frames and steps of an image


def over_time(x_BFV: Tensor, steps: int) -> Tensor:
    """The mean of the frames of each step (B, K, V); steps overlap if they do not divide the frames evenly."""
    return functional.adaptive_avg_pool1d(x_BFV.mT, steps).mT


@dataclass
class ClipPlaces:
    """Places of the patches of every frame, and how many frames and steps a clip has."""

    of_frames: EvenPlaces
    clip: Grid

    def over_steps(self, x_AMV: Tensor) -> Tensor:
        """The means over the frames of each step (B, M, V) of what tokens have in every frame."""
        frames, steps = self.clip
        x_BFV = x_AMV.unflatten(0, (-1, frames)).flatten(2)
        return over_time(x_BFV, steps).unflatten(2, x_AMV.shape[1:]).flatten(1, 2)

    def cell_means(self, x_ANC: Tensor) -> Tensor:
        """The mean of the patches in each token's cell (B, M, C)."""
        return self.over_steps(self.of_frames.cell_means(x_ANC))

    def of_tokens(self, frames: int) -> Tensor:
        """The mean place (t, y, x) in [0, 1]^3 of each token's cell (B, M, 3), in clips of so many frames together."""
        places_BM2 = self.over_steps(self.of_frames.of_tokens(frames))
        time_1K1 = over_time(centres(self.clip[0], places_BM2)[None, :, None], self.clip[1])
        time_1M1 = time_1K1.repeat_interleave(places_BM2.shape[1] // self.clip[1], dim=1)
        return cat([time_1M1.expand(len(places_BM2), -1, -1), places_BM2], dim=-1)


class TimePrior(ScopePrior):
    """The Gaussian prior over time: each head's learned offset from a token's step, and its learned width tau."""

    def initial(self) -> tuple[Tensor, Tensor]:
        """Every head's tau, the sigma of its scope, and offset 0: (1, h)."""
        sigma_1h, offset_1h2 = super().initial()
        scopes = zip(self.config.scope_sigmas, self.config.scope_heads, strict=True)
        tau_h = [float(sigma or GLOBAL) for sigma, heads in scopes for _ in range(heads)]
        return sigma_1h.new_tensor([tau_h]), offset_1h2[..., 0] * 0

    def forward(self, clip: Grid, like: Tensor) -> Tensor:  # type: ignore[override]  # of frames and steps
        """C (1, h, K, F)."""
        frame_F, step_K = ((centres(cells, like) - 0.5) * clip[1] for cells in clip)
        away_1hKF = (step_K + self.offset[..., None].to(step_K.dtype))[..., None] - frame_F
        return -0.5 * self.precision(step_K.dtype)[..., None, None] * away_1hKF.square()


class ClipLayer(ScopeLayer):
    """One layer: tokens z (B, M, D) read the patches u (A, N, D) of all frames in every scope."""

    def __init__(self, config):
        super().__init__(config)
        self.time = TimePrior(config)

    def read(  # type: ignore[override]  # places of clips
        self, u_AND: Tensor, places: ClipPlaces, output_scopes: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' output (B, M, D) and, if requested, each scope's attention over all patches (B, S, M, F * N)."""
        score_AhN, value_AhNd = self.listen(u_AND)
        prior, clips = self.prior(places.of_frames), (-1, places.clip[0])
        o_AhXYd, s_AhXYH = self.filter(score_AhN, value_AhNd, prior, places.of_frames.patch_grid)
        mass_BhXYF = s_AhXYH.logsumexp(dim=-1).unflatten(0, clips).movedim(1, -1)
        time_1hKF = self.time(places.clip, s_AhXYH)
        weight_BhXYKF = (mass_BhXYF[..., None, :] + time_1hKF[:, :, None, None]).softmax(dim=-1)
        o_BhXYKd = weight_BhXYKF.to(value_AhNd.dtype) @ o_AhXYd.unflatten(0, clips).movedim(1, -2)
        o_BMD = o_BhXYKd.permute(0, 4, 3, 2, 1, 5).flatten(4).flatten(1, 3)
        if not output_scopes:
            return o_BMD, None
        s_BhMFN = self.logits(score_AhN, prior).unflatten(0, clips).movedim(1, -2)
        s_BhKMFN = s_BhMFN[:, :, None] + time_1hKF[:, :, :, None, :, None]
        return o_BMD, self.mean_over_heads(s_BhKMFN.flatten(4).softmax(dim=-1).flatten(2, 3))


class ClipResampler(MultiScopeResampler):
    """Patch features of a clip to visual tokens, by the equations at the top of this file; an image is one frame."""

    layer_class = ClipLayer

    def forward(
        self,
        x_BNC: Tensor,
        patch_grid: Grid,
        token_grid: Grid,
        output_scopes: bool = False,
        clip: Grid = IMAGE,
    ) -> tuple[Tensor, ScopeMaps | None]:
        """Visual tokens (B, M, T) of clips of some frames, in some steps of a token grid each, and the last layer's
        maps if requested; of clips of more than one frame, places have the time in front.

        Raises ValueError if the number of features does not match the patches of all frames.
        """
        frames, _ = clip
        check_patches(x_BNC, (frames * patch_grid[0], patch_grid[1]))
        x_ANC = x_BNC.unflatten(1, (frames, -1)).flatten(0, 1)
        u_AND = self.mix(x_ANC, patch_grid)
        of_frames, z_AMD = self.lay_out(u_AND, patch_grid, token_grid)
        places = ClipPlaces(of_frames, clip)
        z_BMD = places.over_steps(z_AMD.expand(max(frames, len(z_AMD)), -1, -1))
        y_BMT, maps = self.resample(x_ANC, u_AND, places, z_BMD, output_scopes)  # type: ignore[arg-type]
        if maps is not None and clip == IMAGE:
            maps = replace(maps, places_BM2=maps.places_BM2[..., 1:])
        return y_BMT, maps


__all__ = ["ClipResampler"]
