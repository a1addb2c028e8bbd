"""Makes the table of docs/pictures.md with the embedded checkpoints, or checks it against the stored results.

ms-resampler pictures my-pictures --questions 60 --train-questions 0
python docs/make_pictures_table.py my-pictures/test --out runs/pictures    # resumes; a quarter of an hour on two cores
python docs/make_pictures_table.py --check
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from ms_resampler import convert
from ms_resampler.demo import loadable
from ms_resampler.evaluation import Options, evaluate
from ms_resampler.folders import PACKAGE
from ms_resampler.pictures import TASKS
from ms_resampler.small import build_small

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "research" / "results" / "pictures.json"
MODELS = ("tiny", "tiny_resampler", "tiny_resampler, converted", "small")
BLIND = ("tiny", "small")


def folder_of(name: str, out: Path) -> Path:
    """A model's folder: an embedded checkpoint, the second of them converted to three scopes, or the small model."""
    folder = out / "models" / name
    if folder.is_dir():
        return folder
    if name == "small":
        build_small(folder)
    elif name.endswith("converted"):
        convert(folder_of("tiny_resampler", out), folder, projector={"projector_type": "ms_resampler"})
    else:
        with loadable(str(PACKAGE / "checkpoints" / name)) as found:
            shutil.copytree(found, folder)
    if name != "small":  # the tiny models were trained on bare questions
        prompts = dict.fromkeys((task for task in TASKS if task != "naming"), "{question}")
        (folder / "evaluation_prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    return folder


def run(suite: Path, out: Path) -> dict:
    """Evaluates every model, with pictures and without; the numbers by model and task."""
    results = {}
    for name in MODELS:
        for blind in (False, True)[: 1 + (name in BLIND)]:
            kind = f"{name}, blind" if blind else name
            summary = evaluate(str(folder_of(name, out)), [suite], out / "runs" / kind, Options(blind=blind))
            results[kind] = {
                task: {
                    "value": round(found["value"], 1),
                    "half_interval": round((found["interval"][1] - found["interval"][0]) / 2, 1),
                    "questions": found["answered"],
                    "not_understood": found["not_parsed"],
                    "most_common_answer": round(found["numbers"]["guess"], 1),
                }
                for task, found in sorted(summary["tasks"].items())
            }
    return results


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [["task", *results, "most common answer"]]
    for task in results["tiny"]:
        cells = [f"{found[task]['value']} ±{found[task]['half_interval']}" for found in results.values()]
        lines.append([task, *cells, str(results["tiny"][task]["most_common_answer"])])
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", type=Path, help="a split of the suite")
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"), help="models and runs")
    parser.add_argument("--check", action="store_true", help="only check the page against the stored results")
    arguments = parser.parse_args()
    if not arguments.check:
        results = run(arguments.suite, arguments.out)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = (HERE / "pictures.md").read_text(encoding="utf-8")
    made = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    fresh = re.sub("(<!-- results -->\n).*(<!-- /results -->)", rf"\g<1>{made}\g<2>", page, flags=re.DOTALL)
    if arguments.check:
        return int(fresh != page)
    (HERE / "pictures.md").write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
