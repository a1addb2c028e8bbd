"""`ms-resampler export`."""

from ms_resampler.hub_upload.export import add_arguments, run

__all__ = ["add_arguments", "run"]
