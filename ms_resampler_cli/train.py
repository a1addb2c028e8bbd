"""`ms-resampler train`."""

from ms_resampler.training.command import add_arguments, run

__all__ = ["add_arguments", "run"]
