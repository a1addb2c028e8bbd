"""`ms-resampler push-space`."""

from ms_resampler.hub_upload.space import add_arguments, run

__all__ = ["add_arguments", "run"]
