"""A suite of questions about pictures from free packages, with answers by construction. See docs/pictures.md."""

from .suite import TASKS, build_pictures

__all__ = ["TASKS", "build_pictures"]
