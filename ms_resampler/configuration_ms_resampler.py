"""Configurations of the MS-Resampler model and its projector, and the geometry of patches and tokens.

Everything that depends on counts (patches of an image, visual tokens of a budget) is computed here, once,
for the model and the processor alike. See the dimension legend in the README.
"""

# `from __future__ import annotations` would silently switch off the validation that @strict does.
import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .towers_ms_resampler import Tower, TowerState, pair, read_tower

# Keys that transformers itself writes into a config.json or hands to a configuration, beside the declared fields.
_FOREIGN_KEYS = frozenset(
    [
        "attn_implementation",  # from_pretrained, as are the next two
        "experts_implementation",
        "name_or_path",
        "auto_map",  # save_pretrained of custom code
        "custom_pipelines",  # save_pretrained of a custom pipeline
        "fusion_config",  # from_pretrained, kept in the file
        "model_type",  # every config.json
        "num_labels",  # from_pretrained, as a shorthand for id2label
        "output_attentions",  # every config.json
        "quantization_config",  # quantizers
        "torch_dtype",  # from_pretrained, the old name of dtype
        "use_cache",  # Trainer
    ]
)

# Where the Auto classes find this code: beside the weights, in the same folder or repository, always.
_GENERATIVE = "modeling_ms_resampler.MSResamplerForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_ms_resampler.MSResamplerConfig",
    "AutoModel": "modeling_ms_resampler.MSResamplerModel",
    "AutoModelForImageTextToText": _GENERATIVE,
    "AutoModelForMultimodalLM": _GENERATIVE,
    "AutoModelForCausalLM": _GENERATIVE,
    "AutoProcessor": "processing_ms_resampler.MSResamplerProcessor",
}

# The projectors with scopes, and those that they start with; and the fields that only they have.
_DEFAULT_SIGMAS = {"ms_resampler": (0.5, 1.5, None), "resampler": (None,)}
_SCOPE_FIELDS = (
    "scope_sigmas",
    "scope_prior",
    "learn_scopes",
    "tile_heads",
    "scope_layout",
    "scope_heads",
    "fusion",
    "share_kv",
    "patch_conv",
    "cell_residual",
    "pooled_mlp",
    "query_init",
    "prior_form",
)


def token_grid(visual_tokens: int | Sequence[int] | None, patch_grid: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns (Mh, Mw) in which a budget of visual tokens is laid over an image.

    `visual_tokens` is a grid, a count, or None for one token a patch; `patch_grid` is (H, W) in patches.
    A count becomes the grid whose proportions are nearest to the image's:

        36 over (24, 24) -> (6, 6)        8 over (24, 24) -> (2, 4)        8 over (12, 24) -> (2, 4)

    Of two equally near, such as (2, 4) and (4, 2), the wider one is taken.
    Raises ValueError if the budget is larger than the patches or has no grid of at most 1:2 relative to them.
    """
    patches = patch_grid[0] * patch_grid[1]
    if visual_tokens is None:
        return patch_grid
    if isinstance(visual_tokens, int):
        _check_budget(visual_tokens, patch_grid)
        grid = _nearest_grid(visual_tokens, patch_grid)
        if grid is None:
            possible = [n for n in range(1, patches + 1) if _nearest_grid(n, patch_grid)]
            near = sorted(sorted(possible, key=lambda n: abs(n - visual_tokens))[:3])
            raise ValueError(
                f"{visual_tokens} visual tokens cannot be laid out as a grid over {patch_grid[0]} x "
                f"{patch_grid[1]} patches; use a count such as {', '.join(map(str, near))}, or give "
                "the grid as (rows, columns)."
            )
        return grid
    if len(visual_tokens) != 2 or not all(isinstance(n, int) and n > 0 for n in visual_tokens):
        raise ValueError(f"A grid of visual tokens is (rows, columns), two positive integers, got {visual_tokens}.")
    rows, columns = visual_tokens
    _check_budget(rows * columns, patch_grid)
    return rows, columns


def _check_budget(count: int, patch_grid: tuple[int, int]) -> None:
    patches = patch_grid[0] * patch_grid[1]
    if not 1 <= count <= patches:
        raise ValueError(
            f"A budget of {count} visual tokens is impossible for {patch_grid[0]} x {patch_grid[1]} = "
            f"{patches} patches; use 1 to {patches} tokens."
        )


def _nearest_grid(count: int, patch_grid: tuple[int, int]) -> tuple[int, int] | None:
    """The factor pair of `count` nearest in proportion to the patch grid, None if all are off by more than 2."""
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    target = math.log(patch_grid[1] / patch_grid[0])
    # Rounded, or the last digit of a logarithm would choose between 4 x 5 and 5 x 4.
    distance, grid = min([(round(abs(math.log(pair[1] / pair[0]) - target), 9), pair) for pair in pairs])
    return grid if distance <= round(math.log(2), 9) else None


def _reject_unknown_keys(config: PretrainedConfig, keys: Sequence[str]) -> None:
    """Raises ValueError for a key that is no field and not transformers' own; names the nearest field."""
    known = sorted(name for name in config.__dataclass_fields__ if not name.startswith("_"))
    for key in keys:
        if key.startswith("_") or key in _FOREIGN_KEYS:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known fields are {', '.join(known)}."
        raise ValueError(f"`{key}` is not a field of {type(config).__name__}; {hint}")


@strict
class MSResamplerProjectorConfig(PretrainedConfig):
    """The multi-scope resampler: its width, its scopes, and how they are fused (design: README, "How it works").

    Fields:
        projector_type: "ms_resampler"; "resampler", the same with a single scope; or one of the peers in
            projectors_ms_resampler.py, which use the sizes and grids where they have such a thing, and no scopes.
        hidden_size, num_attention_heads, num_hidden_layers, intermediate_size: D, h, depth, width of the FFN. The
            defaults are 768 with scopes and 1024 for peers, a head for every 64 channels (as many as divide D, and no
            fewer than the scopes that share them), one layer, and D.
        query_grid: rows and columns of the learned base queries, if there are any; interpolated to any token grid.
        visual_tokens: the default budget, a count or [rows, columns].
        scope_sigmas: one entry a scope, in units of the anchor pitch; None is the global scope. The default is
            (0.5, 1.5, None) for "ms_resampler", (None,) for "resampler".
        scope_prior: "gaussian", "window" (a disc of radius 2 sigma, which has the same variance), or "none".
        learn_scopes: whether the Gaussian sigmas and offsets are learned, per scope and head.
        tile_heads: whether the heads of a Gaussian scope start spread over it, each on a part, or all alike.
        scope_layout: "heads" (scopes share out the heads, and three cost no more than one) or "branches" (every scope
            has queries of its own for all heads).
        scope_heads: how many heads each scope has, in the layout "heads". The default is one in eight for every scope
            but the first, and the rest for the first: 8, 2 and 2 of 12.
        fusion: "token", "head" (layout "branches" only), "static" or "mean".
        share_kv: one set of keys and values for all scopes, or one each (layout "branches" only).
        patch_conv: whether patches see their neighbours first, in a depthwise 3 x 3 convolution.
        cell_residual: whether a token also receives the mean of the patches in its cell, so that no scope has to.
        pooled_mlp: whether LLaVA's MLP of the mean of a cell's features is added to each visual token, which is where
            the projector then starts.
        query_init: "none" (heads score patches by themselves, and only the prior says which token reads where),
            "learned", or "content" to add the mean of the patches in a token's cell. The default of "ms_resampler" is
            "none" where that is possible (layout "heads", a prior, a scope that is not global), else it is "learned".
        prior_form: "channels" (a Gaussian prior is appended to queries and keys or, without queries, taken by rows and
            columns of patches) or "bias" (it is added to the scores); same function.
    """

    model_type = "ms_resampler_projector"
    base_config_key = "projector_config"

    projector_type: Literal[
        "ms_resampler",
        "resampler",
        "mlp",
        "avg_pool",
        "pixel_shuffle",
        "c_abstractor",
        "ldp_v2",
        "token_packer",
        "mqt",
        "saep",
        "qwen_resampler",
        "perceiver",
        "idefics2_perceiver",
        "q_former",
    ] = "ms_resampler"
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_hidden_layers: int = 1
    intermediate_size: int | None = None
    query_grid: list[int] | tuple[int, ...] = (12, 12)
    visual_tokens: int | list[int] | tuple[int, ...] = 144
    scope_sigmas: list[float | int | None] | tuple[float | int | None, ...] | None = None
    scope_prior: Literal["gaussian", "window", "none"] = "gaussian"
    learn_scopes: bool = True
    tile_heads: bool = True
    scope_layout: Literal["heads", "branches"] = "heads"
    scope_heads: list[int] | tuple[int, ...] | None = None
    fusion: Literal["token", "head", "static", "mean"] = "token"
    share_kv: bool = True
    patch_conv: bool = True
    cell_residual: bool = True
    pooled_mlp: bool = False
    query_init: Literal["none", "learned", "content"] | None = None
    prior_form: Literal["channels", "bias"] = "channels"
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown_keys(self, list(kwargs))
        super().__post_init__(**kwargs)
        if self.scope_sigmas is None:
            self.scope_sigmas = _DEFAULT_SIGMAS.get(self.projector_type)
        if self.query_init is None:
            without = self.projector_type == "ms_resampler" and self._prior_tells_tokens_apart()
            self.query_init = "none" if without else "learned"
        # Not as `validate_*` methods: those raise an error of @strict's own, which is no ValueError.
        self._complete_sizes()
        self._check_sizes()
        self._check_grids()
        if self.projector_type not in _DEFAULT_SIGMAS:
            self._check_peer()
            return
        self._check_scopes()

    def _prior_tells_tokens_apart(self) -> bool:
        """Whether tokens can do without queries: heads that share one score of a patch read it where the prior says."""
        local = any(sigma is not None for sigma in self.scope_sigmas or ())
        return local and self.scope_layout == "heads" and self.scope_prior != "none"

    def _complete_sizes(self) -> None:
        if self.hidden_size is None:
            self.hidden_size = 768 if self.projector_type in _DEFAULT_SIGMAS else 1024
        if self.num_attention_heads is None:
            self.num_attention_heads = self._default_heads()
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size

    def _default_heads(self) -> int:
        """The most heads that divide D and are at least 64 wide; narrower only where a scope would have none."""
        scopes = self.num_scopes if self.scope_layout == "heads" else 1
        possible = [heads for heads in range(max(1, scopes), self.hidden_size + 1) if self.hidden_size % heads == 0]
        return max((heads for heads in possible if 64 * heads <= self.hidden_size), default=min(possible, default=1))

    def _check_sizes(self) -> None:
        sizes = {
            name: getattr(self, name)
            for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"`hidden_size` must be a multiple of 4 (2-D positions) and of `num_attention_heads`, got "
                f"{self.hidden_size} and {self.num_attention_heads} heads."
            )

    def _check_grids(self) -> None:
        grids = {"query_grid": self.query_grid}
        if isinstance(self.visual_tokens, int):
            if self.visual_tokens < 1:
                raise ValueError(f"`visual_tokens` must be at least 1, got {self.visual_tokens}.")
        else:
            grids["visual_tokens"] = self.visual_tokens
        for name, grid in grids.items():
            if len(grid) != 2 or min(grid) < 1:
                raise ValueError(f"`{name}` must be [rows, columns], two positive integers, got {list(grid)}.")

    def _check_peer(self) -> None:
        for name in _SCOPE_FIELDS:
            default = "learned" if name == "query_init" else self.__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(f"`{name}` is a field of `ms_resampler`: `{self.projector_type}` has no such thing.")

    def _check_scopes(self) -> None:
        if not self.scope_sigmas:
            raise ValueError("`scope_sigmas` needs at least one scope; [None] is one global scope.")
        if self.projector_type == "resampler" and len(self.scope_sigmas) > 1:
            raise ValueError(
                f"`resampler` has a single scope, got `scope_sigmas` {list(self.scope_sigmas)}: give one, or use "
                '`projector_type="ms_resampler"`.'
            )
        for sigma in self.scope_sigmas:
            if sigma is not None and not (0 < sigma < math.inf):
                raise ValueError(f"A scope's sigma must be positive, or None for the global scope, got {sigma}.")
        if self.query_init == "none" and not self._prior_tells_tokens_apart():
            raise ValueError(
                '`query_init="none"` needs `scope_layout="heads"`, a `scope_prior`, and a scope that is not global, or '
                f'all tokens were the same; got "{self.scope_layout}", "{self.scope_prior}" and `scope_sigmas` '
                f'{list(self.scope_sigmas)}: use `query_init="learned"`.'
            )
        if self.scope_layout == "heads":
            self._check_heads_layout()
        elif self.scope_heads is not None:
            raise ValueError('`scope_heads` needs `scope_layout="heads"`: in "branches" every scope has all heads.')

    def _check_heads_layout(self) -> None:
        heads, scopes = self.num_attention_heads, self.num_scopes
        given = "" if self.scope_heads is None else f"; `scope_heads` {list(self.scope_heads)} does not"
        if self.scope_heads is None:
            others = [max(1, min(round(heads / 8), heads // scopes))] * (scopes - 1)
            self.scope_heads = [heads - sum(others), *others]
        if len(self.scope_heads) != scopes or min(self.scope_heads) < 1 or sum(self.scope_heads) != heads:
            raise ValueError(
                f'`scope_layout="heads"` shares {heads} heads among {scopes} scopes, at least one a scope{given}. '
                'In `scope_layout="branches"` every scope has all heads.'
            )
        if self.fusion == "head":
            raise ValueError(
                '`fusion="head"` weighs every scope in every head, but in `scope_layout="heads"` a head belongs '
                'to one scope: use fusion "token", "static" or "mean", or `scope_layout="branches"`.'
            )
        if not self.share_kv:
            raise ValueError('`share_kv=False` needs `scope_layout="branches"`: heads have their own keys already.')

    @property
    def num_scopes(self) -> int:
        """S; 0 for a peer."""
        return len(self.scope_sigmas or ())

    @property
    def scope_names(self) -> list[str]:
        """A word for each scope, for people: local under one pitch, regional from there on, or global."""
        sigmas = self.scope_sigmas or ()
        words = ["global" if s is None else "local" if s < 1 else "regional" for s in sigmas]
        return [
            word if words.count(word) == 1 else f"{word} {number}" if sigma is None else f"{word} {sigma:g}"
            for number, (word, sigma) in enumerate(zip(words, sigmas, strict=True), start=1)
        ]


@strict
class MSResamplerConfig(PretrainedConfig):
    """A vision tower, a projector and a language model: all that is needed to rebuild the model.

    Fields:
        vision_config, text_config: any tower and causal LM that AutoModel builds.
        projector_config: see MSResamplerProjectorConfig.
        image_token_id: the placeholder in the text; one for every visual token.
        vision_feature_layer: the tower layer to read, or a list of layers (joined in width).
        vision_prefix_tokens: tokens in front of the patches (CLS, registers); None counts them in its output.
    """

    model_type = "ms_resampler"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "projector_config": SubConfigSpec(config_class=MSResamplerProjectorConfig),
    }

    vision_config: dict | PretrainedConfig | None = None
    text_config: dict | PretrainedConfig | None = None
    projector_config: dict | PretrainedConfig | None = None
    image_token_id: int = 31999
    vision_feature_layer: int | list[int] = -2
    vision_prefix_tokens: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown_keys(self, list(kwargs))
        super().__post_init__(**kwargs)
        # Loading from the Hub rewrites auto_map to name that repository, and a later save would keep it.
        self.auto_map = dict(AUTO_MAP)
        # transformers ties the head by the root's value: the language model's own choice decides.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self._check_tower()
        self._check_text()

    def _check_tower(self) -> None:
        if not self.feature_layers:
            raise ValueError("`vision_feature_layer` names no layer of the tower; use one, or a list of them.")
        if self.vision_prefix_tokens is not None and self.vision_prefix_tokens < 0:
            raise ValueError(f"`vision_prefix_tokens` must not be negative, got {self.vision_prefix_tokens}.")
        layers = len(self.tower.states) - 1
        for layer in self.feature_layers:
            if not -layers - 1 <= layer <= layers:
                raise ValueError(f"`vision_feature_layer` {layer} does not exist: the tower has {layers} layers.")
        if self.tower.prefix_tokens is None:
            raise ValueError(
                f"How many tokens the vision tower `{self.vision_config.model_type}` puts in front of its patches is "
                "not known here, and its hidden states do not tell; set `vision_prefix_tokens`."
            )

    def _check_text(self) -> None:
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` {self.image_token_id} is outside the language model's vocabulary of "
                f"{self.text_config.vocab_size}: add the token to the tokenizer and resize the embeddings."
            )

    @property
    def tower(self) -> Tower:
        """What the vision tower takes and puts out."""
        tower = read_tower(self.vision_config)
        if self.vision_prefix_tokens is None:
            return tower
        return replace(tower, prefix_tokens=self.vision_prefix_tokens)

    @property
    def feature_layers(self) -> list[int]:
        """The tower layers that are read, as a list."""
        layers = self.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def feature_states(self) -> list[TowerState]:
        """The shapes of the tower's hidden states that are read."""
        return [self.tower.states[layer] for layer in self.feature_layers]

    @property
    def unread_layers(self) -> int:
        """How many layers at the tower's end nothing reads; 0 for towers that cannot run without them."""
        return self.tower.unread_layers(self.feature_layers)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens to drop in front of the patches."""
        return self.tower.prefix_tokens

    @property
    def feature_width(self) -> int:
        """C: channels of a patch, all layers that are read together."""
        return sum(state.width for state in self.feature_states)

    @property
    def patch_size(self) -> int | tuple[int, int]:
        """Side of a patch in pixels, as the projector sees it; (height, width) if they differ."""
        height, width = max(self.feature_states, key=lambda state: state.grid).stride
        return height if height == width else (height, width)

    @property
    def native_patch_grid(self) -> tuple[int, int]:
        """Patch rows and columns (H, W) of an image of the tower's own size."""
        return max(state.grid for state in self.feature_states)

    @property
    def text_width(self) -> int:
        """T: the width of the language model's input embeddings, which in small OPTs is not that of its layers."""
        return getattr(self.text_config, "word_embed_proj_dim", self.text_config.hidden_size)

    @property
    def logit_scale(self) -> float:
        """What the language model multiplies its logits by: cohere and Falcon H1 multiply, granite divides."""
        text = self.text_config
        if text.model_type == "mpt":  # which has the field, and makes no use of it
            return 1.0
        scale = getattr(text, "logit_scale", None) or getattr(text, "lm_head_multiplier", None) or 1.0
        divisor = getattr(text, "logits_scaling", None) or 1.0
        return scale * divisor if text.model_type == "hyperclovax" else scale / divisor

    @property
    def logit_cap(self) -> float | None:
        """c of the language models that cap their logits, c tanh(logits / c), as gemma 2 does."""
        return getattr(self.text_config, "final_logit_softcapping", None)

    def patch_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns (H, W) of an image of (height, width) pixels."""
        height, width = pair(self.patch_size)
        return image_size[0] // height, image_size[1] // width

    def token_grid(
        self, image_size: tuple[int, int], visual_tokens: int | Sequence[int] | None = None
    ) -> tuple[int, int]:
        """Token rows and columns (Mh, Mw) for an image of (height, width) pixels; see `token_grid` above."""
        budget = self.projector_config.visual_tokens if visual_tokens is None else visual_tokens
        return token_grid(budget, self.patch_grid(image_size))


MSResamplerConfig.register_for_auto_class()
# `transformers serve` picks the model class by name from this table, for remote code too.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("ms_resampler", "MSResamplerForConditionalGeneration")

__all__ = ["MSResamplerConfig", "MSResamplerProjectorConfig", "token_grid"]
