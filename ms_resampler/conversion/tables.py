"""Names of weights in other layouts, as tables of (regular expression, our name); the first match counts.

`None` as our name means that the weight is not used, for example a computed table of positions; the plan says so.
"""

import re
from collections.abc import Sequence

from ..projectors_ms_resampler import EARLIER_NAMES

Table = Sequence[tuple[str, str | None]]

# transformers' LlavaForConditionalGeneration, as saved by any version.
LLAVA: Table = (
    (r".*\.(?:position_ids|rotary_emb\.inv_freq)", None),
    (r"(?:model\.)?image_newline", None),  # a row of the embeddings, see from_llava.py
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)", r"model.projector.mlp.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)", r"model.projector.mlp.2.\1"),
    (r"(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"model\.language_model\.(.+)", r"model.language_model.\1"),
)

# The original repository of LLaVA and its descendants; the projector's rows are put in front.
ORIGINAL: Table = (
    (r".*\.(?:position_ids|rotary_emb\.inv_freq)", None),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"lm_head\.(.+)", r"lm_head.\1"),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    (r"model\.prefusion_layers\.(.+)", r"model.fusion.decoder.layers.\1"),
)

# A separate vision tower, or the one inside CLIP or SigLIP.
TOWER: Table = (
    (r"(?:text_model|text_projection|visual_projection|logit_scale|logit_bias)(?:\..+)?", None),
    (r".*\.position_ids", None),
    (r"(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
)

# Ours, with the MLP, to the layout of transformers' LLaVA on disk.
TO_LLAVA: Table = (
    (r"model\.vision_tower\.(.+)", r"vision_tower.\1"),
    (r"model\.projector\.mlp\.0\.(.+)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.projector\.mlp\.2\.(.+)", r"multi_modal_projector.linear_2.\1"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    (r"model\.language_model\.(.+)", r"language_model.model.\1"),
)

# Honeybee's.
HONEYBEE: Table = (
    (r".*\.(?:position_ids|rotary_emb\.inv_freq)", None),
    (r"vision_model\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"language_model\.lm_head\.(.+)", r"lm_head.\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
)

PROJECTOR_PREFIX, ABSTRACTOR_PREFIX = "model.mm_projector.", "abstractor."
# LLaVA-Mini's projector is two modules side by side, and its pre-fusion a list of layers.
BASE_PREFIX, COMPRESSOR_PREFIX, FUSION_PREFIX = "model.", "model.compressor.", "model.prefusion_layers."


def with_projector_rows(table: Table, prefix: str, names: dict[str, str]) -> Table:
    """A table preceded by the rows of a projector, from our names of its weights and the original's."""
    rows = [(re.escape(prefix + theirs), f"model.projector.{ours}") for ours, theirs in names.items()]
    return (*rows, *table)


# A separate language model.
LANGUAGE_MODEL: Table = (
    (r".*\.rotary_emb\.inv_freq", None),
    (r"lm_head\.(.+)", r"lm_head.\1"),
    (r"model\.(.+)", r"model.language_model.\1"),
)

# Ours, of this or an earlier version.
OURS: Table = (
    *((rf"(.+\.){earlier}", rf"\1{today}") for earlier, today in EARLIER_NAMES.items()),
    (r"(.+)", r"\1"),
)


def translate(key: str, table: Table) -> str | None:
    """Our name for a key, None if it is not used. Raises KeyError if no row matches."""
    for pattern, ours in table:
        match = re.fullmatch(pattern, key)
        if match:
            return None if ours is None else match.expand(ours)
    raise KeyError(key)
