"""The MS-Resampler model: vision tower -> projector -> language model.

Pixels (B, 3, height, width) -> tower -> patches (B, N, C) -> projector -> visual tokens (B, M, T), which take the
places of the image tokens in the text -> language model -> logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from .configuration_ms_resampler import FEATURE_MAP_TOWERS, MSResamplerConfig, token_grid
from .packing_ms_resampler import PackedLinear, pack_linears
from .projectors_ms_resampler import (
    EARLIER_NAMES,
    PROJECTORS,
    SCOPED_PROJECTORS,
    build_projector,
    init_projector_weights,
)
from .resampler_ms_resampler import ScopeMaps, init_resampler_weights

# Towers whose position table fits one image size unless they are asked to interpolate it.
_FIXED_SIZE_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model", "vit"})

# What the text models call the keys and values of earlier text: until transformers 5.23, and since.
_CACHE_NAMES = ("past_key_values", "cache")

# Families that multiply their logits, by another field than cohere's `logit_scale`.
_MULTIPLIERS = {"falcon_h1": "lm_head_multiplier", "hyperclovax": "logits_scaling"}


@dataclass
class MSResamplerImageFeatures(BaseModelOutputWithPooling):
    """What `get_image_features` returns: one entry an image, in the order of the images.

    pooler_output: visual tokens (M, T); patch_grids, token_grids: (rows, columns).
    last_hidden_state, attentions and all hidden_states of the tower: if asked for, see get_image_features.
    scope_weights (S, M) and scope_attentions (S, M, N): with `output_scopes=True`, see ScopeMaps.
    """

    patch_grids: list[tuple[int, int]] | None = None
    token_grids: list[tuple[int, int]] | None = None
    scope_weights: list[Tensor] | None = None
    scope_attentions: list[Tensor] | None = None


@dataclass
class MSResamplerModelOutputWithPast(BaseModelOutputWithPast):
    """The language model's output, and the visual tokens of all images in one row: (sum of M, T)."""

    image_hidden_states: Tensor | None = None


@dataclass
class MSResamplerCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Loss (if there are labels), logits (batch, L, vocabulary), and what the base model returns."""

    image_hidden_states: Tensor | None = None


def _cache_of(values: Mapping[str, Any]) -> dict[str, Cache]:
    """The keys and values of earlier text, under the name by which arguments or outputs hold them, if they do."""
    # `in` would not do: since transformers 5.24, ModelOutput answers it with yes for the old name, too.
    return {name: values[name] for name in _CACHE_NAMES if name in values.keys() and values[name] is not None}  # noqa: SIM118


class MSResamplerPreTrainedModel(PreTrainedModel):
    """What all MS-Resampler models share: configuration, initialisation and abilities."""

    config: MSResamplerConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [projector.__name__ for projector in (*SCOPED_PROJECTORS.values(), *PROJECTORS.values())]
    _skip_keys_device_placement = list(_CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """Loads a model; weights of projectors may have the names of earlier versions, and are saved with today's."""
        earlier = {rf"\b{old}$": new for old, new in EARLIER_NAMES.items()}
        loaded = super().from_pretrained(*args, key_mapping=earlier | (key_mapping or {}), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers keeps the renamings that were of use, to undo them when it saves.
        model._weight_conversions = [
            conversion for conversion in model._weight_conversions or [] if conversion.source_patterns[0] not in earlier
        ]
        return loaded

    def post_init(self) -> None:
        """As ever; then the units of sharding are those that the model has, which FSDP insists on."""
        super().post_init()
        self._no_split_modules = [*set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}]

    def initialize_weights(self) -> None:
        """As ever; then what a language model sets in its layers (Falcon H1's buffers), which custom code skips."""
        super().initialize_weights()
        language_model = self.base_model.language_model
        language_model._init_weights(language_model)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As ever; but what packed layers refuse is refused before anything has changed."""
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module._apply(fn)
        return super()._apply(fn, recurse)

    def pack_weights(self) -> Self:
        """For answering faster on a CPU, in place: see `pack_linears`. Elsewhere nothing changes.

        From then on the model is not trained, moved, converted or compiled; it is saved as ever, with plain weights.
        """
        pack_linears(self)
        return self


class MSResamplerModel(MSResamplerPreTrainedModel):
    """Vision tower, projector and language model, without the language model's head."""

    def __init__(self, config: MSResamplerConfig):
        super().__init__(config)
        self.vision_tower = make_unread_layers_skippable(AutoModel.from_config(config.vision_config), config)
        self.projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if not hasattr(self.language_model, "embed_tokens"):
            raise ValueError(
                f"The language model `{config.text_config.model_type}` is not built like today's decoders (it has no "
                "`embed_tokens`); use one that is, such as llama, mistral, qwen2, qwen3, phi3 or gemma."
            )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The projector's parts, by its own table: tower and language model are models and initialise themselves."""
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MSResamplerImageFeatures:
        """Visual tokens of images, for `forward` or `generate` (`mm_encoder_outputs={"image": features}`).

        pixel_values is (B, 3, height, width), or SigLIP 2's patches with their mask and spatial_shapes (B, 2).
        token_grids (B, 2) asks for a grid for every image, and None means the configured budget; torch.compile wants
        them as a list of tuples, and compiles once for every list. The language model gets the tokens as the
        projector made them: Gemma's multiplier belongs to its table of words and does not reach them, Granite's
        belongs to its decoder and does.

        The tower runs up to the last layer that is read, and its last_hidden_state is None if there are layers after
        that one. `output_hidden_states=True` or `output_attentions=True` runs all of it.
        """
        as_configured = kwargs["output_hidden_states"] == self.config.feature_layers
        skip = as_configured and not kwargs.get("output_attentions") and self.config.unread_layers > 0
        if skip:  # not handed to towers that do not know it
            kwargs["skip_unread"] = True
        tower = self._run_tower(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)
        if spatial_shapes is None:
            height, width = pixel_values.shape[-2:]
            patch_grids = [self.config.patch_grid((height, width))] * len(pixel_values)
        else:
            patch_grids = [tuple(shape) for shape in spatial_shapes.tolist()]
        wanted = self._token_grids(token_grids, patch_grids)
        tokens, maps = self._project(self._patch_features(tower), patch_grids, wanted, output_scopes)
        return MSResamplerImageFeatures(
            last_hidden_state=None if skip else tower.last_hidden_state,
            pooler_output=tokens,
            hidden_states=tower.hidden_states,
            attentions=getattr(tower, "attentions", None),
            patch_grids=patch_grids,
            token_grids=wanted,
            scope_weights=[weights for weights, _ in maps] if output_scopes else None,
            scope_attentions=[attentions for _, attentions in maps] if output_scopes else None,
        )

    def _run_tower(self, pixel_values: Tensor, mask: Tensor | None, shapes: Tensor | None, **kwargs: Any):
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        kind = self.config.vision_config.model_type
        if kind == "siglip2_vision_model":
            if shapes is None:
                pixel_values, mask, shapes = flatten_patches(pixel_values, self.config.patch_size)
            return self.vision_tower(
                pixel_values, pixel_attention_mask=mask, spatial_shapes=shapes, return_dict=True, **kwargs
            )
        if kind in _FIXED_SIZE_TOWERS:
            native = self.config.vision_config.image_size
            kwargs["interpolate_pos_encoding"] = tuple(pixel_values.shape[-2:]) != (native, native)
        return self.vision_tower(pixel_values, return_dict=True, **kwargs)

    def _token_grids(
        self, token_grids: Tensor | list[tuple[int, int]] | None, patch_grids: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The token grid (Mh, Mw) of every image: as asked for, or the configured budget laid over its patches."""
        if token_grids is None:
            budget = self.config.projector_config.visual_tokens
            return [token_grid(budget, patch_grid) for patch_grid in patch_grids]
        if len(token_grids) != len(patch_grids):
            raise ValueError(f"Got {len(token_grids)} token grids for {len(patch_grids)} images; give one an image.")
        return [tuple(grid) for grid in (token_grids.tolist() if isinstance(token_grids, Tensor) else token_grids)]

    def _patch_features(self, tower: ModelOutput) -> Tensor:
        """Patches (B, N, C) of the configured layers side by side, without the tower's prefix tokens."""
        layers = [tower.hidden_states[layer] for layer in self.config.feature_layers]
        if self.config.vision_config.model_type in FEATURE_MAP_TOWERS:
            layers = [layer.flatten(2).mT for layer in layers]
        return torch.cat([layer[:, self.config.num_prefix_tokens :] for layer in layers], dim=-1)

    def _run_projector(
        self, x_BNC: Tensor, patch_grid: tuple[int, int], token_grid: tuple[int, int], output_scopes: bool
    ) -> tuple[Tensor, ScopeMaps | None]:
        config = self.config.projector_config  # the module itself may be wrapped, by peft say
        if config.num_scopes:
            return self.projector(x_BNC, patch_grid, token_grid, output_scopes)
        if output_scopes:
            kind = config.projector_type
            raise ValueError(f"`output_scopes` needs a projector with scopes, and `{kind}` has none.")
        return self.projector(x_BNC, patch_grid, token_grid), None

    def _project(
        self,
        x_BNC: Tensor,
        patch_grids: list[tuple[int, int]],
        token_grids: list[tuple[int, int]],
        output_scopes: bool,
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Visual tokens and scope maps of every image; images of the same grids go through together."""
        x_BNC = x_BNC.to(next(self.projector.parameters()).dtype)
        padded = self.config.vision_config.model_type == "siglip2_vision_model"  # to the batch's largest image
        grids = list(zip(patch_grids, token_grids, strict=True))
        tokens: dict[int, Tensor] = {}
        maps: dict[int, tuple[Tensor, Tensor]] = {}
        for patches, wanted in dict.fromkeys(grids):
            rows = [row for row, grid in enumerate(grids) if grid == (patches, wanted)]
            x = x_BNC if len(rows) == len(grids) else x_BNC[rows]
            x = x[:, : patches[0] * patches[1]] if padded else x
            y_BMT, scopes = self._run_projector(x, patches, wanted, output_scopes)
            for row, index in enumerate(rows):
                tokens[index] = y_BMT[row]
                if output_scopes:
                    maps[index] = scopes.weights_BSM[row], scopes.attentions_BSMN[row]
        return [tokens[index] for index in sorted(tokens)], [maps[index] for index in sorted(maps)]

    def _placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, visual_tokens: int) -> Tensor:
        """Where the visual tokens go (batch, L, 1). Raises ValueError if the counts differ."""
        if input_ids is None:
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        torch_compilable_check(
            mask.sum() == visual_tokens,
            lambda: (
                f"The text has {int(mask.sum())} image tokens, but the images make {visual_tokens} visual tokens: "
                "process text and images together, with the same `visual_tokens`."
            ),
        )
        return mask.unsqueeze(-1)

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MSResamplerModelOutputWithPast:
        """Runs text (batch, L), as ids or embeddings, with the images of its image tokens, if there are any.

        Images come as pixels or, encoded before, as `mm_encoder_outputs={"image": get_image_features(...)}`.
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
                pixel_values, token_grids, pixel_attention_mask, spatial_shapes, return_dict=True
            )
        features = None
        if images is not None:
            features = torch.cat(list(images.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self._placeholder_mask(input_ids, inputs_embeds, len(features))
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        elif input_ids is not None and not _cache_of(kwargs):
            self._placeholder_mask(input_ids, inputs_embeds, 0)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MSResamplerModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
            **_cache_of(outputs),
        )


def make_unread_layers_skippable(tower: PreTrainedModel, config: MSResamplerConfig) -> PreTrainedModel:
    """The tower, whose layers after the last one that is read return their input when called with `skip_unread`.

    They stay where they are, for checkpoints and for whoever runs the tower whole.
    """
    if config.unread_layers:
        (layers,) = (
            blocks
            for blocks in tower.modules()
            if isinstance(blocks, nn.ModuleList) and len(blocks) == config.vision_config.num_hidden_layers
        )
        for layer in layers[-config.unread_layers :]:
            layer.forward = partial(_run_or_skip, layer)
    return tower


def _run_or_skip(layer: nn.Module, hidden_states: Tensor, *args: Any, skip_unread: bool = False, **kwargs: Any):
    return hidden_states if skip_unread else type(layer).forward(layer, hidden_states, *args, **kwargs)


def flatten_patches(pixel_values: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, height, width) as SigLIP 2 reads them: patches (B, N, 3 * size^2), their mask and grids."""
    rows, columns = (side // patch_size for side in pixel_values.shape[-2:])
    patches = pixel_values[..., : rows * patch_size, : columns * patch_size]
    patches = patches.unflatten(-1, (columns, patch_size)).unflatten(-3, (rows, patch_size))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
    shapes = torch.tensor([[rows, columns]], device=patches.device).expand(len(patches), 2)
    return patches, mask, shapes


class MSResamplerForConditionalGeneration(MSResamplerPreTrainedModel, GenerationMixin):
    """The model that answers: MSResamplerModel and the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MSResamplerConfig):
        super().__init__(config)
        self.model = MSResamplerModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # A placeholder is no answer; and prompt lookup, which copies from the prompt, must not propose any.
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
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MSResamplerCausalLMOutputWithPast:
        """Next-token logits of MSResamplerModel's text; loss where `labels` (batch, L) are not -100."""
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
            **kwargs,
        )
        logits = self._logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return MSResamplerCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **_cache_of(outputs),
        )

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """The head, and what families do after it: granite divides, cohere multiplies, gemma 2 caps."""
        logits, text = self.lm_head(hidden_states), self.config.text_config
        divisor = None if text.model_type in _MULTIPLIERS else getattr(text, "logits_scaling", None)
        if divisor is not None:
            logits = logits / divisor
        factor = getattr(text, _MULTIPLIERS.get(text.model_type, "logit_scale"), None)
        if factor is not None:
            logits = logits * factor
        if (cap := getattr(text, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


MSResamplerModel.register_for_auto_class("AutoModel")
MSResamplerForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MSResamplerForConditionalGeneration", "MSResamplerModel", "MSResamplerPreTrainedModel"]
