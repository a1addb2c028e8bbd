"""`ms-resampler init`."""

from ms_resampler.init_command import add_arguments, run

__all__ = ["add_arguments", "run"]
