"""A small model of real parts: EfficientNet-Lite0, SmolLM2-135M, and a projector and adapters trained here.

`build_small` puts it together, `train_small` (in stages) trains its parts again. See docs/small.md.
"""

from .parts import build_small, kept_small

__all__ = ["build_small", "kept_small"]
