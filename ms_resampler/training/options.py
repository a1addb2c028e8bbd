"""What a recipe's run is told beside the recipe."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunOptions:
    """What a run is told beside its recipe: where things are, and how to use the hardware."""

    model: str
    data: str
    images: Path | None
    out: Path
    device_batch: int | None = None
    report_to: str = "none"
    split: str = "train"
    streaming: bool = False

    @property
    def devices(self) -> int:
        """How many processes train, each on a device."""
        return int(os.environ.get("WORLD_SIZE", 1))

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return int(os.environ.get("RANK", 0)) == 0
