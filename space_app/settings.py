"""Settings of an answer, and their limits."""

from dataclasses import dataclass
from typing import Any

from pictures import Refusal

MAX_SYSTEM_CHARACTERS = 2000
MAX_TEMPERATURE = 2.0
MIN_TOP_P = 0.05
MAX_NEW_TOKENS = 512
MOST_VISUAL_TOKENS = 2**16
MOST_TILES = 9


@dataclass(frozen=True)
class Settings:
    """Settings of one answer; visual_tokens None is the model's default, temperature 0 is greedy decoding.

    tiles: into how many a picture is cut at most; None cuts none.
    """

    visual_tokens: int | None = None
    system_prompt: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    tiles: int | None = None


def checked(
    visual_tokens: Any, system_prompt: Any, temperature: Any, top_p: Any, max_new_tokens: Any, tiles: Any = None
) -> Settings:
    """Settings from what a browser or a program sent. Raises Refusal if a value is out of its range."""
    system_prompt = str(system_prompt or "").strip()
    if len(system_prompt) > MAX_SYSTEM_CHARACTERS:
        raise Refusal(f"The system prompt has {len(system_prompt)} characters; the limit is {MAX_SYSTEM_CHARACTERS}.")
    return Settings(
        None if visual_tokens is None else whole(visual_tokens, "number of visual tokens", 1, MOST_VISUAL_TOKENS),
        system_prompt,
        number(temperature, "temperature", 0, MAX_TEMPERATURE),
        number(top_p, "top-p", MIN_TOP_P, 1),
        whole(max_new_tokens, "length limit", 1, MAX_NEW_TOKENS),
        None if tiles is None else whole(tiles, "number of tiles", 1, MOST_TILES),
    )


def number(value: Any, name: str, lowest: float, highest: float) -> float:
    """The value as a number. Raises Refusal if it is none, or out of range."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        value = float("nan")
    if not lowest <= value <= highest:
        raise Refusal(f"The {name} must be a number from {lowest:g} to {highest:g}.")
    return value


def whole(value: Any, name: str, lowest: int, highest: int) -> int:
    """The value as a whole number. Raises Refusal if it is none, or out of range."""
    value = number(value, name, lowest, highest)
    if not value.is_integer():
        raise Refusal(f"The {name} must be a whole number.")
    return int(value)
