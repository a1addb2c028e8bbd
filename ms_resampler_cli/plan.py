"""`ms-resampler plan`."""

from ms_resampler.training.plan import add_arguments, run

__all__ = ["add_arguments", "run"]
