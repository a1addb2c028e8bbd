"""`ms-resampler card`."""

from ms_resampler.hub_upload.card import add_arguments, run

__all__ = ["add_arguments", "run"]
