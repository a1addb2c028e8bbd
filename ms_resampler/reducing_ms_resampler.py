"""Runs visual token reducers: reads the tower, shortens prompts, and drops tokens between a language model's layers.

Where tokens are dropped before the language model, a prompt has more image tokens than there are visual tokens: the
last ones of each picture are taken out of it. In the language model, hooks stand in front of its layers while a prompt
or the next tokens run. In the prompt, a rule chooses what stays, and all layers behind get the shorter rows with their
positions and their mask, so that the cache holds only these. A next token gets, in each layer, the mask of that layer's
own cache, and, if what is left has moved together, its position there.

Shapes are named as in reducers_ms_resampler.py; B is the batch, 1 is broadcast.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .reducers_ms_resampler import (
    REDUCERS,
    LayerReducer,
    LayerView,
    MustDrop,
    Reducer,
    TowerReducer,
    TowerView,
    read_reducer,
)
from .towers_ms_resampler import Tower, layers_of

TEXT, FILL = -1, -2  # numbers that are no picture's


# In the tower -------------------------------------------------------------------------------------------------------


class TowerReading:
    """Queries and keys of a tower's layer, of every image: hooks keep what its projections put out."""

    def __init__(self, tower: Any, layer: int):
        found: list[Any] = [module for module in layers_of(tower)[layer].modules() if hasattr(module, "q_proj")]
        # Positions that are rotated into queries and keys would be missing from the projections.
        if not found or any("rope" in name for name, _ in tower.named_modules()):
            raise ValueError(
                f"A reducer cannot read the attention of the vision tower `{tower.config.model_type}`; use divprune, "
                "or a reducer in the language model."
            )
        self.projections, self.heads = (found[0].q_proj, found[0].k_proj), tower.config.num_attention_heads
        self.out: list[Tensor] = []

    @contextmanager
    def hooked(self) -> Iterator["TowerReading"]:
        """Keeps queries and keys of what runs in this context."""
        self.out.clear()
        with ExitStack() as stack:
            for projection in self.projections:
                handle = projection.register_forward_hook(lambda module, inputs, output: self.out.append(output))
                stack.callback(handle.remove)
            yield self

    def views(self, state_BPC: Tensor, tower: Tower) -> list[TowerView]:
        """What a rule sees of every image, without registers."""

        def without_registers(x_BPC: Tensor) -> Tensor:
            return torch.cat([x_BPC[:, :1], x_BPC[:, tower.prefix_tokens :]], dim=1)

        q_BPD, k_BPD = self.out
        keys_BPhd = without_registers(k_BPD).unflatten(-1, (self.heads, -1))
        queries_Bhd = q_BPD[:, 0].unflatten(-1, (self.heads, -1))
        rows = zip(without_registers(state_BPC), queries_Bhd, keys_BPhd.transpose(1, 2), strict=True)
        return [TowerView(x_PC, q_hd, k_hPd) for x_PC, q_hd, k_hPd in rows]


@contextmanager
def merged_windows(tower: nn.Module, reducer: MustDrop, grid: tuple[int, int]) -> Iterator[None]:
    """Behind the tower's first layer, MustDrop merges windows of patches, of a single image."""

    def merge(module: nn.Module, inputs: Any, hidden_BPC: Tensor) -> Tensor:
        return reducer.merge_windows(hidden_BPC[0], grid)[None]

    handle = layers_of(tower)[0].register_forward_hook(merge)
    try:
        yield
    finally:
        handle.remove()


def check_reducer(reducer: Reducer, model: Any) -> None:
    """Raises ValueError if a model cannot use a reducer. model: the MSResamplerModel."""
    config, layers = model.config, len(model.tower_shape.states) - 1
    if model.fusion is not None and (isinstance(reducer, TowerReducer) or not isinstance(reducer, LayerReducer)):
        raise ValueError(f"{reducer.name} changes what LLaVA-Mini's pre-fusion reads; use a reducer in the layers.")
    if isinstance(reducer, LayerReducer):
        check_language_model(model.language_model, reducer)
    if isinstance(reducer, TowerReducer):
        if config.projector_config.projector_type != "mlp":
            raise ValueError(
                f"{reducer.name} chooses patches, for a projector that gives one token a patch: `mlp`, not "
                f"`{config.projector_config.projector_type}`. Behind any projector, divprune chooses among its tokens."
            )
        if not model.tower_shape.prefix_tokens:
            raise ValueError(
                f"{reducer.name} reads the attention of the tower's CLS token, and `{config.vision_config.model_type}` "
                "has none; use divprune, or a reducer in the language model."
            )
        if len(config.feature_layers) > 1:
            raise ValueError(f"{reducer.name} reads one layer of the tower, but `vision_feature_layer` has several.")
        TowerReading(model.vision_tower, reading_layer(reducer, config.feature_layers[0], layers))


def fitting_reducers(model: Any, counts: Iterable[int]) -> dict[str, list[Reducer]]:
    """By method, the reducers that keep one of some counts and that nothing refuses for a model and a picture of its
    tower's size. model: the MSResamplerModel.
    """
    grid = model.config.native_patch_grid
    tokens = math.prod(model._token_grids(None, [grid])[0])
    found: dict[str, list[Reducer]] = {}
    for name, keep in product(REDUCERS, counts):
        with suppress(ValueError):  # of whatever refuses it
            reducer = read_reducer({"reducer_type": name, "keep": keep})
            check_reducer(reducer, model)
            reducer.check_patches(*grid)
            reducer.count(tokens)
            if reducer.in_layers:
                check_window(model.language_model, tokens)
            found.setdefault(name, []).append(reducer)
    return found


def reading_layer(reducer: TowerReducer, feature_layer: int, layers: int) -> int:
    """The number of the tower's layer that is read: the one that makes the features, or the last."""
    return layers - 1 if reducer.last_layer else max(0, feature_layer % (layers + 1) - 1)


# Before the language model ------------------------------------------------------------------------------------------


def places_that_stay(is_image_BL: Tensor, wholes: list[int], kept: list[int]) -> Tensor:
    """Which tokens of a prompt stay (B, L): of each picture's image tokens, as many as it has visual tokens."""
    rank = torch.cat([torch.arange(whole) for whole in wholes]).to(is_image_BL.device)
    left = torch.tensor(kept).repeat_interleave(torch.tensor(wholes)).to(is_image_BL.device)
    stays_BL = torch.ones_like(is_image_BL)
    stays_BL[is_image_BL] = rank < left
    return stays_BL


def number_pictures(is_image_BL: Tensor, counts: list[int]) -> Tensor:
    """The number of the picture that every token of the prompts is of, or TEXT."""
    number_BL = torch.full(is_image_BL.shape, TEXT, device=is_image_BL.device)
    number_BL[is_image_BL] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(is_image_BL.device)
    return number_BL


def shorten_prompt(stays_BL: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The places (B, L') of what stays, -1 for padding, and the mask; padding is on the side where it was, or left."""
    on_the_right = attention_mask is not None and bool((attention_mask[:, -1] == 0).any())
    places = [stays_L.nonzero().flatten() for stays_L in stays_BL]
    length = max(map(len, places))
    sides = [(0, length - len(p)) if on_the_right else (length - len(p), 0) for p in places]
    place_BL = torch.stack([nn.functional.pad(p, side, value=-1) for p, side in zip(places, sides, strict=True)])
    mask_BL = place_BL >= 0
    if attention_mask is not None:
        mask_BL &= take(attention_mask, place_BL).bool()
    if attention_mask is None and bool(mask_BL.all()):
        return place_BL, None
    return place_BL, mask_BL.long()


def take(x: Tensor, place_BL: Tensor, empty: Any = 0) -> Tensor:
    """The rows' entries (B, L, ...) at some places, and `empty` where there is none."""
    index = place_BL.clamp(min=0)
    found = x[torch.arange(len(x), device=x.device)[:, None], index]
    gone = (place_BL < 0).reshape(*place_BL.shape, *[1] * (x.ndim - 2))
    return found.masked_fill(gone, empty)


# In the language model ----------------------------------------------------------------------------------------------


class _Read(Exception):
    """Carries queries and keys out of an attention module, whose attention is not needed."""


def _raise_queries_and_keys(module: nn.Module, query: Tensor, key: Tensor, *_: Any, **options: Any) -> None:
    raise _Read(query, key, options.get("scaling") or query.shape[-1] ** -0.5, options.get("softcap"))


AttentionInterface.register("ms_resampler_reading", _raise_queries_and_keys)


@torch.no_grad()
def queries_and_keys(
    layer: Any, hidden_BLD: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, float, float | None]:
    """A decoder layer's queries and keys (B, h, L, d) after RoPE, the factor of their products and their cap, for any
    model whose layers have `input_layernorm` and `self_attn`.
    """
    kept = {name: value for name, value in options.items() if name not in ("past_key_values", "use_cache", "cache")}
    config, before = layer.self_attn.config, layer.self_attn.config._attn_implementation
    config._attn_implementation = "ms_resampler_reading"
    try:
        layer.self_attn(hidden_states=layer.input_layernorm(hidden_BLD), **kept)
    except _Read as read:
        query, key, scale, cap = read.args
        return query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1), scale, cap
    finally:
        config._attn_implementation = before
    raise ValueError("This language model's attention cannot be read; use a reducer that works before it.")


@dataclass
class Rows:
    """What is left of a batch of prompts.

    index_BL: the place of every token in the whole rows, or -1 for what was merged; picture_BL: the number of its
    picture, TEXT or FILL; position_BL: its position; real_BL: whether it is read.
    """

    index_BL: Tensor
    picture_BL: Tensor
    position_BL: Tensor
    real_BL: Tensor


@dataclass
class KeptInCache:
    """Which of a cache's entries are read, by layer, from the first one on whose rows are shorter.

    length: of the prompt, whole.
    """

    first: int
    length: int
    real_BL: dict[int, Tensor] = field(default_factory=dict)
    compact: bool = False


def check_language_model(model: Any, reducer: LayerReducer) -> None:
    """Raises ValueError if a language model's layers cannot be cut by a reducer."""
    layers: Any = getattr(model, "layers", None)
    plain = isinstance(layers, nn.ModuleList) and all(map(has_attention_alone, layers))
    if not (plain and hasattr(model, "rotary_emb") and last_norm(model)):
        raise ValueError(
            f"{reducer.name} reads the attention of layers as Llama has them, and `{model.config.model_type}` has "
            "others; use a reducer that works before the language model, such as divprune."
        )
    reducer.cuts(len(layers))


def has_attention_alone(layer: Any) -> bool:
    """Whether a decoder layer has `self_attn` behind `input_layernorm`, and nothing else that goes by the row."""
    found = hasattr(layer, "self_attn") and hasattr(layer, "input_layernorm") and not hasattr(layer, "mamba")
    return found and "per_layer_input" not in inspect.signature(layer.forward).parameters


def last_norm(model: Any) -> Any:
    """A language model's norm behind its layers, or None."""
    return getattr(model, "norm", None) or getattr(model, "final_layernorm", None)


def check_window(model: Any, length: int) -> None:
    """Raises ValueError if rows are longer than a sliding window, which would count tokens that are no longer there."""
    window, kinds = getattr(model.config, "sliding_window", None), getattr(model.config, "layer_types", None)
    if window is not None and length > window and (not kinds or "sliding_attention" in kinds):
        raise ValueError(
            f"A reducer in the language model takes prompt and answer of at most {window} tokens here, the model's "
            f"sliding window, and these are {length}: use one that works before it, such as divprune."
        )


class Cutting:
    """One prompt's way through a language model whose later layers see fewer visual tokens.

    picture_BL numbers the picture of every visual token; what is text has TEXT, and padding FILL.
    """

    def __init__(
        self,
        model: Any,
        reducer: LayerReducer,
        embeds_BLD: Tensor,
        picture_BL: Tensor,
        key_sets: Sequence[Tensor] | None = None,
    ):
        self.model, self.reducer, self.embeds_BLD, self.whole_BL = model, reducer, embeds_BLD, picture_BL
        self.key_sets = key_sets and repeated(key_sets, picture_BL)
        self.cuts = reducer.cuts(len(model.layers))
        check_window(model, picture_BL.shape[1])
        self.seen: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        self.rows: Rows | None = None
        self.once = Once()
        self.index_BL: dict[int, Tensor] = {}
        self.cache: Any = None
        self.kept = KeptInCache(self.cuts[0].before, picture_BL.shape[1], compact=reducer.compact)

    @contextmanager
    def hooked(self) -> Iterator["Cutting"]:
        """Drops tokens in what runs in this context."""
        first = min(cut.reads for cut in self.cuts)
        with hooks(self.model, range(first, len(self.model.layers)), self.before_layer):
            yield self
        if self.cache is not None:
            if isinstance(self.reducer, MustDrop):
                self.cut_cache(self.cuts[0].reads, self.cuts[-1].before)
            self.cache.kept = self.kept
            self.cache.crop = refuse_crop

    def cut_cache(self, first: int, end: int) -> None:
        """Cuts the entries of some layers to what is left at last, where these layers still had more."""
        rows, whole_BL = self.rows, torch.arange(self.whole_BL.shape[1], device=self.whole_BL.device)
        assert rows is not None
        self.kept.first = first
        for number in range(first, end):
            index_BL = self.index_BL.get(number, whole_BL.expand(len(self.whole_BL), -1))
            # The place of everything that is left in this layer's entries; what fills up is its first.
            place_BL = (rows.index_BL[..., None] == index_BL[:, None]).int().argmax(dim=-1)
            layer = self.cache.layers[number]
            at = place_BL[:, None, :, None]
            layer.keys, layer.values = (
                old.gather(2, at.expand(-1, old.shape[1], -1, old.shape[3])) for old in (layer.keys, layer.values)
            )
            if hasattr(layer, "cumulative_length"):  # of a sliding window, which counts what it has seen
                layer.cumulative_length = place_BL.shape[1]
            self.kept.real_BL[number] = rows.real_BL

    def before_layer(self, number: int, hidden_BLD: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What a layer gets instead of what it would get."""
        if hidden_BLD.requires_grad and self.model.gradient_checkpointing and self.model.training:
            raise ValueError(f"{self.reducer.name} cannot drop tokens with gradient checkpointing; switch it off.")
        stock, self.cache = options, options.get("past_key_values")
        options = self.shortened(number, hidden_BLD, stock)
        for stage, cut in enumerate(self.cuts):
            if cut.before == number:
                if cut.reads == number:
                    self.seen[number] = hidden_BLD, options
                hidden_BLD = self.cut(stage, hidden_BLD, *self.seen.pop(cut.reads), stock)
                options = self.shortened(number, hidden_BLD, stock)
        if any(cut.reads == number < cut.before for cut in self.cuts):
            self.seen[number] = hidden_BLD, options
        if self.rows is not None:
            self.kept.real_BL[number], self.index_BL[number] = self.rows.real_BL, self.rows.index_BL
        return hidden_BLD, options

    def shortened(self, number: int, hidden_BLD: Tensor, stock: dict[str, Any]) -> dict[str, Any]:
        """A layer's options for the shorter rows."""
        rows = self.rows
        if rows is None:
            return stock
        mask = self.once(rows.real_BL, None, lambda: mask_of(self.model, rows.real_BL, rows.real_BL.shape[1]))
        kind = rope_kind(self.model, number)
        rope = self.once(rows.position_BL, kind, lambda: rope_of(self.model, kind, hidden_BLD, rows.position_BL))
        return stock | {"attention_mask": mask, "position_ids": rows.position_BL, "position_embeddings": rope}

    def cut(self, stage: int, now_BLD: Tensor, read_BLD: Tensor, read: dict[str, Any], stock: dict[str, Any]) -> Tensor:
        """Drops tokens, and returns the shorter rows."""
        rows = self.rows
        if rows is None:
            batch, length = self.whole_BL.shape
            index_BL = torch.arange(length, device=now_BLD.device).expand(batch, -1)
            position_BL = index_BL if stock.get("position_ids") is None else stock["position_ids"].expand(batch, -1)
            rows = Rows(index_BL, self.whole_BL, position_BL, self.whole_BL != FILL)
        layer = self.model.layers[self.cuts[stage].reads]
        query_BhLd, key_BhLd, scale, cap = queries_and_keys(layer, read_BLD, read)
        chosen = []
        for row in range(len(now_BLD)):
            picture_L, real_L, index_L = rows.picture_BL[row], rows.real_BL[row], rows.index_BL[row]
            pictures = picture_L[picture_L >= 0].unique().tolist()
            stays, merged = torch.ones_like(real_L), {}
            text = ((picture_L == TEXT) & real_L).nonzero().flatten()
            text = text[text > (picture_L >= 0).nonzero().max()] if pictures else text
            if pictures and not len(text):
                raise ValueError(f"{self.reducer.name} reads the text after the picture, and there is none.")
            for picture in pictures:
                visual = (picture_L == picture).nonzero().flatten()
                whole = (self.whole_BL[row] == picture).nonzero().flatten()
                view = LayerView(
                    hidden_LD=now_BLD[row].detach(),
                    norm=last_norm(self.model),
                    visual=visual,
                    place=index_L[visual] - whole[0],
                    text=text,
                    q_hLd=query_BhLd[row],
                    k_hLd=key_BhLd[row],
                    scale=scale,
                    rope_Ld=tuple(table.expand(len(now_BLD), -1, -1)[row] for table in read["position_embeddings"]),
                    real_L=real_L,
                    total=len(whole),
                    embeddings=(self.embeds_BLD[row, whole], self.embeds_BLD[row, index_L[text]]),
                    key_set=index_L[:0] if self.key_sets is None else self.key_sets[picture].to(index_L.device),
                    layers=len(self.model.layers),
                    cap=cap,
                )
                kept, new_cD = self.reducer.choose(stage, view)
                stays[visual] = False
                stays[visual[kept]] = True
                if new_cD is not None:
                    merged[picture] = (visual[-1], new_cD)
            chosen.append((stays, merged))
        return self.shorten(now_BLD, rows, chosen)

    def shorten(self, now_BLD: Tensor, rows: Rows, chosen: list[tuple[Tensor, dict]]) -> Tensor:
        """Gathers what stays; shorter rows are filled up in front."""
        parts = []
        for row, (stays_L, merged) in enumerate(chosen):
            # Pieces of the row, in order: what stays of it, with what was merged behind its picture's last token.
            order = stays_L.nonzero().flatten()
            states, index = now_BLD[row, order], rows.index_BL[row, order]
            picture, real = rows.picture_BL[row, order], rows.real_BL[row, order]
            position = rows.position_BL[row, order]
            for number, (end, new_cD) in sorted(merged.items(), reverse=True):
                at, count = int((order <= end).sum()), len(new_cD)
                states = torch.cat([states[:at], new_cD.to(states.dtype), states[at:]])
                index, picture, real, position = (
                    torch.cat([old[:at], old.new_full((count,), value), old[at:]])
                    for old, value in ((index, -1), (picture, number), (real, True), (position, 0))
                )
            parts.append((states, index, picture, position, real))
        length = max(len(index) for _, index, *_ in parts)

        def padded(which: int, value: Any) -> Tensor:
            return torch.stack([nn.functional.pad(p[which], (length - len(p[which]), 0), value=value) for p in parts])

        states_BLD = torch.stack([nn.functional.pad(p[0], (0, 0, length - len(p[0]), 0)) for p in parts])
        self.rows = Rows(padded(1, -1), padded(2, FILL), padded(3, 0), padded(4, False))
        if self.reducer.compact:
            self.rows.position_BL = (self.rows.real_BL.cumsum(-1) - 1).clamp(min=0)
        return states_BLD


def repeated(of_pictures: Sequence[Tensor], picture_BL: Tensor) -> list[Tensor]:
    """What belongs to pictures, where rows of prompts are repeated for beams, each with all its pictures."""
    in_rows = [len(row[row >= 0].unique()) for row in picture_BL]
    times, result, first = sum(in_rows) // len(of_pictures), [], 0
    for count in in_rows[::times]:
        result += list(of_pictures[first : first + count]) * times
        first += count
    return result


@contextmanager
def next_tokens(model: Any, kept: KeptInCache) -> Iterator[None]:
    """Runs tokens after a prompt that was cut, each layer with its own cache."""
    once = Once()

    def before_layer(number: int, hidden_BLD: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        entries, queries, begun_BL = options["past_key_values"], hidden_BLD.shape[1], kept.real_BL[number]
        more = entries.get_seq_length(number) - begun_BL.shape[1] + queries
        real_BL = once(begun_BL, None, lambda: nn.functional.pad(begun_BL, (0, more), value=True))
        check_window(model, kept.length + more)
        options = options | {"attention_mask": once(real_BL, None, lambda: mask_of(model, real_BL, queries))}
        if kept.compact:
            number_of_last = torch.arange(queries, device=real_BL.device) - queries
            position_BL = once(real_BL, "place", lambda: real_BL.sum(-1, keepdim=True) + number_of_last)
            kind = rope_kind(model, number)
            rope = once(position_BL, kind, lambda: rope_of(model, kind, hidden_BLD, position_BL))
            options |= {"position_ids": position_BL, "position_embeddings": rope}
        return hidden_BLD, options

    with hooks(model, range(kept.first, len(model.layers)), before_layer):
        yield


@contextmanager
def hooks(model: Any, layers: range, before_layer: Any) -> Iterator[None]:
    """Calls before_layer(number, hidden states, options) in front of layers, and gives them what it returns."""

    def hook(number: int, module: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        (hidden,) = args
        hidden, options = before_layer(number, hidden, options)
        return (hidden,), options

    with ExitStack() as stack:
        for number in layers:
            handle = model.layers[number].register_forward_pre_hook(partial(hook, number), with_kwargs=True)
            stack.callback(handle.remove)
        yield


class Once:
    """Makes what belongs to rows once, for all layers that have the same rows."""

    def __init__(self) -> None:
        self.made: dict[Any, tuple[Tensor, Any]] = {}

    def __call__(self, rows: Tensor, what: str | None, make: Callable[[], Any]) -> Any:
        """What `make` returns, or returned for the same tensor before."""
        if (id(rows), what) not in self.made:
            self.made[id(rows), what] = rows, make()  # with the tensor, or another one could get its id
        return self.made[id(rows), what][1]


def rope_kind(model: Any, number: int) -> str | None:
    """The kind of a layer, if kinds have rotary positions of their own, as in Gemma 3."""
    rotary: Any = type(model.rotary_emb)
    return model.config.layer_types[number] if has_kinds(rotary) else None


@cache
def has_kinds(rotary: type[nn.Module]) -> bool:
    """Whether a model's rotary positions take the kind of a layer."""
    return "layer_type" in inspect.signature(rotary.forward).parameters


def rope_of(model: Any, kind: str | None, hidden_BLD: Tensor, position_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions, for layers of a kind."""
    return model.rotary_emb(hidden_BLD, position_BL, *([] if kind is None else [kind]))


def mask_of(model: Any, real_BL: Tensor, queries: int) -> Tensor | None:
    """The mask that a model's attention takes: causal, over keys that are real (B, L), for its last tokens."""
    kind, keys = model.config._attn_implementation, real_BL.shape[1]
    if "flash" in kind:
        return None if bool(real_BL.all()) else real_BL
    if kind == "sdpa" and bool(real_BL.all()) and queries in (1, keys):
        return None
    place = torch.arange(keys, device=real_BL.device)
    query = place[keys - queries :, None]
    # A filled-up place reads itself, or its row of the softmax would be empty.
    mask = (place <= query) & real_BL[:, None, None, :] | (place == query)
    if kind == "sdpa":
        return mask
    if kind != "eager":
        raise ValueError(f"A reducer in the language model does not know attention `{kind}`; use sdpa, flash or eager.")
    dtype = model.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def refuse_crop(*_: Any) -> None:
    """Raises ValueError: what was cut has a length of its own in every layer."""
    raise ValueError("Assisted generation shortens the cache, which a reducer in the language model does not allow.")


__all__ = [
    "Cutting",
    "TowerReading",
    "check_reducer",
    "fitting_reducers",
    "merged_windows",
    "next_tokens",
    "number_pictures",
    "places_that_stay",
    "shorten_prompt",
    "take",
]
