"""Makes the table of docs/pictures.md from finished runs, or checks it against the stored results.

python docs/make_pictures_table.py RUN_OF_TEST RUN_OF_TEST_CONCEPT RUN_OF_TEST_STYLE BLIND_RUN_OF_TEST
python docs/make_pictures_table.py --check
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "research" / "results" / "pictures.json"
COLUMNS = ("test", "test-concept", "test-style", "test, blind")
SHOWN = ("test", "test, blind")


def collect(runs: list[Path]) -> dict:
    """The numbers of the runs, by column and task."""
    results = {}
    for column, run in zip(COLUMNS, runs, strict=True):
        tasks = json.loads((run / "summary.json").read_text(encoding="utf-8"))["tasks"]
        results[column] = {
            name: {
                "value": round(task["value"], 1),
                "half_interval": round((task["interval"][1] - task["interval"][0]) / 2, 1),
                "questions": task["answered"],
                "not_understood": task["not_parsed"],
                "most_common_answer": round(task["numbers"]["guess"], 1),
            }
            for name, task in sorted(tasks.items())
        }
    return results


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [["task", *SHOWN, "most common answer", "not understood"]]
    for name, first in results["test"].items():
        found = [results[column].get(name) for column in SHOWN]
        cells = [f"{task['value']} ±{task['half_interval']}" if task else "" for task in found]
        unknown = f"{first['not_understood']} of {first['questions']}"
        lines.append([name, *cells, str(first["most_common_answer"]), unknown])
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="of the three test splits, and the blind one")
    parser.add_argument("--check", action="store_true", help="only check the page against the stored results")
    arguments = parser.parse_args()
    if not arguments.check:
        RESULTS.write_text(json.dumps(collect(arguments.runs), indent=1) + "\n", encoding="utf-8")
    page = (HERE / "pictures.md").read_text(encoding="utf-8")
    made = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    fresh = re.sub("(<!-- results -->\n).*(<!-- /results -->)", rf"\g<1>{made}\g<2>", page, flags=re.DOTALL)
    if arguments.check:
        return int(fresh != page)
    (HERE / "pictures.md").write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
