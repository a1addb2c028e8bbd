"""Finds code that a checkpoint's configurations refer to and that is not in the checkpoint's own folder."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .personal import read_json

# transformers' "repository--module.Class" for a class elsewhere, and timm's "hf-hub:repository".
ELSEWHERE = re.compile(r"[\w.-]+/[\w.-]+--[\w.-]+|[\w.-]+--\w+\.[A-Z]\w*|hf[-_]hub:.*")
CLASS = re.compile(r"(\w+)\.(\w+)")


def code_problem(folder: Path) -> tuple[str, str] | None:
    """The first file that refers to code outside the folder, and how; None if there is none."""
    for file in sorted(folder.glob("*.json")):
        config = read_json(file)
        if file.name == "tokenizer.json" and isinstance(config, dict):
            config.pop("model", None)  # its vocabulary
        for problem in config_problems(config, folder):
            return file.name, problem
    for file in sorted(folder.glob("*.py")):
        for module in relative_imports(file):
            if not (folder / f"{module}.py").is_file():
                return file.name, f"imports code that is not there: {module}.py"
    return None


def config_problems(config: Any, folder: Path, depth: int = 0) -> Iterator[str]:
    """The problem with code that a configuration refers to, at any depth."""
    if isinstance(config, list):
        for value in config:
            yield from config_problems(value, folder, depth + 1)
    elif isinstance(config, str):
        if ELSEWHERE.fullmatch(config):
            yield f"refers to another repository: {config}"
    elif isinstance(config, dict):
        for key, value in config.items():
            if key in ("auto_map", "custom_pipelines"):
                yield from class_problems(value, folder)
                # transformers loads a part's code from the place that the part names
                place = config.get("_name_or_path") or config.get("name_or_path")
                if value and depth and place:
                    yield f"refers to another repository: {place}"
            elif key.endswith(("attn_implementation", "experts_implementation")):
                yield from kernel_problems(value)
            else:
                yield from config_problems(value, folder, depth + 1)


def class_problems(named: Any, folder: Path) -> Iterator[str]:
    """The problem with classes in an auto_map, or with a pipeline's implementation."""
    if isinstance(named, dict):
        for key, value in named.items():
            # For a pipeline, these are names of Auto classes, and data.
            check = config_problems if key in ("pt", "tf", "type", "default") else class_problems
            yield from check(value, folder)
    elif isinstance(named, list):
        for value in named:
            yield from class_problems(value, folder)
    elif named is not None:
        known = CLASS.fullmatch(str(named))
        if "--" in str(named):
            yield f"refers to another repository: {named}"
        elif not (known and defines(folder / f"{known[1]}.py", known[2])):
            yield f"names code that is not there: {named}"


def kernel_problems(named: Any) -> Iterator[str]:
    """The problem with an implementation of attention or experts: "org/name" is a repository of kernels."""
    for value in named.values() if isinstance(named, dict) else [named]:
        if "/" in str(value):
            yield f"refers to another repository: {value}"


def defines(file: Path, name: str) -> bool:
    """Whether a Python file exists and has a class of that name."""
    return file.is_file() and any(isinstance(node, ast.ClassDef) and node.name == name for node in parsed(file).body)


def relative_imports(file: Path) -> Iterator[str]:
    """The siblings that a Python file imports: "from .x import y" and "from . import x"."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def parsed(file: Path) -> ast.Module:
    """A Python file's syntax tree. Raises ValueError if it is not valid Python."""
    try:
        return ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"{file.name} is not Python: {error.msg} in line {error.lineno}.") from error
