"""`ms-resampler merge`."""

from ms_resampler.training.merge import add_arguments, run

__all__ = ["add_arguments", "run"]
