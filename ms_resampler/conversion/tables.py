"""What other layouts call their weights, as tables of (regular expression, our name); the first row that fits counts.

`None` for our name: not a weight of ours (a table of positions, say, that is computed), left out and said so.
"""

import re
from collections.abc import Sequence

from ..projectors_ms_resampler import EARLIER_NAMES

Table = Sequence[tuple[str, str | None]]

# transformers' LlavaForConditionalGeneration, as saved by any version.
LLAVA: Table = (
    (r".*\.(?:position_ids|rotary_emb\.inv_freq)", None),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)", r"model.projector.mlp.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)", r"model.projector.mlp.2.\1"),
    (r"(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"model\.language_model\.(.+)", r"model.language_model.\1"),
)

# The original repositories of LLaVA and those that grew out of it; the projector's rows are put in front.
ORIGINAL: Table = (
    (r".*\.(?:position_ids|rotary_emb\.inv_freq)", None),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"lm_head\.(.+)", r"lm_head.\1"),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
)

# A vision tower of its own, or the one inside CLIP or SigLIP.
TOWER: Table = (
    (r"(?:text_model|text_projection|visual_projection|logit_scale|logit_bias)(?:\..+)?", None),
    (r".*\.position_ids", None),
    (r"(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
)

# Ours, with the MLP, in the layout that transformers' LLaVA has on disk.
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


def with_projector_rows(table: Table, prefix: str, names: dict[str, str]) -> Table:
    """A table with the rows of a projector before it: our names of its weights, and the original's."""
    rows = [(re.escape(prefix + theirs), f"model.projector.{ours}") for ours, theirs in names.items()]
    return (*rows, *table)


# A language model of its own.
LANGUAGE_MODEL: Table = (
    (r".*\.rotary_emb\.inv_freq", None),
    (r"lm_head\.(.+)", r"lm_head.\1"),
    (r"model\.(.+)", r"model.language_model.\1"),
)

# Ours, as it is today or was in an earlier version.
OURS: Table = (
    *((rf"(.+\.){earlier}", rf"\1{today}") for earlier, today in EARLIER_NAMES.items()),
    (r"(.+)", r"\1"),
)


def translate(key: str, table: Table) -> str | None:
    """Our name for a key, None if the table leaves it out. Raises KeyError if no row fits."""
    for pattern, ours in table:
        match = re.fullmatch(pattern, key)
        if match:
            return None if ours is None else match.expand(ours)
    raise KeyError(key)
