"""Progress on stderr: a bar in a terminal, and elsewhere a line now and then, so that log files stay short."""

import sys
import time
from typing import Any, Self

from tqdm import tqdm

SECONDS = 30  # from one line to the next
LINE, ENDLESS = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, {remaining} left", "{desc}: {n_fmt} after {elapsed}"


def progress(**options: Any) -> "tqdm | Lines":
    """A context with `update` and `n`, from tqdm's options."""
    return tqdm(**options) if sys.stderr.isatty() else Lines(**options)


class Lines:
    """What stands for tqdm's bar where there is no terminal; what is done within SECONDS prints nothing."""

    def __init__(
        self,
        total: float | None = None,
        initial: float = 0,
        desc: str = "",
        unit_scale: bool = False,
        disable: bool = False,
        **of_bars: Any,
    ):
        self.n = initial
        self.disable = disable
        look = LINE if total else ENDLESS
        self.look = {"total": total, "initial": initial, "prefix": desc, "unit_scale": unit_scale, "bar_format": look}
        self.started = self.printed = time.monotonic()

    def update(self, count: float = 1) -> None:
        """Counts, and prints a line if the last one is old."""
        self.n += count
        now = time.monotonic()
        if now - self.printed >= SECONDS and not self.disable:
            self.printed = now
            line = tqdm.format_meter(self.n, elapsed=now - self.started, **self.look)
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass
