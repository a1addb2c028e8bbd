"""`ms-resampler chat`."""

from ms_resampler.chat import add_arguments, run

__all__ = ["add_arguments", "run"]
