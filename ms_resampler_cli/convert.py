"""`ms-resampler convert`."""

from ms_resampler.conversion.command import add_arguments, run

__all__ = ["add_arguments", "run"]
