"""`ms-resampler data`."""

from ms_resampler.training.data_check import add_arguments, run

__all__ = ["add_arguments", "run"]
