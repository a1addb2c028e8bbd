"""Mutation testing of the remote code (`*_ms_resampler.py`): changes one operation at a time, and runs the fast tests.

    python -m research.mutation                          100 mutants of all files, on one core
    python -m research.mutation --files packing --count 20 --seed 1

A mutant is killed if a test fails or takes much longer than usual; survivors are printed as diffs. Works on a copy of
the repository. Each mutant is run against the tests that call the changed function, the fastest first.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name.removesuffix("_ms_resampler.py") for path in ROOT.glob("ms_resampler/*_ms_resampler.py"))
# The tests of those files, and not of what is made around them.
TESTS = sorted(
    {path.name for path in ROOT.glob("tests/test_*.py")} - {"test_gpu.py", "test_packaging.py", "test_readme.py"}
)
SWAPS: dict[type[ast.AST], Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Add, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file, its text with one change, and the line where the function that is changed begins, if there is one."""

    file: str
    text: str
    function: int | None

    def diff(self) -> str:
        """The changed lines, after the file's name."""
        before, after = (text.splitlines() for text in ((ROOT / path_of(self.file)).read_text(), self.text))
        lines = list(unified_diff(before, after, n=1, lineterm=""))
        return "\n".join([path_of(self.file), *lines[2:]])


def changed(node: Any) -> Iterator[Any]:
    """The mutations of a node: another operator or number, its negation, or removal."""
    match node:
        case ast.Compare(left, [operator, *others], comparators) if type(operator) in SWAPS:
            yield ast.Compare(left, [SWAPS[type(operator)](), *others], comparators)
        case ast.BinOp(left, operator, right) if type(operator) in SWAPS:
            yield ast.BinOp(left, SWAPS[type(operator)](), right)
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(SWAPS[type(operator)](), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.IfExp(test, body, otherwise):
            yield ast.IfExp(test, otherwise, body)
        case ast.Return(value) if value and ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield ast.Pass()


def mutants(file: str, text: str) -> list[Mutant]:
    """All mutants of a file, except in annotations and error messages."""
    source = text.encode()
    starts = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
    found = []
    for node, function in nodes(ast.parse(text), None):
        for other in changed(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            written = f"({ast.unparse(other)})" if isinstance(other, ast.expr) else ast.unparse(other)
            found.append(Mutant(file, (source[:begin] + written.encode() + source[end:]).decode(), function))
    return found


def nodes(node: Any, function: int | None) -> Iterator[tuple[Any, int | None]]:
    """A node and its executed descendants, each with the first line of the function it is in."""
    if isinstance(node, ast.FunctionDef):
        function = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    yield node, function
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        if name not in ("annotation", "returns") and not isinstance(node, ast.Raise | ast.JoinedStr):
            for child in children:
                if isinstance(child, ast.AST):
                    yield from nodes(child, function)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Where this module is a plugin of pytest: notes how long a test takes, and which functions it calls."""
    called = set()

    def note(frame: Any, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.endswith("_ms_resampler.py"):
            called.add((Path(path).name.removesuffix("_ms_resampler.py"), frame.f_code.co_firstlineno))

    start = time.perf_counter()
    sys.setprofile(note)
    try:
        return (yield)
    finally:
        sys.setprofile(None)
        line = {"test": item.nodeid, "seconds": time.perf_counter() - start, "called": sorted(called)}
        with Path(os.environ["CALLS"]).open("a") as calls:
            calls.write(json.dumps(line) + "\n")


def trace(copy: Path) -> list[dict[str, Any]]:
    """The fast tests, the fastest first, and what they call. Raises SystemExit if one fails."""
    calls = copy / "calls.jsonl"
    tests = [f"tests/{name}" for name in TESTS]
    if not passes(copy, tests, None, ["-p", "research.mutation"], CALLS=str(calls)):
        raise SystemExit("Tests fail without any change.")
    found = [json.loads(line) for line in calls.read_text().splitlines()]
    return sorted(found, key=lambda test: test["seconds"])


def passes(
    copy: Path, tests: list[str], seconds: float | None, options: Sequence[str] = (), **environment: str
) -> bool:
    """Whether fast tests pass in a copy of the repository, within so many seconds."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not browser"]
    environment |= os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            [*command, *options, *tests], cwd=copy, env=environment, timeout=seconds, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


def path_of(file: str) -> str:
    """Where a file of the remote code is, relative to the repository."""
    return f"ms_resampler/{file}_ms_resampler.py"


def main() -> None:
    """Prints every survivor, and how many were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES, metavar="NAME")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    everything = [mutant for file in asked.files for mutant in mutants(file, (ROOT / path_of(file)).read_text())]
    sample = random.Random(asked.seed).sample(everything, min(asked.count, len(everything)))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "docs"))
        survivors = try_all(sample, copy)
    print(f"{len(sample) - survivors} of {len(sample)} mutants killed, a sample of {len(everything)}.")


def try_all(sample: list[Mutant], copy: Path) -> int:
    """Prints every survivor; returns how many there are."""
    tests, survivors = trace(copy), 0
    print(f"{len(tests)} tests take {sum(test['seconds'] for test in tests):.0f} s", flush=True)
    for number, mutant in enumerate(sample, 1):
        path, place = copy / path_of(mutant.file), [mutant.file, mutant.function]
        chosen = [test for test in tests if mutant.function is None or place in test["called"]]
        limit = 120 + 3 * sum(test["seconds"] for test in chosen)
        path.write_text(mutant.text)
        if not chosen or passes(copy, [test["test"] for test in chosen], limit):
            survivors += 1
            print(f"{mutant.diff()}\n({len(chosen)} tests call this)")
        shutil.copyfile(ROOT / path_of(mutant.file), path)
        print(f"{number}/{len(sample)}: {number - survivors} killed, {survivors} survived", flush=True)
    return survivors


if __name__ == "__main__":
    main()
