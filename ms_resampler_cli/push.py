"""`ms-resampler push`."""

from ms_resampler.hub_upload.push import add_arguments, run

__all__ = ["add_arguments", "run"]
