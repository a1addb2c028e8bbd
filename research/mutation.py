"""Mutation testing of the remote code (`*_ms_resampler.py`): changes one operation at a time, and runs the fast tests.

    python -m research.mutation                          100 mutants of all files, on one core
    python -m research.mutation --files packing --count 20 --seed 1

A mutant is killed if a test fails, or takes much longer than it should; one that survives is printed as a diff. Works
on a copy of the repository.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import unified_diff
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The tests of each file, those that are most likely to fail first.
TESTS = {
    "configuration": "configuration assembly modeling projectors resampler remote_code",
    "resampler": "resampler projectors modeling generation configuration",
    "projectors": "projectors assembly modeling generation",
    "modeling": "modeling generation assembly packing remote_code",
    "processing": "processing chat_templates assembly remote_code",
    "packing": "packing",
}
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Add, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file, and its text with one change."""

    file: str
    text: str

    def diff(self) -> str:
        """The changed lines, after the file's name."""
        before, after = (text.splitlines() for text in ((ROOT / path_of(self.file)).read_text(), self.text))
        lines = list(unified_diff(before, after, n=1, lineterm=""))
        return "\n".join([path_of(self.file), *lines[2:]])


def changed(node: Any) -> Iterator[ast.AST]:
    """What a node may become: another operator or number, the opposite, nothing."""
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
    """All mutants of a file. Annotations and what an error says stay as they are."""
    source = text.encode()
    starts = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
    found = []
    for node in nodes(ast.parse(text)):
        for other in changed(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            written = f"({ast.unparse(other)})" if isinstance(other, ast.expr) else ast.unparse(other)
            found.append(Mutant(file, (source[:begin] + written.encode() + source[end:]).decode()))
    return found


def nodes(node: Any) -> Iterator[Any]:
    """A node and all below it that are run, and not only read by people or type checkers."""
    yield node
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        if name not in ("annotation", "returns") and not isinstance(node, ast.Raise | ast.JoinedStr):
            for child in children:
                if isinstance(child, ast.AST):
                    yield from nodes(child)


def passes(copy: Path, file: str, seconds: float | None = None) -> bool:
    """Whether the fast tests of a file pass in a copy of the repository, within so many seconds."""
    tests = [f"tests/test_{name}.py" for name in TESTS[file].split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not browser"]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run([*command, *tests], cwd=copy, env=environment, timeout=seconds, capture_output=True)
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


def path_of(file: str) -> str:
    """Where a file of the remote code is, relative to the repository."""
    return f"ms_resampler/{file}_ms_resampler.py"


def main() -> None:
    """Prints every survivor, and how many were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS), metavar="NAME")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    everything = [mutant for file in asked.files for mutant in mutants(file, (ROOT / path_of(file)).read_text())]
    sample = random.Random(asked.seed).sample(everything, min(asked.count, len(everything)))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "docs", "research"))
        survivors = try_all(sample, copy)
    print(f"{len(sample) - survivors} of {len(sample)} mutants killed, a sample of {len(everything)}.")


def try_all(sample: list[Mutant], copy: Path) -> int:
    """Prints every survivor; returns how many there are. Raises SystemExit if tests fail without any change."""
    limits, survivors = {}, 0
    for file in dict.fromkeys(mutant.file for mutant in sample):
        start = time.monotonic()
        if not passes(copy, file):
            raise SystemExit(f"The tests of {path_of(file)} fail without any change.")
        limits[file] = 60 + 3 * (time.monotonic() - start)
        print(f"{path_of(file)}: {time.monotonic() - start:.0f} s for its tests", flush=True)
    for number, mutant in enumerate(sample, 1):
        path = copy / path_of(mutant.file)
        path.write_text(mutant.text)
        if passes(copy, mutant.file, limits[mutant.file]):
            survivors += 1
            print(mutant.diff())
        shutil.copyfile(ROOT / path_of(mutant.file), path)
        print(f"{number}/{len(sample)}: {number - survivors} killed, {survivors} survived", flush=True)
    return survivors


if __name__ == "__main__":
    main()
