"""The MS-Resampler model: vision tower -> projector -> language model.

Pixels (B, 3, height, width) -> tower -> patches (B, N, C) -> projector -> visual tokens (B, M, T), which take the
places of the image tokens in the text -> language model -> logits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from .clips_ms_resampler import IMAGE, ClipResampler
from .configuration_ms_resampler import MSResamplerConfig, token_grid
from .fusion_ms_resampler import PreFusion, fuse, words_of_prompt
from .loading_ms_resampler import LoadingMixin
from .packing_ms_resampler import PackedLinear, pack_linears
from .projectors_ms_resampler import OWN_GRID, PROJECTORS, SCOPED_PROJECTORS, build_projector, init_projector_weights
from .reducers_ms_resampler import (
    DivPrune,
    FasterVLM,
    HiRED,
    LayerReducer,
    MustDrop,
    Reducer,
    TowerReducer,
    ascending,
    read_reducer,
)
from .reducing_ms_resampler import (
    FILL,
    Cutting,
    TowerReading,
    check_reducer,
    fitting_reducers,
    merged_windows,
    next_tokens,
    number_pictures,
    places_that_stay,
    reading_layer,
    shorten_prompt,
    take,
)
from .resampler_ms_resampler import init_resampler_weights
from .tiles_ms_resampler import NONE, Grid, Tiling, join_tiles, over_picture, read_tilings
from .towers_ms_resampler import flatten_patches, make_layers_skippable, patch_features, states_of

VIEWS_AT_ONCE = 8  # of tiled pictures and clips, in the tower
# The name of the key-value cache: until transformers 5.23, and since.
_CACHE_NAMES = ("past_key_values", "cache")


@dataclass
class MSResamplerImageFeatures(BaseModelOutputWithPooling):
    """What `get_image_features` returns: one entry per image, in order.

    pooler_output: visual tokens (M, T); patch_grids, token_grids: (rows, columns).
    clips: of temporal scopes, the frames and steps of every picture, which is an image or a clip; grids are those of a
        frame and of a step, and tokens and patches in the order (t, y, x). A step is a span of time.
    overview_grids: of tiled images, the token grids of the overviews, whose tokens come first; (0, 0) is none.
    token_counts: how many image tokens each has in a text: M, before a reducer.
    last_hidden_state: of the tower's last layer that is read; attentions and all hidden_states: if requested.
    word_weights (M, words): the share of each of the configured `visual_words` in each token.
    deepstack_features: with pre-fusion, one list of every image's patches (N, T); a name that `generate` knows.
    scope_weights (S, M), scope_attentions (S, M, N) and token_places (M, 2): with `output_scopes=True`, see ScopeMaps.
        Attention of an overview is spread over the patches of the whole image. Places of clips are (M, 3), time first.
    kept_tokens: with a reducer that chooses before the language model, and merges nothing, which visual tokens stay;
        maps and grids are of all.
    key_sets: the visual tokens that the reducer mustdrop always keeps.
    """

    patch_grids: list[tuple[int, int]] | None = None
    token_grids: list[tuple[int, int]] | None = None
    clips: list[tuple[int, int]] | None = None
    overview_grids: list[tuple[int, int]] | None = None
    token_counts: list[int] | None = None
    word_weights: list[Tensor] | None = None
    deepstack_features: list[list[Tensor]] | None = None
    scope_weights: list[Tensor] | None = None
    scope_attentions: list[Tensor] | None = None
    token_places: list[Tensor] | None = None
    kept_tokens: list[Tensor] | None = None
    key_sets: list[Tensor] | None = None


@dataclass
class MSResamplerModelOutputWithPast(BaseModelOutputWithPast):
    """The language model's output, and the visual tokens of all images in one row: (sum of M, T).

    kept_positions (batch, L'): if a reducer made the text shorter, the place of every token before that, or -1.
    """

    image_hidden_states: Tensor | None = None
    kept_positions: Tensor | None = None


@dataclass
class MSResamplerCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Loss (if there are labels), logits (batch, L, vocabulary), and what the base model returns."""

    image_hidden_states: Tensor | None = None
    kept_positions: Tensor | None = None


def _cache_of(values: Mapping[str, Any]) -> dict[str, Cache]:
    """The key-value cache in arguments or outputs, with the name it has there, if any."""
    # Not `in`: since transformers 5.24, ModelOutput returns True for the old name, too.
    return {name: values[name] for name in _CACHE_NAMES if name in values.keys() and values[name] is not None}  # noqa: SIM118


class MSResamplerPreTrainedModel(LoadingMixin, PreTrainedModel):
    """What all MS-Resampler models share: configuration, initialisation and abilities."""

    config: MSResamplerConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        projector.__name__ for projector in (*SCOPED_PROJECTORS.values(), ClipResampler, *PROJECTORS.values())
    ]
    _skip_keys_device_placement = list(_CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self) -> None:
        """Completes the model as transformers does, with only the `_no_split_modules` it has, as FSDP requires."""
        super().post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present & set(self._no_split_modules))

    def initialize_weights(self) -> None:
        """Initialises all weights, including the language model's own extras such as Falcon H1's buffers."""
        super().initialize_weights()
        language_model = self.base_model.language_model
        language_model._init_weights(language_model)

    @property
    def reducer(self) -> Reducer | None:
        """The visual token reducer, if there is one.

        Not that of the configuration: with `trust_remote_code`, transformers loads the configuration's modules a
        second time, so that its classes are others.
        """
        fields = self.config.reducer_config
        return None if fields is None else read_reducer(fields)

    def set_reducer(self, reducer_type: str | None, **settings: Any) -> Self:
        """Reduces visual tokens from now on by a method of reducers_ms_resampler.py, such as `set_reducer("divprune",
        keep=64)`; None switches it off. It is saved with the configuration.

        Raises ValueError if there is no such method, or if it does not fit this model.
        """
        if reducer_type is None and settings:
            raise ValueError(f"Without a reducer there is no `{next(iter(settings))}`: give set_reducer(None) alone.")
        fields = None if reducer_type is None else {"reducer_type": reducer_type, **settings}
        if fields is not None:
            check_reducer(read_reducer(fields), self.base_model)
        self.config.reducer_config = fields
        return self

    def fitting_reducers(self, counts: Iterable[int]) -> dict[str, list[Reducer]]:
        """The reducers that `set_reducer` takes here with nothing but `keep`, one of some counts, by method."""
        return fitting_reducers(self.base_model, counts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or converts all tensors; packed layers refuse this before anything has changed."""
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module._apply(fn)
        return super()._apply(fn, recurse)

    def pack_weights(self) -> Self:
        """Packs the weights in place for faster answers on a CPU (see `pack_linears`); does nothing on other devices.

        A packed model cannot be trained, moved, converted or compiled. It is saved with plain weights.
        """
        pack_linears(self)
        return self


class MSResamplerModel(MSResamplerPreTrainedModel):
    """Vision tower, projector and language model, without the language model's head."""

    def __init__(self, config: MSResamplerConfig):
        super().__init__(config)
        self.tower_shape = config.tower
        self.vision_tower = build_part(config.vision_config)
        if unread := config.unread_layers:
            make_layers_skippable(self.vision_tower, unread)
        self.projector = build_projector(config)
        self.fusion = PreFusion(config) if config.projector_config.fusion_layers else None
        self.language_model = build_part(config.text_config)
        for part in self.projector.modules():
            if isinstance(part, PreTrainedModel) and config.projector_config._attn_implementation is not None:
                part.set_attn_implementation(config.projector_config._attn_implementation)
        if self.reducer is not None:
            check_reducer(self.reducer, self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the projector's modules; tower and language model initialise themselves."""
        super()._init_weights(module)
        init_resampler_weights(module)
        init_projector_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @merge_with_config_defaults
    @can_return_tuple
    @select_hidden_states(lambda self: self.config.feature_layers)
    def get_image_features(
        self,
        pixel_values: Tensor,
        token_grids: Tensor | list[tuple[int, int]] | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        output_scopes: bool = False,
        tilings: Tensor | list | None = None,
        clips: Tensor | list | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MSResamplerImageFeatures:
        """Visual tokens of images, for `forward` or `generate` (`mm_encoder_outputs={"image": features}`).

        pixel_values is (B, 3, height, width), or SigLIP 2's patches with their mask and spatial_shapes (B, 2).
        token_grids (B, 2) sets the grid of every image, and None means the configured budget; torch.compile needs
        them as a list of tuples, and compiles once for every list. Gemma's embedding multiplier is not applied to
        visual tokens, because it belongs to the word embeddings; Granite's is, because it belongs to the decoder.

        tilings (B, 3, 2) says how images are cut into tiles (see Tiling): pixel_values are then the views of all of
        them, (V, 3, height, width), which the tower runs a few at a time.

        clips (B, 2), of a projector whose `video_form` is "scopes", are the numbers of frames and of steps of every
        picture, 1 and 1 of an image: pixel_values are then the frames of all of them, and token_grids those of a step.

        The tower runs up to the last layer that is read, which is last_hidden_state; `output_hidden_states=True` or
        `output_attentions=True` runs all layers.
        """
        layers, shape = self.config.feature_layers, self.tower_shape
        attentions = kwargs.get("output_attentions") or self.config.vision_config.output_attentions
        as_configured = kwargs["output_hidden_states"] == layers and not attentions
        if as_configured and shape.unread_layers(layers) > 0:
            kwargs["skip_unread"] = True  # not passed to towers that do not accept it
        if not shape.can_stop_early:
            kwargs["output_hidden_states"] = True
        reducer = self.reducer
        self._check_tilings(tilings, token_grids, spatial_shapes, reducer)
        pictures = None if clips is None else self._read_clips(clips, token_grids)
        if isinstance(reducer, TowerReducer):
            return self._reduce_patches(reducer, pixel_values, token_grids, tilings, **kwargs)
        size = pixel_values.shape[-2], pixel_values.shape[-1]  # patches have their own grids
        inputs = pixel_values, pixel_attention_mask, spatial_shapes
        if tilings is None and pictures is None:
            tower = self._run_tower(*inputs, **kwargs)
        else:
            groups = (repeat(None) if values is None else values.split(VIEWS_AT_ONCE) for values in inputs)
            tower = joined([self._run_tower(*views, **kwargs) for views in zip(*groups, strict=False)])
        x_BNC, patch_grid = patch_features(tower, shape, layers, size)
        x_BNC = x_BNC.to(next(p.dtype for p in self.projector.parameters() if p.is_floating_point()))
        if torch.compiler.is_exporting():  # graphs cannot split it: (B, M, T), in the configured budget
            grid = token_grid(self.config.projector_config.visual_tokens, patch_grid)
            tokens_BMT, patches_BNT = self._run_projector(x_BNC, patch_grid, grid, False)
            return MSResamplerImageFeatures(
                pooler_output=self._mix_words([tokens_BMT])[0][0],
                deepstack_features=[patches_BNT] if self.fusion is not None else None,
            )
        overviews = None
        if tilings is None:
            sizes = [patch_grid] * len(x_BNC) if spatial_shapes is None else list(map(tuple, spatial_shapes.tolist()))
            if pictures is not None:
                x_pNC, patch_grids = joined_frames(x_BNC, sizes, pictures)
                wanted = self._token_grids(token_grids, patch_grids)
                tokens, maps = self._project(x_pNC, patch_grids, wanted, output_scopes, pictures)
            else:
                patch_grids, wanted = sizes, self._token_grids(token_grids, sizes)
                tokens, maps = self._project(x_BNC, patch_grids, wanted, output_scopes)
        else:
            cuts = read_tilings(tilings)
            patch_grids, overviews = [cut.patches for cut in cuts], [cut.overview for cut in cuts]
            wanted = self._token_grids(token_grids, patch_grids)
            tokens, maps = self._project_tiles(x_BNC, patch_grid, cuts, wanted, output_scopes, pictures)
        counts = [len(y_MT) for y_MT in tokens]
        tokens, words = self._mix_words(tokens)
        kept = None
        if isinstance(reducer, DivPrune):
            kept = [ascending(reducer.choose(y_MT)) for y_MT in tokens]
            tokens = [y_MT[k] for y_MT, k in zip(tokens, kept, strict=True)]
            words = words and [weight_MW[k] for weight_MW, k in zip(words, kept, strict=True)]
        return MSResamplerImageFeatures(
            last_hidden_state=states_of(tower)[max(layer % len(shape.states) for layer in layers)],
            pooler_output=tokens,
            hidden_states=tower.hidden_states,
            attentions=getattr(tower, "attentions", None),
            patch_grids=patch_grids,
            token_grids=wanted,
            clips=pictures,
            overview_grids=overviews,
            token_counts=counts,
            word_weights=words,
            deepstack_features=[[patches for (patches,) in maps]] if self.fusion is not None else None,
            scope_weights=[weights for weights, _, _ in maps] if output_scopes else None,
            scope_attentions=[attentions for _, attentions, _ in maps] if output_scopes else None,
            token_places=[places for *_, places in maps] if output_scopes else None,
            kept_tokens=kept,
        )

    def _reduce_patches(
        self,
        reducer: TowerReducer,
        pixel_values: Tensor,
        token_grids: Tensor | list[tuple[int, int]] | None,
        tilings: Tensor | list | None,
        **kwargs: Any,
    ) -> MSResamplerImageFeatures:
        """Visual tokens of what a reducer takes from the tower; `token_grids` of all patches, as the text has them."""
        shape, layer = self.tower_shape, self.config.feature_layers[0]
        if reducer.last_layer:
            kwargs.pop("skip_unread", None)
        reading = TowerReading(self.vision_tower, reading_layer(reducer, layer, len(shape.states) - 1))
        first = None if tilings is None else TowerReading(self.vision_tower, 0)
        sides, stride = pixel_values.shape[-2:], shape.states[layer].stride
        patch_grid = sides[0] // stride[0], sides[1] // stride[1]
        merging: Any = nullcontext()
        projector: Any = self.projector
        dtype = next(p.dtype for p in projector.parameters() if p.is_floating_point())
        views, first_views, states = [], [], []
        merges = isinstance(reducer, MustDrop)  # so that pictures have different numbers of patches
        for pixels in pixel_values.split(1 if merges else len(pixel_values) if tilings is None else VIEWS_AT_ONCE):
            if isinstance(reducer, MustDrop):
                merging = merged_windows(self.vision_tower, reducer, patch_grid)
            with reading.hooked(), merging, first.hooked() if first else nullcontext():
                states.append(states_of(self._run_tower(pixels, None, None, **kwargs))[layer])
            views += reading.views(states[-1].to(dtype), shape)
            first_views += first.views(states[-1], shape) if first else []
        patch_grids, overviews = [patch_grid] * len(pixel_values), None
        if isinstance(reducer, HiRED) and tilings is not None:
            cuts = read_tilings(tilings)
            patch_grids, overviews = [cut.patches for cut in cuts], [cut.overview for cut in cuts]
            rows, reduced = iter(zip(views, first_views, strict=True)), []
            for cut in cuts:
                seen, seen_first = zip(*islice(rows, cut.views), strict=True)
                tiled = reducer.reduce_tiles(seen, seen_first[0].attention_hP) if cut.views > 1 else None
                reduced.append(reducer.reduce(seen[0]) if tiled is None else tiled)
        else:
            reduced = [reducer.reduce(view) for view in views]
        kept = None
        if isinstance(reducer, FasterVLM) and tilings is None:
            kept = [reducer.choose(view.attention_hP) for view in views]
        tokens, words = self._mix_words([projector.mlp(x_TC) for x_TC in reduced])
        wanted = self._token_grids(token_grids, patch_grids)
        counts = [rows * columns for rows, columns in wanted]
        if overviews is not None:
            counts = [count + rows * columns for count, (rows, columns) in zip(counts, overviews, strict=True)]
        return MSResamplerImageFeatures(
            last_hidden_state=None if merges else torch.cat(states),
            pooler_output=tokens,
            patch_grids=patch_grids,
            token_grids=wanted,
            overview_grids=overviews,
            token_counts=counts,
            word_weights=words,
            kept_tokens=kept,
            key_sets=[reducer.key_set(view) for view in views] if isinstance(reducer, MustDrop) else None,
        )

    def _run_tower(self, pixel_values: Tensor, mask: Tensor | None, shapes: Tensor | None, **kwargs: Any):
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        if self.tower_shape.takes_patches:
            patches = {"pixel_values": pixel_values, "pixel_attention_mask": mask, "spatial_shapes": shapes}
            side = self.tower_shape.states[0].stride[0]
            kwargs |= flatten_patches(pixel_values, side) if shapes is None else patches
            return self.vision_tower(return_dict=True, **kwargs)
        if self.tower_shape.must_interpolate:
            kwargs["interpolate_pos_encoding"] = tuple(pixel_values.shape[-2:]) != self.tower_shape.image_size
        return self.vision_tower(pixel_values, return_dict=True, **kwargs)

    def _token_grids(
        self, token_grids: Tensor | list[tuple[int, int]] | None, patch_grids: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The token grid (Mh, Mw) of every image: as requested, or the configured budget laid out over its patches."""
        if token_grids is None:
            budget = self.config.projector_config.visual_tokens
            return [token_grid(budget, patch_grid) for patch_grid in patch_grids]
        if len(token_grids) != len(patch_grids):
            raise ValueError(f"Got {len(token_grids)} token grids for {len(patch_grids)} images; give one for each.")
        return [tuple(grid) for grid in (token_grids.tolist() if isinstance(token_grids, Tensor) else token_grids)]

    def _run_projector(
        self,
        x_BNC: Tensor,
        patch_grid: tuple[int, int],
        token_grid: tuple[int, int],
        output_scopes: bool,
        clip: Grid = IMAGE,
    ) -> tuple[Tensor, Any]:
        """Visual tokens, and what else there is: maps of the scopes, or the patches that are fused with the text."""
        config = self.config.projector_config  # the module itself may be wrapped, for example by peft
        if config.video_form == "scopes":
            return self.projector(x_BNC, patch_grid, token_grid, output_scopes, clip)
        if config.num_scopes:
            return self.projector(x_BNC, patch_grid, token_grid, output_scopes)
        if output_scopes:
            kind = config.projector_type
            raise ValueError(f"`output_scopes` needs a projector with scopes, and `{kind}` has none.")
        if self.fusion is not None:
            return self.projector(x_BNC, patch_grid, token_grid, with_patches=True)
        return self.projector(x_BNC, patch_grid, token_grid), None

    def _check_tilings(
        self, tilings: Any, token_grids: Any, spatial_shapes: Tensor | None, reducer: Reducer | None
    ) -> None:
        """Raises ValueError if this model, or the call, cannot have tiles."""
        if tilings is None:
            return
        if self.fusion is not None:
            raise ValueError("Pre-fusion reads the patches of single views: leave out `tiles`.")
        if isinstance(reducer, TowerReducer) and not isinstance(reducer, HiRED):
            raise ValueError(f"{reducer.name} chooses patches of single views: leave out `tiles`, or use hired.")
        if spatial_shapes is not None:
            raise ValueError("`tilings` and `spatial_shapes` exclude each other: such a tower reads pictures uncut.")
        if token_grids is None:
            raise ValueError("`tilings` come with `token_grids`: give the model all that the processor returns.")

    def _read_clips(self, clips: Tensor | list, token_grids: Any) -> list[Grid]:
        """The frames and steps of every picture. Raises ValueError if this model, or the call, cannot have clips."""
        if self.config.projector_config.video_form != "scopes":
            raise ValueError(
                '`clips` are read by temporal scopes, which this projector lacks: set `video_form` to "frames" in the '
                "processor."
            )
        if token_grids is None:
            raise ValueError("`clips` come with `token_grids`: give the model all that the processor returns.")
        if len(clips) != len(token_grids):
            raise ValueError(f"Got {len(clips)} clips for {len(token_grids)} token grids; give one for each picture.")
        rows = clips.tolist() if isinstance(clips, Tensor) else clips
        pictures = [(int(frames), int(steps)) for frames, steps in rows]
        for frames, steps in pictures:
            if not 1 <= steps <= frames:
                raise ValueError(f"A clip of {frames} frames has 1 to {frames} steps, got {steps}.")
        return pictures

    def _project_tiles(
        self,
        x_VNC: Tensor,
        tile_patches: Grid,
        cuts: list[Tiling],
        token_grids: list[Grid],
        output_scopes: bool,
        pictures: list[Grid] | None,
    ) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """Visual tokens of every tiled image or clip, and its scope maps; those of the overview come first.

        Raises ValueError if the number of views is not that of the tilings.
        """
        clips = [IMAGE] * len(cuts) if pictures is None else pictures
        views = [cut.views * frames for cut, (frames, _) in zip(cuts, clips, strict=True)]
        if sum(views) != len(x_VNC):
            raise ValueError(f"Got {len(x_VNC)} views for tilings of {sum(views)}: give pixels and tilings together.")
        images = zip(x_VNC.split(views), cuts, token_grids, clips, strict=True)
        parts = [self._parts(x_vNC, tile_patches, cut, grid, clip) for x_vNC, cut, grid, clip in images]
        flat = map(list, zip(*(part for of_image in parts for part in of_image), strict=True))
        x_parts, patch_grids, wanted, of_parts = flat
        projected = self._project(x_parts, patch_grids, wanted, output_scopes, of_parts)
        tokens, maps = iter(projected[0]), iter(projected[1])
        joint_tokens: list[Tensor] = []
        joint_maps: list[tuple[Tensor, ...]] = []
        for of_image, cut in zip(parts, cuts, strict=True):
            joint_tokens.append(torch.cat(list(islice(tokens, len(of_image)))))
            if output_scopes:
                weights, attentions, places = zip(*islice(maps, len(of_image)), strict=True)
                seen = [over_picture(attention, tile_patches, cut.patches) for attention in attentions[:-1]]
                attention_SMN = torch.cat([*seen, attentions[-1]], dim=1)
                joint_maps.append((torch.cat(weights, dim=1), attention_SMN, torch.cat(places)))
        return joint_tokens, joint_maps

    def _parts(
        self, x_vNC: Tensor, tile_patches: Grid, cut: Tiling, grid: Grid, clip: Grid
    ) -> list[tuple[Tensor, Grid, Grid, Grid]]:
        """What the projector reads of a tiled image: features (N, C), their grid, the token grid over it, and the clip.

        That is the overview, if there is one, and the whole image; or, for peers with a grid of their own, each view.
        """
        kind = self.config.projector_config.projector_type
        if clip != IMAGE:
            if cut.overview != NONE:
                raise ValueError("A clip has no overview: leave it out of the tilings.")
            frames = [join_tiles(frame, tile_patches, cut) for frame in x_vNC.split(cut.views)]
            return [(torch.cat(frames), cut.patches, grid, clip)]
        if kind not in OWN_GRID:
            seen = [] if cut.overview == NONE else [(x_vNC[0], tile_patches, cut.overview, clip)]
            return [*seen, (join_tiles(x_vNC[len(seen) :], tile_patches, cut), cut.patches, grid, clip)]
        if cut.patches != tile_patches:
            raise ValueError(f"`{kind}` is made for the grid of one tile: give the processor `tiles_apart=True`.")
        return [(x_NC, tile_patches, grid, clip) for x_NC in x_vNC]

    def _project(
        self,
        x_BNC: Tensor | list[Tensor],
        patch_grids: list[tuple[int, int]],
        token_grids: list[tuple[int, int]],
        output_scopes: bool,
        clips: list[Grid] | None = None,
    ) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """Visual tokens of every picture and its scope maps or fused patches; those of the same grids are batched."""
        grids = list(zip(patch_grids, token_grids, clips or [IMAGE] * len(token_grids), strict=True))
        tokens: dict[int, Tensor] = {}
        maps: dict[int, tuple[Tensor, ...]] = {}
        for patches, wanted, clip in dict.fromkeys(grids):
            rows = [row for row, grid in enumerate(grids) if grid == (patches, wanted, clip)]
            if isinstance(x_BNC, Tensor):
                x = x_BNC if len(rows) == len(grids) else x_BNC[rows]
            else:
                x = torch.stack([x_BNC[row] for row in rows])
            if self.tower_shape.takes_patches:  # drops padding to the batch's largest image
                x = x[:, : clip[0] * patches[0] * patches[1]]
            y_BMT, more = self._run_projector(x, patches, wanted, output_scopes, clip)
            for row, index in enumerate(rows):
                tokens[index] = y_BMT[row]
                if output_scopes:
                    maps[index] = more.weights_BSM[row], more.attentions_BSMN[row], more.places_BM2[row]
                elif self.fusion is not None:
                    maps[index] = (more[row],)
        return [tokens[index] for index in sorted(tokens)], [maps[index] for index in sorted(maps)]

    def _mix_words(self, tokens: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Visual tokens y as softmax(y E^T) E over the embeddings E of the configured words, if any, and the weights.

        E is what the language model reads, so that it includes Gemma's multiplier.
        """
        if not self.config.visual_words:
            return tokens, None
        ids = torch.tensor(self.config.visual_words, device=tokens[0].device)
        e_WT = self.get_input_embeddings()(ids).to(tokens[0].device, tokens[0].dtype)
        weights = [F.linear(y_MT, e_WT).softmax(dim=-1, dtype=torch.float32) for y_MT in tokens]
        return [weight_MW.to(e_WT.dtype) @ e_WT for weight_MW in weights], weights

    def _placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, visual_tokens: int) -> Tensor:
        """The mask (batch, L, 1) of image tokens in the text. Raises ValueError if the counts differ."""
        mask = self._is_image(input_ids, inputs_embeds)
        if not torch.compiler.is_exporting():  # ONNX cannot raise
            torch_compilable_check(
                mask.sum() == visual_tokens,
                lambda: (
                    f"The text has {int(mask.sum())} image tokens, but the images make {visual_tokens} visual tokens: "
                    "process text and images together, with the same `visual_tokens`."
                ),
            )
        return mask.unsqueeze(-1)

    def _is_image(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Which tokens of the text are image tokens (batch, L)."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_grids: Tensor | list[tuple[int, int]] | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        mm_encoder_outputs: dict[str, MSResamplerImageFeatures] | None = None,
        prompt_mask: Tensor | None = None,
        tilings: Tensor | list | None = None,
        clips: Tensor | list | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MSResamplerModelOutputWithPast:
        """Runs text (batch, L), as ids or embeddings, with the images for its image tokens, if any.

        Images are given as pixels or, already encoded, as `mm_encoder_outputs={"image": get_image_features(...)}`.
        With pre-fusion they are fused with the text's words, or with those of `prompt_mask` (batch, up to L).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and images is not None:
            raise ValueError("Give images once: as `pixel_values` or as `mm_encoder_outputs`, not as both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            images = self.get_image_features(
                pixel_values,
                token_grids,
                pixel_attention_mask,
                spatial_shapes,
                tilings=tilings,
                clips=clips,
                return_dict=True,
            )
        running: Any = nullcontext()
        features, kept = None, None
        if images is not None:
            tokens = images.pooler_output
            if self.reducer is not None and (wholes := getattr(images, "token_counts", None)):
                counts = [len(y_MT) for y_MT in tokens]
                shortened = None
                if len(counts) == len(wholes) and counts != wholes:  # for beams, transformers repeats only the tokens
                    shortened = self.shorten(wholes, counts, input_ids, inputs_embeds, attention_mask)
                if shortened is not None:
                    kept, attention_mask, position_ids = *shortened, None
                    inputs_embeds = take(inputs_embeds, kept)
                    input_ids = None if input_ids is None else take(input_ids, kept, empty=-1)
            # An exported graph has one tensor, of any number of images.
            count = tokens.shape[0] * tokens.shape[1] if isinstance(tokens, Tensor) else sum(map(len, tokens))
            mask = self._placeholder_mask(input_ids, inputs_embeds, count)
            if self.fusion is not None:
                self._check_prompt(images, kwargs)
                words_BL = words_of_prompt(mask[..., 0], attention_mask, prompt_mask)
                assert images.deepstack_features is not None  # from the same model
                patches = images.deepstack_features[0]
                tokens, inputs_embeds = fuse(self.fusion, patches, tokens, inputs_embeds, mask[..., 0], words_BL)
            features = tokens.flatten(0, 1) if isinstance(tokens, Tensor) else torch.cat(list(tokens))
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
            if isinstance(reducer := self.reducer, LayerReducer):
                running = self._cutting(reducer, inputs_embeds, mask, images, attention_mask, _cache_of(kwargs))
        for cache in _cache_of(kwargs).values():
            if images is None and hasattr(cache, "kept"):
                more = inputs_embeds.shape[1]
                if more > 1 and attention_mask is not None and not attention_mask[:, -more:].all():
                    raise ValueError(
                        "Text behind a prompt that a reducer in the language model shortened cannot have padding: give "
                        "texts of one length, or one at a time."
                    )
                running = next_tokens(self.language_model, cache.kept)
        with running as cutting:
            outputs = self.language_model(
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        if cutting is not None and cutting.rows is not None:
            kept = cutting.rows.index_BL
        return MSResamplerModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
            image_hidden_states=features,
            kept_positions=kept,
            **_cache_of(outputs),
        )

    def shorten(
        self,
        wholes: list[int],
        counts: list[int],
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """The places (batch, L') of what stays of a text with as many image tokens as pictures had visual tokens before
        a reducer (wholes), if as many as there are now (counts) stay, and the mask; None if the text is short already.
        """
        is_image = self._is_image(input_ids, inputs_embeds)
        if int(is_image.sum()) != sum(wholes):
            return None
        return shorten_prompt(places_that_stay(is_image, wholes, counts), attention_mask)

    def _cutting(
        self,
        reducer: LayerReducer,
        inputs_embeds: Tensor,
        mask: Tensor,
        images: MSResamplerImageFeatures,
        attention_mask: Tensor | None,
        caches: dict[str, Cache],
    ) -> Any:
        """The context in which the language model drops visual tokens between its layers."""
        for cache in caches.values():
            if cache.is_compileable:
                raise ValueError(
                    "A reducer in the language model makes rows shorter, which a static cache cannot hold."
                )
            if cache.get_seq_length():
                raise ValueError(
                    "Pictures after the first part of a conversation cannot be reduced in the language model: give the "
                    "whole conversation at once, without a cache."
                )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("A reducer in the language model needs `attention_mask` as (batch, L).")
        counts = [len(tokens) for tokens in images.pooler_output or ()]
        key_sets = getattr(images, "key_sets", None)
        if isinstance(reducer, MustDrop) and key_sets is None:
            raise ValueError("mustdrop needs the `key_sets` that `get_image_features` returns with the visual tokens.")
        picture_BL = number_pictures(mask[..., 0], counts)
        if attention_mask is not None:
            picture_BL[attention_mask == 0] = FILL
        return Cutting(self.language_model, reducer, inputs_embeds, picture_BL, key_sets).hooked()

    def _check_prompt(self, images: MSResamplerImageFeatures, kwargs: Mapping[str, Any]) -> None:
        """Raises ValueError if only a part of the prompt is there to be fused, or a graph cannot hold it."""
        if torch.compiler.is_exporting():
            raise ValueError("Pre-fusion cannot be exported with the language model: export `get_image_features`.")
        if images.patch_grids is None:
            raise ValueError("Pre-fusion reads a prompt at once: leave out `prefill_chunk_size`.")
        if any(cache.get_seq_length() for cache in _cache_of(kwargs).values()):
            raise ValueError("Pre-fusion reads a prompt at once: give all of it with its images, and an empty cache.")


def joined(outputs: list[Any]) -> Any:
    """The tower's outputs of several groups of views as those of all."""

    def join(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(list(values))
        return None if values[0] is None else tuple(map(join, zip(*values, strict=True)))

    return type(outputs[0])(**{name: join([output[name] for output in outputs]) for name in outputs[0]})


def joined_frames(x_VNC: Tensor, sizes: list[Grid], pictures: list[Grid]) -> tuple[list[Tensor], list[Grid]]:
    """The patches (F * N, C) of every clip, from those of its frames, and their grids.

    Raises ValueError if the frames of a clip, or their number, do not fit.
    """
    counts = [frames for frames, _ in pictures]
    if sum(counts) != len(x_VNC):
        raise ValueError(f"Got {len(x_VNC)} frames for clips of {sum(counts)}: give pixels and clips together.")
    grids = iter(sizes)
    of_clips = [list(islice(grids, count)) for count in counts]
    if any(len(set(of_clip)) > 1 for of_clip in of_clips):
        raise ValueError("The frames of a clip have patch grids of different sizes.")
    grids_of = [of_clip[0] for of_clip in of_clips]
    joint = zip(x_VNC.split(counts), grids_of, strict=True)
    return [x_FNC[:, : rows * columns].flatten(0, 1) for x_FNC, (rows, columns) in joint], grids_of


def with_prompt(generated: Any, prompt: Tensor, length: int) -> Any:
    """What `generate` returned, with a prompt instead of its first `length` tokens."""
    sequences = generated if isinstance(generated, Tensor) else generated.sequences
    before = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0).to(sequences.device)
    whole = torch.cat([before, sequences[:, length:]], dim=1)
    if isinstance(generated, Tensor):
        return whole
    generated.sequences = whole
    return generated


def build_part(config: PretrainedConfig) -> PreTrainedModel:
    """A tower or language model. A part without a choice of attention implementation accepts any setting."""
    kind = MODEL_MAPPING[type(config)]
    choices = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")
    if any(getattr(kind, choice) for choice in choices):
        return AutoModel.from_config(config)
    config._attn_implementation = None
    part = AutoModel.from_config(config)
    for choice in choices:
        setattr(part, choice, True)
    return part


def build_head(config: PretrainedConfig) -> nn.Linear:
    """A language model's output head. Raises ValueError if it is not a linear layer."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(config)
        head, parts = causal.get_output_embeddings(), [*causal.children()]
        if isinstance(head, nn.Linear) and len(parts) == 2 and head in parts and causal.base_model in parts:
            return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    raise ValueError(
        f"The language model `{config.model_type}` is not a decoder with a stack of layers and a linear "
        "head behind it; use one that is, such as llama, qwen3, gemma, phi, gpt2, gpt_neox or opt."
    )


class MSResamplerForConditionalGeneration(MSResamplerPreTrainedModel, GenerationMixin):
    """The model that answers: MSResamplerModel and the language model's head."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MSResamplerConfig):
        super().__init__(config)
        self.model = MSResamplerModel(config)
        self.lm_head = build_head(config.text_config)
        embeddings = self.get_input_embeddings()
        (name,) = (name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        # The image token must not be generated, and prompt lookup, which copies from the prompt, must not propose it.
        self.generation_config.suppress_tokens = [config.image_token_id]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> tuple | MSResamplerImageFeatures:
        """See MSResamplerModel.get_image_features."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_grids: Tensor | list[tuple[int, int]] | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        mm_encoder_outputs: dict[str, MSResamplerImageFeatures] | None = None,
        prompt_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        tilings: Tensor | list | None = None,
        clips: Tensor | list | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MSResamplerCausalLMOutputWithPast:
        """Next-token logits of MSResamplerModel's text.

        The loss covers the `labels` (batch, L) that are neither -100 nor image tokens; pre-fusion leaves these out.
        """
        if prompt_mask is None and labels is not None:
            prompt_mask = labels == -100
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            token_grids=token_grids,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            mm_encoder_outputs=mm_encoder_outputs,
            prompt_mask=prompt_mask,
            tilings=tilings,
            clips=clips,
            **kwargs,
        )
        logits = self._logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocabulary, kept = self.config.text_config.vocab_size, outputs.kept_positions
            if kwargs.get("shift_labels") is not None:
                kwargs["shift_labels"] = self.words_only(kwargs["shift_labels"], kept)
            labels = self.words_only(labels, kept)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return MSResamplerCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            kept_positions=outputs.kept_positions,
            **_cache_of(outputs),
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; the returned prompt is the one given, also where a reducer shortens it.

        Pre-fusion covers the prompt's words, and not those that are generated.
        """
        prompt, embeds = kwargs.pop("input_ids", None) if inputs is None else inputs, kwargs.get("inputs_embeds")
        given = prompt if embeds is None else embeds
        if self.config.projector_config.fusion_layers and given is not None:
            kwargs.setdefault("prompt_mask", torch.ones(given.shape[:2], dtype=torch.bool, device=given.device))
        cached = kwargs.get("use_cache", self.generation_config.use_cache)
        if isinstance(self.reducer, LayerReducer) and cached is False:
            raise ValueError(
                f"{self.reducer.name} chooses once, when a prompt is read, but without a cache every token reads it "
                "again: leave out `use_cache=False`."
            )
        images = self._images_to_shorten_for(kwargs) if self.reducer else None
        if images is not None:
            wholes, counts = images.token_counts or [], [len(y) for y in images.pooler_output]
            shown = self.get_input_embeddings()(prompt) if embeds is None else embeds
            ids = prompt if embeds is None else None
            shortened = self.model.shorten(wholes, counts, ids, shown, kwargs.get("attention_mask"))
            if shortened is not None:
                kept, mask = shortened
                kwargs["attention_mask"] = (kept >= 0).long() if mask is None else mask
                if embeds is not None:
                    return super().generate(None, *args, **kwargs | {"inputs_embeds": take(embeds, kept)})
                short = take(prompt, kept, empty=self.generation_config.pad_token_id or 0)
                return with_prompt(super().generate(short, *args, **kwargs), prompt, short.shape[1])
        return super().generate(prompt, *args, **kwargs)

    def _images_to_shorten_for(self, kwargs: dict[str, Any]) -> MSResamplerImageFeatures | None:
        """The images among the arguments of `generate`, encoded there, if a reducer works before the language model."""
        if isinstance(self.reducer, LayerReducer) and not isinstance(self.reducer, TowerReducer):
            return None
        encode = ("pixel_values", "token_grids", "pixel_attention_mask", "spatial_shapes", "tilings", "clips")
        given = {name: kwargs.pop(name) for name in encode if kwargs.get(name) is not None}
        images: Any = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if "pixel_values" in given:
            with torch.no_grad():
                images = self.get_image_features(**given, return_dict=True)
        if images is None or getattr(images, "token_counts", None) is None:
            return None
        kwargs["mm_encoder_outputs"] = {"image": copy(images)}  # transformers repeats the tokens in place for beams
        return images

    def words_only(self, labels: Tensor, kept_positions: Tensor | None = None) -> Tensor:
        """Labels of what a reducer left of the text, without image tokens, which the model must not learn to generate
        and some collators leave in.
        """
        if kept_positions is not None:
            labels = take(labels, kept_positions, empty=-100)
        return labels.masked_fill(labels == self.config.image_token_id, -100)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """The head with its family's scaling: granite divides logits, cohere multiplies them, gemma 2 caps them."""
        logits, scale, cap = self.lm_head(hidden_states), self.config.logit_scale, self.config.logit_cap
        if scale != 1:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap


MSResamplerModel.register_for_auto_class("AutoModel")
MSResamplerForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MSResamplerForConditionalGeneration", "MSResamplerModel", "MSResamplerPreTrainedModel"]
