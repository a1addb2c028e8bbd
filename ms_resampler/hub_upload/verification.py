"""Loads a checkpoint in a process that has neither this package, nor the network, nor a token."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

STRANGER = Path(__file__).parent / "stranger.py"


def answer_of_a_stranger(checkpoint: str, *, revision: str = "", hf_home: Path | None = None) -> bytes:
    """Loads a folder, or a repository out of a cache, through the Auto classes; its logits and answer, as bytes.

    Raises ValueError with the process's last words if it cannot be loaded or does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="ms-resampler-") as place:
        result = Path(place, "result.safetensors")
        done = subprocess.run(
            [sys.executable, "-P", str(STRANGER), checkpoint, revision, str(result)],
            env=environment(hf_home or Path(place)),
            cwd=place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ValueError(f"It does not load without this package: {last}")
        return result.read_bytes()


def environment(hf_home: Path) -> dict[str, str]:
    """This process's environment without its tokens and caches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
