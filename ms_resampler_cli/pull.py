"""`ms-resampler pull`."""

from ms_resampler.hub_upload.pull import add_arguments, run

__all__ = ["add_arguments", "run"]
