"""`ms-resampler verify`."""

from ms_resampler.hub_upload.check import add_arguments, run

__all__ = ["add_arguments", "run"]
