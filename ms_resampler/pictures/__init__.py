"""A suite of questions about pictures from free packages, with answers by construction. See docs/pictures.md."""

from .suite import build_pictures
from .tasks import TASKS

__all__ = ["TASKS", "build_pictures"]
