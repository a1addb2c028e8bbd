"""Configurations of the MS-Resampler model and its projector, and the geometry of patches and tokens.

Everything that depends on counts (patches of an image, visual tokens of a budget) is computed here, for both the
model and the processor. docs/design.md has the legend of dimensions.
"""

# `from __future__ import annotations` would silently switch off the validation that @strict does.
import difflib
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, TypeVar

import numpy as np
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import modeling_auto

from .reducers_ms_resampler import read_reducer
from .towers_ms_resampler import Tower, TowerState, pair, read_tower

# Keys that transformers itself writes into a config.json or hands to a configuration, beside the declared fields.
_FOREIGN_KEYS = frozenset(
    [
        "attn_implementation",  # from_pretrained, as are the next two
        "experts_implementation",
        "name_or_path",
        "pad_token_id",  # people, and trainers that complete a configuration; so are the next five
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        "initializer_range",  # transformers' shared tests
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

# Where the Auto classes find this code: always in the same folder or repository as the weights.
_GENERATIVE = "modeling_ms_resampler.MSResamplerForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_ms_resampler.MSResamplerConfig",
    "AutoModel": "modeling_ms_resampler.MSResamplerModel",
    "AutoModelForImageTextToText": _GENERATIVE,
    "AutoModelForMultimodalLM": _GENERATIVE,
    "AutoModelForCausalLM": _GENERATIVE,
    "AutoProcessor": "processing_ms_resampler.MSResamplerProcessor",
}

# The projector types, each with the kind of fields it has: one of the three with scopes, or "peer".
PROJECTOR_TYPES: dict[str, str] = {
    "ms_resampler": "ms_resampler",
    "ms_resampler_branches": "ms_resampler_branches",
    "resampler": "resampler",
    "mlp": "peer",
    "avg_pool": "peer",
    "pixel_shuffle": "peer",
    "c_abstractor": "peer",
    "d_abstractor": "peer",
    "ldp": "peer",
    "ldp_v2": "peer",
    "token_packer": "peer",
    "delta_llava": "peer",
    "llava_mini": "peer",
    "mqt": "peer",
    "saep": "peer",
    "qwen_resampler": "peer",
    "perceiver": "peer",
    "idefics2_perceiver": "peer",
    "q_former": "peer",
}
_DEFAULT_SIGMAS = {
    "ms_resampler": (0.5, 1.5, None),
    "ms_resampler_branches": (0.5, 1.5, None),
    "resampler": (None,),
}
# How checkpoints with learned queries may differ, and the possible values; new checkpoints have the first.
BRANCH_FORMS: dict[str, tuple[Any, ...]] = {
    "fusion": ("token", "head", "static"),
    "patch_conv": (True, False),
    "tile_heads": (True, False),
    "cell_residual": (True, False),
}
# How clips are read.
VIDEO_FORMS = ("frames", "scopes")
# Language models whose decoder layers can fuse text with patches: these take embeddings as they are.
FUSION_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Fields of earlier versions that a config.json may contain, and the values that agree with what is done today.
_EARLIER_FIELDS: dict[str, tuple[Any, ...]] = {
    "scope_prior": ("gaussian",),
    "learn_scopes": (True,),
    "tile_heads": (True,),
    "scope_layout": ("heads",),
    "fusion": ("token",),
    "share_kv": (True,),
    "patch_conv": (True,),
    "cell_residual": (True,),
    "query_init": ("none",),
    "prior_form": ("channels", "bias"),
}


def patch_grid(image_size: tuple[int, int], patch_size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns (H, W) of whole patches in an image of (height, width) pixels; patches need not be square."""
    height, width = pair(patch_size)
    return image_size[0] // height, image_size[1] // width


def token_grid(visual_tokens: int | Sequence[int] | None, patch_grid: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns (Mh, Mw) in which a budget of visual tokens is laid out over an image.

    `visual_tokens` is a grid, a count, or None for one token a patch; `patch_grid` is (H, W) in patches.
    A count becomes the grid whose proportions are nearest to the image's:

        36 over (24, 24) -> (6, 6)        8 over (24, 24) -> (2, 4)        8 over (12, 24) -> (2, 4)

    Of two equally near, such as (2, 4) and (4, 2), the wider one is taken.
    Raises ValueError if the budget is larger than the patches or has no grid of at most 1:2 relative to them.
    """
    patches = patch_grid[0] * patch_grid[1]
    budget: Any = _plain(visual_tokens)
    if budget is None:
        return patch_grid
    if isinstance(budget, int) and not isinstance(budget, bool):
        _check_budget(budget, patch_grid)
        grid = nearest_grid(budget, patch_grid)
        if grid is None:
            counts = sorted(range(1, patches + 1), key=lambda n: abs(n - budget))
            near = sorted(islice((n for n in counts if nearest_grid(n, patch_grid)), 3))
            raise ValueError(
                f"{budget} visual tokens cannot be laid out as a grid over {patch_grid[0]} x "
                f"{patch_grid[1]} patches; use a count such as {', '.join(map(str, near))}, or give "
                "the grid as (rows, columns)."
            )
        return grid
    if not is_grid(budget):
        raise ValueError(
            f"Visual tokens are a count or a grid (rows, columns) of two positive integers, got {budget!r}."
        )
    rows, columns = budget
    _check_budget(rows * columns, patch_grid)
    return rows, columns


def _check_budget(count: int, patch_grid: tuple[int, int]) -> None:
    patches = patch_grid[0] * patch_grid[1]
    if not 1 <= count <= patches:
        raise ValueError(
            f"A budget of {count} visual tokens is impossible for {patch_grid[0]} x {patch_grid[1]} = "
            f"{patches} patches; use 1 to {patches} tokens."
        )


def nearest_grid(count: int, patch_grid: tuple[int, int], most: float = 2) -> tuple[int, int] | None:
    """The factor pair of `count` nearest in proportion to the patch grid.

    None if all are off by a factor of more than `most`, or if there are fewer patches.
    """
    if count > patch_grid[0] * patch_grid[1]:
        return None
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    target = math.log(patch_grid[1] / patch_grid[0])
    # Rounded, or the last digit of a logarithm would choose between 4 x 5 and 5 x 4.
    distance, grid = min([(round(abs(math.log(pair[1] / pair[0]) - target), 9), pair) for pair in pairs])
    return grid if distance <= round(math.log(most), 9) else None


def _plain(value: Any) -> Any:
    """Converts numpy's numbers to Python's, which can be checked and saved; returns anything else unchanged."""
    if isinstance(value, (np.generic, np.ndarray)):  # torch.compile knows no unions of types
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def is_grid(value: Any) -> bool:
    """Whether a value is (rows, columns), two positive integers."""
    numbers = isinstance(value, (list, tuple)) and len(value) == 2
    return numbers and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)


ConfigClass = TypeVar("ConfigClass")


def _accept_numpy(config: ConfigClass) -> ConfigClass:
    """Makes a configuration class accept numpy's numbers in every field."""
    changed: Any = config
    checked_setattr = changed.__setattr__
    changed.__setattr__ = lambda self, name, value: checked_setattr(self, name, _plain(value))
    return config


def _is_known(config: Any, key: str) -> bool:
    """Whether a key is a field of the configuration or one of transformers'."""
    return key in config.__dataclass_fields__ or key.startswith("_") or key in _FOREIGN_KEYS


def _reject_unknown_keys(config: PretrainedConfig, keys: Sequence[str]) -> None:
    """Raises ValueError for a keyword argument that is no field and not transformers' own; names the nearest field."""
    known = sorted(name for name in config.__dataclass_fields__ if not name.startswith("_"))
    for key in keys:
        if _is_known(type(config), key):
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known fields are {', '.join(known)}."
        if key in _EARLIER_FIELDS:
            hint = "it was one in earlier versions, see UPGRADING.md."
        raise ValueError(f"`{key}` is not a field of {type(config).__name__}; {hint}")


def _read_fields(config: type, fields: dict[str, Any]) -> dict[str, Any]:
    """The known fields of a file; warns of others, which a later version may have written."""
    unknown = [key for key in fields if not _is_known(config, key)]
    if unknown:
        warnings.warn(
            f"config.json holds {', '.join(f'`{key}`' for key in unknown)}, which {config.__name__} does not know and "
            "ignores: a later version of transformers or of this package may have written it.",
            stacklevel=3,
        )
    return {key: value for key, value in fields.items() if key not in unknown}


def _from_earlier_version(fields: dict[str, Any]) -> dict[str, Any]:
    """A projector's fields in a file, with those of earlier versions translated to today's type and `branch_form`.

    Raises ValueError if this version has no such projector.
    """
    earlier = {name: fields[name] for name in _EARLIER_FIELDS if name in fields}
    fields = {name: value for name, value in fields.items() if name not in earlier}
    kind = fields.get("projector_type", "ms_resampler")
    if kind not in _DEFAULT_SIGMAS:
        earlier.pop("query_init", None)  # had no meaning in peers
    elif earlier:
        sigmas = fields.get("scope_sigmas") or _DEFAULT_SIGMAS[kind]
        layout = earlier.pop("scope_layout", "branches" if kind == "ms_resampler_branches" else "heads")
        without = kind == "ms_resampler" and layout == "heads" and any(sigma is not None for sigma in sigmas)
        queries = earlier.pop("query_init", None) or ("none" if without else "learned")
        if queries == "none":
            fields["projector_type"] = "ms_resampler"
        elif queries == "learned" and (layout == "branches" or len(sigmas) == 1):  # with one scope, no matter
            form = {name: earlier.pop(name) for name in BRANCH_FORMS if name in earlier}
            form = {name: value for name, value in form.items() if value != BRANCH_FORMS[name][0]}
            fields["projector_type"] = "resampler" if kind == "resampler" else "ms_resampler_branches"
            fields["branch_form"] = form or fields.get("branch_form")
            fields.pop("scope_heads", None)
        else:
            earlier["query_init"] = queries
    for name, value in earlier.items():
        if value not in _EARLIER_FIELDS[name]:
            raise ValueError(
                f"The projector was made with `{name}` {value!r}, which this version does not have: load it with the "
                "version that saved it, or train a projector of this one (UPGRADING.md)."
            )
    return fields


@_accept_numpy
@strict
class MSResamplerProjectorConfig(PretrainedConfig):
    """The projector: its type, its sizes and, if it has scopes, their sigmas and heads.

    Fields:
        projector_type: "ms_resampler"; "ms_resampler_branches", in which every scope is a separate resampler with
            learned queries; "resampler", the same with a single scope; one of the peers in
            projectors_ms_resampler.py, which have no scopes; or a name registered with `register_projector` there.
        hidden_size, num_attention_heads, num_hidden_layers, intermediate_size: D, h, depth, width of the FFN. The
            defaults are D = 768 (1024 for peers), the most heads that divide D and are at least 64 wide (in
            "ms_resampler" at least one for each scope), one layer, and D.
        num_key_value_heads: of "idefics2_perceiver"; the default is one for every four heads, or one for each head if
            four does not divide them.
        query_grid: rows and columns of the learned queries, if there are any.
        fusion_layers: of "llava_mini": how many decoder layers fuse the prompt's words with all patches before the
            language model, see fusion_ms_resampler.py; 0 is the compressor alone.
        visual_tokens: the default budget, a count or [rows, columns].
        scope_sigmas: one entry for each scope, in units of the anchor pitch; None is the global scope. The default is
            (0.5, 1.5, None), and (None,) for "resampler".
        scope_heads: how many heads each scope of "ms_resampler" has. The default is one in eight for every scope but
            the first, and the rest for the first: 8, 2 and 2 of 12.
        pooled_mlp: whether LLaVA's MLP of each cell's mean feature is added to the visual tokens; the rest of the
            projector then starts with an output of zero.
        moving_scopes: whether the token grid of "ms_resampler" moves to where the information is, see
            places_ms_resampler.py.
        video_form: how clips are read: "frames", each as an image; or, in "ms_resampler", by "scopes" that reach over
            time, see clips_ms_resampler.py.
        branch_form: how a checkpoint with learned queries differs from new ones: see BranchesResampler.
    """

    model_type = "ms_resampler_projector"
    base_config_key = "projector_config"

    projector_type: str = "ms_resampler"
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_hidden_layers: int = 1
    intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    query_grid: list[int] | tuple[int, ...] = (12, 12)
    fusion_layers: int = 0
    visual_tokens: int | list[int] | tuple[int, ...] = 144
    scope_sigmas: list[float | int | None] | tuple[float | int | None, ...] | None = None
    scope_heads: list[int] | tuple[int, ...] | None = None
    pooled_mlp: bool = False
    moving_scopes: bool = False
    video_form: str = "frames"
    branch_form: dict[str, Any] | None = None
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown_keys(self, list(kwargs))
        super().__post_init__(**kwargs)
        # Not as `validate_*` methods: @strict wraps their errors in one that is not a ValueError.
        self._check_type()
        if self.scope_sigmas is None:
            self.scope_sigmas = _DEFAULT_SIGMAS.get(self.kind)
        self._complete_sizes()
        self._check_sizes()
        self._check_key_heads()
        self._check_fusion()
        self._check_grids()
        self._check_video()
        if self.kind == "peer":
            self._check_peer()
            return
        self._check_scopes()
        if self.kind == "ms_resampler":
            self._share_heads()
        elif self.scope_heads is not None:
            raise ValueError(
                f"`scope_heads` is a field of `ms_resampler`: in `{self.projector_type}` scopes share none."
            )
        elif self.moving_scopes:
            raise ValueError(f"`moving_scopes` is a field of `ms_resampler`: in `{self.projector_type}` none move.")
        self._check_branch_form()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the fields of a file, also of an earlier version; unknown keys are ignored with a warning."""
        return super().from_dict(_read_fields(cls, _from_earlier_version(config_dict)), **kwargs)

    @property
    def kind(self) -> str:
        """The type whose fields the projector has: "ms_resampler", "ms_resampler_branches", "resampler" or "peer"."""
        return PROJECTOR_TYPES[self.projector_type]

    @property
    def num_scopes(self) -> int:
        """S; 0 for a peer."""
        return len(self.scope_sigmas or ())

    @property
    def scope_names(self) -> list[str]:
        """A readable name for each scope: local below one pitch, regional above, or global."""
        sigmas = self.scope_sigmas or ()
        words = ["global" if s is None else "local" if s < 1 else "regional" for s in sigmas]
        return [
            word if words.count(word) == 1 else f"{word} {number}" if sigma is None else f"{word} {sigma:g}"
            for number, (word, sigma) in enumerate(zip(words, sigmas, strict=True), start=1)
        ]

    def _check_type(self) -> None:
        if self.projector_type not in PROJECTOR_TYPES:
            near = difflib.get_close_matches(self.projector_type, PROJECTOR_TYPES, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(PROJECTOR_TYPES)}."
            raise ValueError(f"There is no `projector_type` `{self.projector_type}`; {hint}")

    def _complete_sizes(self) -> None:
        if self.hidden_size is None:
            self.hidden_size = 1024 if self.kind == "peer" else 768
        if self.num_attention_heads is None:
            self.num_attention_heads = self._default_heads()
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size

    def _default_heads(self) -> int:
        """The most heads that divide D and are at least 64 wide; narrower only if a scope would have none."""
        fewest = max(1, self.num_scopes) if self.kind == "ms_resampler" else 1
        possible = [heads for heads in range(fewest, self.hidden_size + 1) if self.hidden_size % heads == 0]
        return max((heads for heads in possible if 64 * heads <= self.hidden_size), default=min(possible, default=1))

    def _check_sizes(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 4:
            raise ValueError(
                f"`hidden_size` must be a multiple of 4 (2-D positions) and of `num_attention_heads`, got "
                f"{self.hidden_size} and {self.num_attention_heads} heads."
            )

    def _check_key_heads(self) -> None:
        heads = self.num_key_value_heads
        if heads is None:
            return
        if self.projector_type != "idefics2_perceiver":
            raise ValueError(
                f"`num_key_value_heads` is a field of `idefics2_perceiver`: `{self.projector_type}` has no such thing."
            )
        if heads < 1 or self.num_attention_heads % heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` {self.num_attention_heads}, got {heads}."
            )

    def _check_fusion(self) -> None:
        if self.fusion_layers and self.projector_type != "llava_mini":
            raise ValueError(f"`fusion_layers` is a field of `llava_mini`: `{self.projector_type}` has no such thing.")
        if self.fusion_layers < 0:
            raise ValueError(f"`fusion_layers` must not be negative, got {self.fusion_layers}.")

    def _check_grids(self) -> None:
        grids = {"query_grid": self.query_grid}
        if isinstance(self.visual_tokens, int):
            if self.visual_tokens < 1:
                raise ValueError(f"`visual_tokens` must be at least 1, got {self.visual_tokens}.")
        else:
            grids["visual_tokens"] = self.visual_tokens
        for name, grid in grids.items():
            if not is_grid(grid):
                raise ValueError(f"`{name}` must be [rows, columns], two positive integers, got {list(grid)}.")

    def _check_video(self) -> None:
        if self.video_form not in VIDEO_FORMS:
            raise ValueError(f"`video_form` is one of {', '.join(VIDEO_FORMS)}, got {self.video_form!r}.")
        if self.video_form == "scopes" and self.projector_type != "ms_resampler":
            raise ValueError(
                f'`video_form` "scopes" needs `ms_resampler`: `{self.projector_type}` reads clips as "frames".'
            )

    def _check_peer(self) -> None:
        for name in ("scope_sigmas", "scope_heads", "pooled_mlp", "moving_scopes", "branch_form"):
            if getattr(self, name) not in (None, False):
                raise ValueError(f"`{name}` is a field of `ms_resampler`: `{self.projector_type}` has no such thing.")

    def _check_scopes(self) -> None:
        if not self.scope_sigmas:
            raise ValueError("`scope_sigmas` needs at least one scope; [None] is one global scope.")
        for sigma in self.scope_sigmas:
            if sigma is not None and not (0 < sigma < math.inf):
                raise ValueError(f"A scope's sigma must be positive, or None for the global scope, got {sigma}.")
        if self.kind == "resampler" and len(self.scope_sigmas) > 1:
            raise ValueError(
                f"`resampler` has a single scope, got `scope_sigmas` {list(self.scope_sigmas)}: give one, or use "
                '`projector_type="ms_resampler"`.'
            )

    def _share_heads(self) -> None:
        heads, scopes = self.num_attention_heads, self.num_scopes
        if all(sigma is None for sigma in self.scope_sigmas):
            raise ValueError(
                f"`ms_resampler` needs a scope that is not global, or all tokens would read the same; got "
                f'`scope_sigmas` {list(self.scope_sigmas or ())}: use `projector_type="resampler"`.'
            )
        given = "" if self.scope_heads is None else f"; `scope_heads` {list(self.scope_heads)} does not"
        if self.scope_heads is None:
            others = [max(1, min(round(heads / 8), heads // scopes))] * (scopes - 1)
            self.scope_heads = [heads - sum(others), *others]
        if len(self.scope_heads) != scopes or min(self.scope_heads) < 1 or sum(self.scope_heads) != heads:
            raise ValueError(
                f"`ms_resampler` shares {heads} heads among {scopes} scopes, at least one a scope{given}. "
                "In `ms_resampler_branches` every scope has all heads."
            )

    def _check_branch_form(self) -> None:
        if self.branch_form and self.kind == "ms_resampler":
            raise ValueError("`branch_form` is a field of `ms_resampler_branches` and `resampler`.")
        for name, value in (self.branch_form or {}).items():
            if name not in BRANCH_FORMS or value not in BRANCH_FORMS[name]:
                known = "; ".join(f"{known}: {', '.join(map(str, of))}" for known, of in BRANCH_FORMS.items())
                raise ValueError(f"`branch_form` cannot have `{name}` {value!r}; it may have {known}.")

    def branch(self, name: str) -> Any:
        """An entry of `branch_form`, or the value of new checkpoints."""
        return (self.branch_form or {}).get(name, BRANCH_FORMS[name][0])


@_accept_numpy
@strict
class MSResamplerConfig(PretrainedConfig):
    """A vision tower, a projector and a language model: everything needed to rebuild the model.

    Fields:
        vision_config, text_config: any tower and causal LM that AutoModel builds.
        projector_config: see MSResamplerProjectorConfig.
        image_token_id: the placeholder in the text; one for every visual token.
        vision_feature_layer: the tower layer to read, or a list of layers (joined in width).
        vision_prefix_tokens: tokens before the patches (CLS, registers); None counts them in the tower's output.
        visual_words: token ids; visual tokens are then mixtures of these words' embeddings E, softmax(y E^T) E of the
            projector's output y, after Ovis (arXiv 2405.20797), whose table of visual words is learned instead.
        reducer_config: `reducer_type`, `keep` and the settings of a visual token reducer, see reducers_ms_resampler.py.
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
    visual_words: list[int] | None = None
    reducer_config: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown_keys(self, list(kwargs))
        super().__post_init__(**kwargs)
        _tell_transformers_serve()
        # Loading from the Hub rewrites auto_map to name that repository, and a later save would keep it.
        self.auto_map = dict(AUTO_MAP)
        # transformers ties the head by the root's value: the language model's own choice decides.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self._check_tower()
        self._check_text()
        self._check_fusion()
        if self.reducer_config is not None:
            read_reducer(self.reducer_config)  # raises for what is none

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads the fields of a file: unknown keys are kept unused, with a warning."""
        projector = config_dict.get("projector_config")
        if isinstance(projector, dict):
            fields = _read_fields(MSResamplerProjectorConfig, _from_earlier_version(projector))
            config_dict = config_dict | {"projector_config": fields}
        fields = _read_fields(cls, config_dict)
        loaded = super().from_dict(fields, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with the unused arguments
        for key in config_dict.keys() - fields.keys():
            setattr(config, key, config_dict[key])
        return loaded

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
        words = self.visual_words
        if words is not None and (len(words) < 2 or len(set(words)) < len(words) or self.image_token_id in words):
            raise ValueError("`visual_words` must be two or more different token ids, without the image token's.")
        if words is not None and not 0 <= min(words) <= max(words) < self.text_config.vocab_size:
            raise ValueError(
                f"`visual_words` has an id outside the language model's vocabulary of {self.text_config.vocab_size}."
            )

    def _check_fusion(self) -> None:
        if not self.projector_config.fusion_layers:
            return
        if self.text_config.model_type not in FUSION_MODELS:
            raise ValueError(
                f"`fusion_layers` needs a language model of the types {', '.join(FUSION_MODELS)}, not "
                f"`{self.text_config.model_type}`; with 0 there is the compressor alone."
            )
        if self.visual_words:
            raise ValueError("`visual_words` and `fusion_layers` exclude each other: fused tokens are no words.")

    @property
    def tower(self) -> Tower:
        """The vision tower's inputs and outputs."""
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
        """The number of unread layers at the tower's end; 0 for towers that cannot run without them."""
        return self.tower.unread_layers(self.feature_layers)

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens to drop before the patches."""
        assert self.tower.prefix_tokens is not None  # checked when the configuration was made
        return self.tower.prefix_tokens

    @property
    def feature_width(self) -> int:
        """C: channels of a patch, summed over the layers that are read."""
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
        """The factor of the language model's logits: cohere and Falcon H1 multiply, granite divides."""
        text = self.text_config
        if text.model_type == "mpt":  # has the field, but does not use it
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
        return patch_grid(image_size, self.patch_size)

    def token_grid(
        self, image_size: tuple[int, int], visual_tokens: int | Sequence[int] | None = None
    ) -> tuple[int, int]:
        """Token rows and columns (Mh, Mw) for an image of (height, width) pixels; see `token_grid` above."""
        budget = self.projector_config.visual_tokens if visual_tokens is None else visual_tokens
        return token_grid(budget, self.patch_grid(image_size))


def _tell_transformers_serve() -> None:
    """Adds our class to the table in which `transformers serve` looks up how to load a model and how to query it.

    It does so for remote code, too, where `auto_map` and `architectures` are not enough. The table is changed only in
    a serving process.
    """
    if "transformers.cli.serving.model_manager" in sys.modules:
        names = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
        names.setdefault("ms_resampler", "MSResamplerForConditionalGeneration")


MSResamplerConfig.register_for_auto_class()

__all__ = ["MSResamplerConfig", "MSResamplerProjectorConfig", "is_grid", "nearest_grid", "token_grid"]
