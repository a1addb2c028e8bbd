"""Visual token reducers: rules without training by which a picture's visual tokens are dropped or merged.

Patches are chosen by the tower's attention before the projector, tokens by their likeness behind it, or in the language
model's layers by its attention. Every rule gives what its authors' code gives; where that departs from their paper,
the code is followed, and the docstring says so. `keep` is a number of tokens of each picture, or their share.

Shapes, as name suffixes: N patches, P = 1 + N with the CLS token, V visual tokens, L length of a row, Q text tokens,
C and D widths, h heads, d head width. The rules see one picture at a time.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# How many tokens FitPrune deletes in each layer of LLaVA-1.5-7B, of 576, by the percentage of operations saved.
# fmt: off
FITPRUNE: dict[int, tuple[int, ...]] = {
    10: (0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0, 1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1, 0, 0),
    20: (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0, 6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0),
    30: (0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0, 16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4, 0, 0, 0),
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    55: (6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2, 29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
}
# fmt: on


def highest(scores: Tensor, count: int) -> Tensor:
    """The indices of the highest scores, falling; of equal ones the first, on any device."""
    return scores.float().sort(descending=True, stable=True).indices[:count]


def ascending(indices: Tensor) -> Tensor:
    """Indices in raster order."""
    return indices.sort().values


@dataclass(frozen=True)
class TowerView:
    """What a rule sees of a picture in the tower: its features x, and the CLS token's query q and the keys k of the
    layer that is read.
    """

    x_PC: Tensor
    q_hd: Tensor
    k_hPd: Tensor

    @property
    def attention_hP(self) -> Tensor:
        """The CLS token's attention."""
        return torch.einsum("hd,hpd->hp", self.q_hd, self.k_hPd).div(self.q_hd.shape[-1] ** 0.5).softmax(dim=-1)


@dataclass(frozen=True)
class LayerView:
    """What a rule sees of a row in the language model, before a layer.

    Fields:
        hidden_LD, norm: the row, and the model's last norm.
        visual, place: which of its tokens are left of the picture, and which they were of its `total` tokens.
        text: the tokens after all pictures.
        q_hLd, k_hLd, scale, cap: queries and keys of the layer that is read, after RoPE, the factor of their products,
            and c of c tanh(products / c), if they are capped.
        rope_Ld: that layer's cosines and sines.
        real_L: which tokens are no padding.
        embeddings: of all the picture's tokens and of the text, as the row began.
        key_set: places that always stay.
        layers: of the model.
    """

    hidden_LD: Tensor
    norm: Callable[[Tensor], Tensor]
    visual: Tensor
    place: Tensor
    text: Tensor
    q_hLd: Tensor
    k_hLd: Tensor
    scale: float
    rope_Ld: tuple[Tensor, Tensor]
    real_L: Tensor
    total: int
    embeddings: tuple[Tensor, Tensor]
    key_set: Tensor
    layers: int
    cap: float | None = None

    def attention(self, queries: Tensor) -> Tensor:
        """The attention of some of the row's tokens (h, queries, L), in float32."""
        scores = (self.q_hLd[:, queries].float() @ self.k_hLd.float().mT) * self.scale
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        before = torch.arange(len(self.real_L), device=queries.device) <= queries[:, None]
        return scores.masked_fill(~(before & self.real_L), -math.inf).softmax(dim=-1)


@dataclass(frozen=True)
class Reducer:
    """A rule and its settings; the fields of subclasses are the keys of `reducer_config`."""

    keep: int | float | None = None
    in_layers: ClassVar[bool] = False  # of the language model, where it drops tokens
    instead: ClassVar[tuple[str, ...]] = ()  # settings that say how many tokens stay, instead of `keep`
    from_zero: ClassVar[tuple[str, ...]] = ("layer", "layers")  # settings that may be 0; others count from 1

    def __post_init__(self) -> None:
        keep = self.keep
        for setting in dataclasses.fields(self):
            if setting.name != "keep":
                self.check_setting(setting.name, getattr(self, setting.name), setting.type)
        given = [name for name in ("keep", *self.instead) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` of {self.name} exclude each other: give one of them.")
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, (int, float))):
            raise ValueError(f"`keep` is a number of visual tokens or a share of them, got {keep!r}.")
        if keep is None and not self.may_choose:
            raise ValueError(f"{self.name} needs `keep`: how many visual tokens of a picture stay, or which share.")
        if isinstance(keep, float) and not 0 < keep <= 1:
            raise ValueError(f"`keep` {keep} is no share in (0, 1]: give a whole number for a count of visual tokens.")
        if isinstance(keep, int) and keep < 1:
            raise ValueError(f"`keep` must be at least 1 visual token, got {keep}.")

    def check_setting(self, name: str, value: Any, kind: Any) -> None:
        """Raises ValueError if a value is not of its setting's type: a number, or a tuple of numbers."""
        if NoneType in get_args(kind):
            if value is None:
                return
            kind = get_args(kind)[0]
        of_tuple = get_args(kind)
        number = of_tuple[0] if of_tuple else kind
        count = None if Ellipsis in of_tuple else len(of_tuple)
        least = 1 if number is int and name not in self.from_zero else 0
        values = value if of_tuple else (value,)
        if not (
            isinstance(values, tuple)
            and len(values) == (count or len(values) or 1)
            and all(isinstance(one, (int, number)) and not isinstance(one, bool) and one >= least for one in values)
        ):
            what = "whole number" if number is int else "number"
            wanted = f"a list of {f'{count} ' if count else ''}{what}s" if of_tuple else f"a {what}"
            raise ValueError(f"`{name}` of {self.name} is {wanted} from {least} on, got {value!r}.")

    @property
    def may_choose(self) -> bool:
        """Whether the rule has a budget of its own without `keep`."""
        return any(getattr(self, name) is not None for name in self.instead)

    @property
    def name(self) -> str:
        """Its name in `reducer_config`."""
        return next(name for name, kind in REDUCERS.items() if kind is type(self))

    @property
    def title(self) -> str:
        """The method's own name."""
        return type(self).__name__.replace("Plus", "+")

    @property
    def purpose(self) -> str:
        """What stays, in a sentence: its docstring's first."""
        return " ".join((type(self).__doc__ or "").split()).partition(". ")[0].removesuffix(".") + "."

    def check_patches(self, rows: int, columns: int) -> None:
        """Raises ValueError if it cannot work on a picture of so many patches."""

    def count(self, tokens: int, rounded: Callable[[float], int] = round) -> int:
        """How many of a picture's tokens stay. Raises ValueError if there are not as many."""
        assert self.keep is not None
        kept = rounded(self.keep * tokens) if isinstance(self.keep, float) else self.keep
        if not 1 <= kept <= tokens:
            raise ValueError(
                f"{self.name} cannot keep {self.keep} of {tokens} visual tokens; use 1 to {tokens}, or a share."
            )
        return kept


# In the tower -------------------------------------------------------------------------------------------------------


class TowerReducer(Reducer):
    """Chooses patches by the tower's attention from its CLS token, for a projector of single patches."""

    last_layer: ClassVar[bool] = False  # reads the tower's last layer, not the one that made the features

    def reduce(self, view: TowerView) -> Tensor:
        """The picture's features (T, C) for the projector."""
        raise NotImplementedError


@dataclass(frozen=True)
class FasterVLM(TowerReducer):
    """The patches with most attention from the CLS token, in raster order (FasterVLM, arXiv 2412.01818)."""

    def choose(self, attention_hP: Tensor) -> Tensor:
        """The patches that stay."""
        score_N = attention_hP.float().mean(dim=0)[1:]
        return ascending(highest(score_N, self.count(len(score_N))))

    def reduce(self, view: TowerView) -> Tensor:
        """See TowerReducer."""
        return view.x_PC[1:][self.choose(view.attention_hP)]


@dataclass(frozen=True)
class HiRED(FasterVLM):
    """The patches with most attention from the CLS token, of tiles a share for each view (HiRED, arXiv 2408.10945).

    Shares are rounded down. `overview` is the share of a picture's budget that its overview has. The tiles share the
    rest by how many of the overview's patches that the tower's first layer attends to most are theirs. There, as in the
    authors' code, a tile's patches are a run in raster order, not the part of the overview that it shows, and rounding
    leaves some unused.
    """

    overview: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.overview < 1:
            raise ValueError(f"`overview` is a share between 0 and 1, got {self.overview!r}.")

    def choose(self, attention_hP: Tensor) -> Tensor:
        """The patches that stay."""
        score_N = attention_hP.float().sum(dim=0)[1:]
        return ascending(highest(score_N, self.count(len(score_N), int)))

    def budgets(self, first_hP: Tensor, tiles: int) -> list[int]:
        """How many patches stay of the overview and of each tile. first_hP: the overview's attention in layer 1."""
        score_N = first_hP.float().sum(dim=0)[1:]
        patches = len(score_N)
        total = self.count((1 + tiles) * patches, int)
        of_overview = min(int(total * self.overview), patches)
        seen = highest(score_N, max(1, int(patches * (1 - self.overview))))
        found = torch.bincount((seen * tiles).div(patches, rounding_mode="floor"), minlength=tiles).tolist()
        shares = [int(count / len(seen) * (total - of_overview)) for count in found]
        return [of_overview, *(min(share, patches) for share in shares)]

    def reduce_tiles(self, views: Sequence[TowerView], first_hP: Tensor) -> Tensor:
        """Features (T, C) of a picture in tiles: of the overview, which is the first view, and of each tile.

        Raises ValueError if none stay.
        """
        kept, budgets = [], self.budgets(first_hP, len(views) - 1)
        if not any(budgets):
            raise ValueError(f"hired leaves nothing of {len(views)} views if `keep` is {self.keep}: give more.")
        for view, count in zip(views, budgets, strict=True):
            score_N = view.attention_hP.float().sum(dim=0)[1:]
            kept.append(view.x_PC[1:][ascending(highest(score_N, count))])
        return torch.cat(kept)


@dataclass(frozen=True)
class VisionZip(TowerReducer):
    """The CLS token, the most attended patches, and a few tokens of the others, merged (VisionZip, arXiv 2412.04467).

    `contextual`, the number of the merged, is 5 of 32 tokens unless given, as published: 10 of 64, 20 of 128, 30 of
    192. A merged token is a sum, its target and the mean of what is nearest to it, and the CLS token is the first
    visual token, as in the authors' code.
    """

    from_zero: ClassVar[tuple[str, ...]] = ("contextual",)
    contextual: int | None = None

    def reduce(self, view: TowerView) -> Tensor:
        """See TowerReducer."""
        kept = self.count(len(view.x_PC) - 1)
        contextual = round(kept * 5 / 32) if self.contextual is None else self.contextual
        if contextual >= kept:
            raise ValueError(f"visionzip cannot merge patches into {contextual} of {kept} tokens; use fewer.")
        return self.merge(view.x_PC, view.attention_hP, view.k_hPd.mean(dim=0), kept - contextual - 1, contextual)

    @staticmethod
    def merge(x_PC: Tensor, attention_hP: Tensor, key_Pd: Tensor, dominant: int, contextual: int) -> Tensor:
        """The CLS token, the dominant patches and the merged ones, (1 + dominant + contextual, C)."""
        first = ascending(highest(attention_hP.float().sum(dim=0)[1:], dominant) + 1)
        rest = torch.ones(len(x_PC), dtype=torch.bool, device=x_PC.device)
        rest[0] = rest[first] = False
        others = rest.nonzero().flatten()
        target = torch.arange(0, len(others), max(1, len(others) // max(1, contextual)), device=x_PC.device)[
            :contextual
        ]
        if not len(target):
            return torch.cat([x_PC[:1], x_PC[first]])
        is_target = torch.zeros(len(others), dtype=torch.bool, device=x_PC.device)
        is_target[target] = True
        metric_Md = F.normalize(key_Pd[others].float(), dim=-1)
        nearest_M = (metric_Md @ metric_Md[target].mT).argmax(dim=-1)
        near_MT = F.one_hot(nearest_M, len(target)).masked_fill(is_target[:, None], 0).to(x_PC.dtype)
        mean_TC = near_MT.mT @ x_PC[others] / near_MT.sum(0)[:, None].clamp(min=1)
        return torch.cat([x_PC[:1], x_PC[first], x_PC[others[target]] + mean_TC])


@dataclass(frozen=True)
class PruMerge(TowerReducer):
    """The most attended patches, each with its 32 nearest merged in, and a token of the rest (PruMerge, arXiv
    2403.15388).

    Without `keep`, as many stay as are outliers of the attention (above the third quartile by 1.5 interquartile
    ranges). As in the authors' code, attention is that of the last layer with all heads as one, tokens come by falling
    attention, and merged weights are not normalised. Of a batch, every picture has a share of its own here.
    """

    last_layer: ClassVar[bool] = True
    nearest: ClassVar[int] = 32

    @property
    def may_choose(self) -> bool:
        """Without `keep`, it depends on the picture."""
        return True

    def check_patches(self, rows: int, columns: int) -> None:
        """See Reducer."""
        if rows * columns <= self.nearest:
            raise ValueError(f"{self.name} merges {self.nearest} patches into one: {rows * columns} are too few.")

    def reduce(self, view: TowerView) -> Tensor:
        """See TowerReducer."""
        q_C, k_PC = view.q_hd.flatten(), view.k_hPd.transpose(0, 1).flatten(1)
        a_N = (k_PC.float() @ q_C.float() / len(q_C) ** 0.5).softmax(dim=-1)[1:]
        kept = self.choose(a_N)
        if len(kept) >= len(a_N):
            raise ValueError(f"{self.name} makes {len(kept) + 1} tokens of {len(a_N)} patches: give a smaller `keep`.")
        return self.merge(view.x_PC[1:], a_N, k_PC[1:], kept)

    def choose(self, a_N: Tensor) -> Tensor:
        """The patches that stay, in the order that the language model is given."""
        return highest(a_N, int(len(a_N) * self.share(a_N)))

    def share(self, a_N: Tensor) -> float:
        """The share of patches that stay."""
        if self.keep is None:
            low, high = a_N.float().quantile(torch.tensor([0.25, 0.75], device=a_N.device))
            return int((a_N > high + 1.5 * (high - low)).sum()) / len(a_N)
        if isinstance(self.keep, float):
            return self.keep
        # One of `keep` tokens is that of the rest; a little more, so that it is not rounded down.
        return (self.count(len(a_N)) - 1 + 0.5) / len(a_N)

    def merge(self, x_NC: Tensor, a_N: Tensor, k_NC: Tensor, kept: Tensor) -> Tensor:
        """The kept patches with what is merged in, and the token of the rest, (kept + 1, C)."""
        metric_NC = F.normalize(k_NC.float(), dim=-1)
        near_KN = metric_NC[kept] @ metric_NC.mT
        near_KN[torch.arange(len(kept)), kept] = -math.inf
        self.check_patches(1, len(a_N))
        others_K = near_KN.topk(self.nearest, dim=-1).indices
        merged_KC = x_NC[kept] + (a_N[others_K, None].to(x_NC.dtype) * x_NC[others_K]).sum(dim=1)
        gone = torch.ones(len(a_N), dtype=torch.bool, device=a_N.device)
        gone[kept] = False
        rest = gone.nonzero().flatten()
        rest = rest[
            len(kept) - len(kept.unique()) :
        ]  # as in the authors' code, where patches that are kept twice count twice
        return torch.cat([merged_KC, (a_N[rest, None].to(x_NC.dtype) * x_NC[rest]).sum(dim=0, keepdim=True)])


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """The most attended patches and others at even steps, with their nearest merged in (PruMerge+, arXiv 2403.15388).

    Without `keep`, there are about three times as many as PruMerge has. With a share as `keep`, the steps are those of
    the authors' training, in which a patch may be kept twice. With a count, which their code does not have, a quarter
    is chosen by attention, and the rest at even steps of the others.
    """

    def choose(self, a_N: Tensor) -> Tensor:
        """The patches that stay, in the order that the language model is given."""
        if isinstance(self.keep, int):
            kept = self.count(len(a_N)) - 1  # and the token of the rest
            first = highest(a_N, math.ceil(kept / 4))
            others = torch.ones_like(a_N, dtype=torch.bool)
            others[first] = False
            even = torch.arange(kept - len(first), device=a_N.device) * int(others.sum()) // max(1, kept - len(first))
            return torch.cat([first, others.nonzero().flatten()[even]])
        share = self.share(a_N)
        first = highest(a_N, int(len(a_N) * share))
        if self.keep is None:
            step = max(1, int(int(1 / share) / 3)) if share else len(a_N)
            sampled = torch.arange(0, len(a_N) - 1, step, device=a_N.device)
            return torch.cat([first, sampled[~torch.isin(sampled, first)]])
        step = int(1 / share)
        sampled = torch.tensor(range(step // 2, len(a_N) - 1, step), dtype=torch.long, device=a_N.device)
        return torch.cat([first, sampled])


# Behind the projector -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DivPrune(Reducer):
    """The tokens that are least alike, in raster order (DivPrune, arXiv 2503.02175).

    The first is the one whose nearest is farthest; then again and again the one farthest from all that were chosen.
    """

    def choose(self, y_VD: Tensor) -> Tensor:
        """The tokens that stay, in the order in which they are chosen."""
        unit_VD = F.normalize(y_VD.float(), dim=-1)
        distance_VV = 1 - unit_VD @ unit_VD.mT
        nearest_V = distance_VV.topk(min(2, len(y_VD)), dim=0, largest=False).values[-1]  # the smallest is itself
        chosen = [nearest_V.argmax()]
        nearest_V = distance_VV[chosen[0]].clone()
        for _ in range(self.count(len(y_VD)) - 1):
            nearest_V[chosen[-1]] = -math.inf
            chosen.append(nearest_V.argmax())
            nearest_V = torch.minimum(nearest_V, distance_VV[chosen[-1]])
        return torch.stack(chosen)


# In the language model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Before layer `before`, tokens are dropped by the attention of layer `reads`."""

    before: int
    reads: int


class LayerReducer(Reducer):
    """Drops visual tokens between the language model's layers."""

    in_layers: ClassVar[bool] = True
    compact: ClassVar[bool] = False  # whether what is left gets the positions 0, 1, 2, ...

    def cuts(self, layers: int) -> list[Cut]:
        """Where it drops tokens, in a model of so many layers. Raises ValueError if there is no such layer."""
        raise NotImplementedError

    def choose(self, stage: int, view: LayerView) -> tuple[Tensor, Tensor | None]:
        """Of view.visual the places that stay, ascending, and merged tokens (c, D) to stand behind them, if any."""
        raise NotImplementedError

    def checked(self, wanted: Sequence[int], layers: int) -> Sequence[int]:
        """Layers that are the first to see fewer tokens."""
        if not wanted or min(wanted) < 1 or max(wanted) >= layers or list(wanted) != sorted(set(wanted)):
            raise ValueError(
                f"{self.name} drops tokens before the layers {', '.join(map(str, wanted))}, but the language model has "
                f"{layers} layers: give rising numbers from 1 to {layers - 1}."
            )
        return wanted


class LastTokenReducer(LayerReducer):
    """Drops the tokens to which the last text token attends least."""

    def scores(self, view: LayerView) -> Tensor:
        """The attention from the last token, mean over heads."""
        return view.attention(view.text[-1:])[:, 0, view.visual].mean(dim=0)


@dataclass(frozen=True)
class FastV(LastTokenReducer):
    """The tokens that the last text token attends to most in an early layer (FastV, arXiv 2403.06764).

    The others are dropped before layer `layer`, by the layer before; what stays keeps its positions.
    """

    layer: int = 2

    def cuts(self, layers: int) -> list[Cut]:
        """See LayerReducer."""
        return [Cut(layer, layer - 1) for layer in self.checked([self.layer], layers)]

    def choose(self, stage: int, view: LayerView) -> tuple[Tensor, Tensor | None]:
        """See LayerReducer."""
        return ascending(highest(self.scores(view), min(self.count(view.total), len(view.visual)))), None


@dataclass(frozen=True)
class PyramidDrop(LastTokenReducer):
    """The tokens that the last text token attends to most, fewer in each of three stages (PyramidDrop, arXiv
    2410.17247).

    A stage is before each of `layers`, by the attention of that layer. The published layers are 8, 16 and 24 of 32, at
    a quarter, half and three quarters; `shares` of the picture's tokens stay, a half each time. `keep` is what the last
    stage leaves; what is left moves together.
    """

    compact: ClassVar[bool] = True
    layers: tuple[int, ...] | None = None
    shares: tuple[float, ...] = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"`shares` of pyramiddrop are in (0, 1], got {self.shares!r}.")

    @property
    def may_choose(self) -> bool:
        """The published shares."""
        return True

    def cuts(self, layers: int) -> list[Cut]:
        """See LayerReducer."""
        wanted = self.layers or [layers * part // 4 for part in (1, 2, 3)]
        if len(wanted) != len(self.shares):
            raise ValueError(f"pyramiddrop has {len(wanted)} `layers` and {len(self.shares)} `shares`: give as many.")
        return [Cut(layer, layer) for layer in self.checked(wanted, layers)]

    def choose(self, stage: int, view: LayerView) -> tuple[Tensor, Tensor | None]:
        """See LayerReducer."""
        kept = int(view.total * self.shares[stage])
        if self.keep is not None:
            last = self.count(view.total) / view.total
            kept = round(view.total * last ** ((stage + 1) / len(self.shares)))
        return ascending(highest(self.scores(view), min(max(1, kept), len(view.visual)))), None


@dataclass(frozen=True)
class DART(LayerReducer):
    """The tokens that are least like a few pivots in an early layer (DART, arXiv 2502.11494).

    The others are dropped before layer `layer`. Pivots are the `pivots` visual and as many text tokens with the largest
    keys; each takes the tokens least like it, in equal numbers, so that a few more or fewer than `keep` may stay. The
    authors' code lets pivots choose in the order of a Python set; here they choose as they stand in the row.
    """

    from_zero: ClassVar[tuple[str, ...]] = ("layer", "text_pivots")
    layer: int = 2
    pivots: int = 4
    text_pivots: int | None = None

    def cuts(self, layers: int) -> list[Cut]:
        """See LayerReducer."""
        return [Cut(layer, layer - 1) for layer in self.checked([self.layer], layers)]

    def find_pivots(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """The visual and the text pivots, by falling size of their keys, as indices of the row."""
        size_L = view.k_hLd.float().abs().sum(dim=(0, 2))
        text = self.pivots if self.text_pivots is None else self.text_pivots
        return view.visual[highest(size_L[view.visual], self.pivots)], view.text[highest(size_L[view.text], text)]

    def choose(self, stage: int, view: LayerView) -> tuple[Tensor, Tensor | None]:
        """See LayerReducer."""
        visual, text = self.find_pivots(view)
        return self.take(view, visual, ascending(torch.cat([visual, text]))), None

    def take(self, view: LayerView, visual: Tensor, pivots: Tensor) -> Tensor:
        """What stays if pivots choose in this order."""
        share = self.count(view.total) // len(pivots)
        unit_LD = F.normalize(view.norm(view.hidden_LD).float(), dim=-1)
        stays = torch.isin(view.visual, visual)
        for pivot in pivots:
            likeness_V = (unit_LD[view.visual] @ unit_LD[pivot]).masked_fill(stays, math.inf)
            stays[highest(-likeness_V, min(share, int((~stays).sum())))] = True
        return stays.nonzero().flatten()


# How many tokens SparseVLM keeps behind its three layers, by the average over a model of 32 layers and 576 tokens.
SPARSE_COUNTS: dict[int, tuple[int, ...]] = {
    192: (300, 200, 110),
    128: (303, 110, 36),
    96: (238, 48, 26),
    64: (66, 30, 17),
}
SPARSE_PLUS_COUNTS: dict[int, tuple[int, ...]] = {
    192: (300, 200, 118),
    128: (238, 108, 60),
    96: (246, 54, 28),
    64: (66, 34, 20),
}


@dataclass(frozen=True)
class SparseVLM(LayerReducer):
    """The tokens that words about the picture attend to most, fewer behind each of three layers; a part of the others
    is merged (SparseVLM 1, arXiv 2410.04417).

    `keep` is the average over the layers; between the published budgets (192, 128, 96 and 64 of 576), the counts of the
    next larger one are scaled. `counts` gives them, behind `layers`. As in the authors' code, counts do not depend on
    the picture.
    """

    compact: ClassVar[bool] = True
    instead: ClassVar[tuple[str, ...]] = ("counts",)
    table: ClassVar[dict[int, tuple[int, ...]]] = SPARSE_COUNTS
    layers: tuple[int, ...] = (2, 6, 15)
    counts: tuple[int, ...] | None = None

    def cuts(self, layers: int) -> list[Cut]:
        """See LayerReducer."""
        if len(self.layers) != len(self.counts or self.layers) or (self.counts is None and len(self.layers) != 3):
            raise ValueError(f"{self.name} needs one of `counts` for each of `layers`.")
        return [Cut(layer, layer - 1) for layer in self.checked([layer + 1 for layer in self.layers], layers)]

    def kept(self, stage: int, total: int) -> int:
        """How many of a picture's `total` tokens stay behind a stage."""
        if self.counts is not None:
            return self.counts[stage]
        average = self.count(total) * 576 / total
        published = min((key for key in self.table if key >= average), default=max(self.table))
        return max(1, round(self.table[published][stage] * average / published * total / 576))

    @staticmethod
    def raters(visual_VD: Tensor, text_QD: Tensor) -> Tensor:
        """Which words are about the picture: those whose embeddings are liker to its tokens than the mean; if all are
        alike, all of them.
        """
        like_Q = (visual_VD.float() @ text_QD.float().mT).softmax(dim=-1).mean(dim=0)
        above_Q = like_Q > like_Q.mean()
        return (above_Q if above_Q.any() else ~above_Q).nonzero().flatten()

    def relation(self, view: LayerView) -> Tensor:
        """The attention from the raters to each visual token, mean over raters and heads."""
        raters = view.text[self.raters(*view.embeddings)]
        return view.attention(raters)[:, :, view.visual].mean(dim=(0, 1))

    def choose(self, stage: int, view: LayerView) -> tuple[Tensor, Tensor | None]:
        """See LayerReducer."""
        score_V = self.relation(view)
        if len(score_V) == 1:  # one goes at every stage, but not the last
            return torch.zeros_like(view.visual), None
        stays = highest(score_V, min(self.kept(stage, view.total), len(score_V) - 1))
        gone = torch.ones(len(score_V), dtype=torch.bool, device=score_V.device)
        gone[stays] = False
        return ascending(stays), self.merged(view, score_V, gone)

    def merged(self, view: LayerView, score_V: Tensor, gone: Tensor) -> Tensor | None:
        """The best 30 percent of the tokens that do not stay, in clusters of ten."""
        gone_V = gone.nonzero().flatten()
        best = gone_V[highest(score_V[gone_V], int(0.3 * len(gone_V)) + 1)]
        clusters = int(len(best) / 10) + 1
        return merge_clusters(view.hidden_LD[view.visual[best]], clusters, torch.rand(len(best), device=gone.device))


def merge_clusters(x_ND: Tensor, clusters: int, noise_N: Tensor) -> Tensor:
    """The means (clusters, D) of tokens around density peaks, as SparseVLM finds them; noise decides between equals."""
    distance_NN = torch.cdist(x_ND.float(), x_ND.float()) / x_ND.shape[-1] ** 0.5
    nearest_Nc = distance_NN.topk(min(clusters, len(x_ND)), dim=-1, largest=False).values
    density_N = (-nearest_Nc.square().mean(dim=-1)).exp() + 1e-6 * noise_N
    denser_NN = density_N[None] > density_N[:, None]
    to_denser_N = distance_NN.masked_fill(~denser_NN, math.inf).amin(dim=-1)
    to_denser_N = torch.where(to_denser_N.isinf(), distance_NN.max(), to_denser_N)
    centre = highest(density_N * to_denser_N, clusters)
    cluster_N = distance_NN[centre].argmin(dim=0)
    cluster_N[centre] = torch.arange(len(centre), device=centre.device)
    member_cN = F.one_hot(cluster_N, len(centre)).mT.to(x_ND.dtype)
    return member_cN @ x_ND / (member_cN.sum(dim=-1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """The tokens that words about the picture attend to most, without merging (SparseVLM+, SparseVLM's later code).

    Only the `heads` that attend most to the picture count, with their attention divided by what positions alone give.
    """

    compact: ClassVar[bool] = False
    table: ClassVar[dict[int, tuple[int, ...]]] = SPARSE_PLUS_COUNTS
    heads: int = 14

    def relation(self, view: LayerView) -> Tensor:
        """See SparseVLM."""
        raters = view.text[self.raters(*view.embeddings)]
        cos_Ld, sin_Ld = (table.float() for table in view.rope_Ld)
        # Products of vectors of ones after RoPE: pairs' mixed terms cancel, and the last entries may stay as they are.
        width, unturned = view.q_hLd.shape[-1], view.q_hLd.shape[-1] - cos_Ld.shape[-1]
        products_QV = cos_Ld[raters] @ cos_Ld[view.visual].mT + sin_Ld[raters] @ sin_Ld[view.visual].mT
        by_place_QV = (products_QV + unturned) / width**0.5
        related_hQV = view.attention(raters)[:, :, view.visual] / by_place_QV
        return related_hQV[self.choose_heads(related_hQV)].mean(dim=(0, 1))

    def choose_heads(self, related_hQV: Tensor) -> Tensor:
        """The heads with most attention to the picture."""
        return highest(related_hQV.sum(dim=(1, 2)), min(self.heads, len(related_hQV)))

    def merged(self, view: LayerView, score_V: Tensor, gone: Tensor) -> Tensor | None:
        """Nothing is merged."""
        return None


@dataclass(frozen=True)
class FitPrune(LayerReducer):
    """The tokens that text and picture attend to most, fewer behind every layer (FitPrune, arXiv 2409.10197).

    How many each layer deletes was fitted to LLaVA-1.5-7B by the authors, for given percentages of operations saved:
    `saved` takes a scheme by its percentage, `keep` the one whose average over the layers is nearest, and `deleted`
    gives one number a layer. Schemes are stretched to other depths and pictures. Deleted tokens are still read in the
    layer that deletes them.
    """

    instead: ClassVar[tuple[str, ...]] = ("saved", "deleted")
    from_zero: ClassVar[tuple[str, ...]] = ("deleted",)
    saved: int | None = None
    deleted: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saved is not None and self.saved not in FITPRUNE:
            raise ValueError(f"fitprune has no scheme for `saved` {self.saved}; use {', '.join(map(str, FITPRUNE))}.")

    def cuts(self, layers: int) -> list[Cut]:
        """See LayerReducer."""
        if self.deleted is not None and len(self.deleted) != layers:
            raise ValueError(
                f"fitprune has {len(self.deleted)} numbers in `deleted`, for {layers} layers: give as many."
            )
        return [Cut(layer + 1, layer) for layer in range(layers - 1)]  # nothing reads what the last one would delete

    def kept(self, stage: int, total: int, layers: int) -> int:
        """How many of a picture's `total` tokens are left behind a layer."""
        if self.deleted is not None:
            if (left := total - sum(self.deleted[: stage + 1])) < 1:
                raise ValueError(
                    f"fitprune cannot delete {total - left} of {total} visual tokens: give less `deleted`."
                )
            return left
        schemes = {saved: [576 - sum(row[:layer]) for layer in range(33)] for saved, row in FITPRUNE.items()}
        if self.saved is not None:
            row = schemes[self.saved]
        else:
            wanted = self.count(total) / total * 576
            row = min(schemes.values(), key=lambda row: abs(sum(row[:32]) / 32 - wanted))
        return max(1, round(row[round((stage + 1) * 32 / layers)] * total / 576))

    def scores(self, view: LayerView) -> Tensor:
        """The highest attention of a head from the picture's tokens, mean, times that from the text, summed."""
        queries = torch.cat([view.visual, view.text])
        most_QV = view.attention(queries)[:, :, view.visual].amax(dim=0)
        of_picture, of_text = most_QV.split([len(view.visual), len(view.text)])
        return of_picture.mean(dim=0) * of_text.sum(dim=0)

    def choose(self, stage: int, view: LayerView) -> tuple[Tensor, Tensor | None]:
        """See LayerReducer."""
        kept = min(self.kept(stage, view.total, view.layers), len(view.visual))
        return ascending(highest(self.scores(view), kept)), None


# MustDrop's thresholds by the average number of tokens that they leave of 576.
MUSTDROP = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}


@dataclass(frozen=True)
class MustDrop(LayerReducer, TowerReducer):
    """The tokens that the text attends to, of windows of patches that are merged where they are even (MustDrop, arXiv
    2411.10803).

    Windows are merged in the tower; behind four of the language model's layers, tokens go to which the text attends
    little, on the whole and at most; then the cache is cut to what is left.
    Thresholds decide, so the number is not fixed: `keep` chooses the published ones (192, 128 or 64 of 576). In a
    batch, every picture has windows of its own; in the authors' code, the least number of all. The patches with most
    attention from the CLS token always stay.
    """

    last_layer: ClassVar[bool] = True
    compact: ClassVar[bool] = True
    window: ClassVar[int] = 3
    alike: ClassVar[float] = 0.8  # the mean cosine from which on a window is merged
    always: ClassVar[float] = 0.08  # the share of patches that always stay
    instead: ClassVar[tuple[str, ...]] = ("thresholds",)
    layers: tuple[int, ...] = (2, 6, 10, 14)
    thresholds: tuple[float, float] | None = None

    def cuts(self, layers: int) -> list[Cut]:
        """See LayerReducer."""
        if self.thresholds is None and self.keep not in MUSTDROP:
            raise ValueError(f"mustdrop has thresholds for `keep` 192, 128 or 64, not {self.keep}; give `thresholds`.")
        return [Cut(layer, layer - 1) for layer in self.checked([layer + 1 for layer in self.layers], layers)]

    def check_patches(self, rows: int, columns: int) -> None:
        """See Reducer."""
        size = self.window
        if rows % size or columns % size:
            raise ValueError(
                f"mustdrop merges windows of {size} x {size} patches: {rows} x {columns} cannot be cut so."
            )

    def merge_windows(self, x_PC: Tensor, grid: tuple[int, int]) -> Tensor:
        """The CLS token, the merged windows, those most alike first, and all other patches, behind the first layer."""
        size, (rows, columns) = self.window, grid
        self.check_patches(rows, columns)
        place = torch.arange(rows * columns, device=x_PC.device).view(rows // size, size, columns // size, size)
        place_Wn = place.transpose(1, 2).flatten(2).flatten(0, 1)
        unit_Wnc = F.normalize(x_PC[1:].float(), dim=-1)[place_Wn]
        pairs = size**2 * (size**2 - 1)
        alike_W = ((unit_Wnc @ unit_Wnc.mT).sum(dim=(1, 2)) - unit_Wnc.square().sum(dim=(1, 2))) / pairs
        merged = highest(alike_W, int((alike_W >= self.alike).sum()))
        stays = torch.ones(len(x_PC) - 1, dtype=torch.bool, device=x_PC.device)
        stays[place_Wn[merged].flatten()] = False
        return torch.cat([x_PC[:1], x_PC[1:][place_Wn[merged]].mean(dim=1), x_PC[1:][stays]])

    def reduce(self, view: TowerView) -> Tensor:
        """All that the windows left."""
        return view.x_PC[1:]

    def key_set(self, view: TowerView) -> Tensor:
        """The patches that always stay."""
        score_N = view.attention_hP.float().mean(dim=0)[1:]
        return highest(score_N, math.ceil(self.always * len(score_N)))

    def choose(self, stage: int, view: LayerView) -> tuple[Tensor, Tensor | None]:
        """See LayerReducer."""
        on_the_whole, at_most = self.thresholds or MUSTDROP[int(self.keep or 0)]
        attention_QV = view.attention(view.text)[:, :, view.visual].mean(dim=0)
        whole_V = attention_QV.sum(dim=0)
        stays_V = (whole_V >= on_the_whole * whole_V.sum()) | (attention_QV.amax(dim=0) >= at_most)
        return (stays_V | torch.isin(view.place, view.key_set)).nonzero().flatten(), None


REDUCERS: dict[str, type[Reducer]] = {
    "fastervlm": FasterVLM,
    "hired": HiRED,
    "visionzip": VisionZip,
    "prumerge": PruMerge,
    "prumerge_plus": PruMergePlus,
    "divprune": DivPrune,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "dart": DART,
    "sparsevlm": SparseVLM,
    "sparsevlm_plus": SparseVLMPlus,
    "fitprune": FitPrune,
    "mustdrop": MustDrop,
}


def read_reducer(fields: dict[str, Any]) -> Reducer:
    """The reducer of a `reducer_config`. Raises ValueError for an unknown one, or settings that it does not have."""
    fields = dict(fields)
    name = fields.pop("reducer_type", None)
    if not isinstance(name, str) or name not in REDUCERS:
        near = difflib.get_close_matches(str(name), REDUCERS, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(REDUCERS)}."
        raise ValueError(f"There is no `reducer_type` {name!r}; {hint}")
    kind: Any = REDUCERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(known)}."
            raise ValueError(f"{name} has no setting `{key}`; {hint}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


__all__ = ["REDUCERS", "Reducer", "read_reducer"]
