"""`ms-resampler study`."""

from research.study.command import add_arguments, run

__all__ = ["add_arguments", "run"]
