"""Time and peak memory of `from_pretrained` against transformers' own llava: CLIP-L/14-336 and Qwen2.5-0.5B's shapes.

    python -m research.benchmarks.loading                     needs 3.5 GB of disk in the temporary folder (TMPDIR)

Random weights in bfloat16. Every load is a separate process, the two models in turn; the clock starts after Python has
imported torch and transformers, and for ours the package, whose import is timed separately. The peak is Linux's VmHWM
of the process, which includes memory-mapped weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen2Config

from ms_resampler.folders import write_whole

from ..timing import in_turn, machine, markdown_table, spread
from .model import QWEN, TOWER, make_models, shapes

LOAD = """
import json, sys, time
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
started = time.perf_counter()
if sys.argv[2] == "ours":
    import ms_resampler
imported = time.perf_counter()
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
loaded = time.perf_counter()
sum(weight.sum() for weight in model.parameters())  # a mapped weight is in memory when it has been read
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"import_s": imported - started, "load_s": loaded - imported,
                  "read_s": time.perf_counter() - started, "peak_bytes": peak}))
"""


def save_models(parts: dict, folder: Path) -> dict[str, Path]:
    """Writes both models; their folders by name."""
    models: dict[str, PreTrainedModel] = dict(zip(("LLaVA", "ours"), make_models(parts, torch.bfloat16), strict=True))
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def load(name: str, folder: Path) -> dict[str, float]:
    """Seconds of the package's import, of from_pretrained, and until every weight is read; peak bytes."""
    run = subprocess.run([sys.executable, "-c", LOAD, str(folder), name], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def table(records: dict[str, list[dict[str, float]]]) -> str:
    head = ["model", "import, s", "from_pretrained, s", "spread", "x LLaVA"]
    head += ["until all is read, s", "peak, MB", "x LLaVA"]
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in records.items()
    }
    base = medians["LLaVA"]
    rows = [
        [
            name,
            f"{median['import_s']:.2f}",
            f"{median['load_s']:.2f}",
            spread([run["load_s"] for run in records[name]], 2),
            f"{median['load_s'] / base['load_s']:.2f}",
            f"{median['read_s']:.2f}",
            f"{median['peak_bytes'] / 1e6:.0f}",
            f"{median['peak_bytes'] / base['peak_bytes']:.2f}",
        ]
        for name, median in medians.items()
    ]
    return markdown_table(head, rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = save_models(shapes(TOWER, Qwen2Config(**QWEN)), Path(folder))
        records = in_turn({name: partial(load, name, path) for name, path in folders.items()}, arguments.repeats)
    print(f"{machine()}; bfloat16\n\n{table(records)}")
    if arguments.json:
        write_whole(arguments.json, json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
