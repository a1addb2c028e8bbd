"""Publishes the demo of a published checkpoint as a Space."""

import re
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.repocard import metadata_save

from ..folders import find_app, temporary_folder
from .client import check_repository_name, hub_errors, patiently
from .inspect import inspect_files, refuse_links
from .plan import as_visible_as, describe, look_at, make_plan
from .publish import create, publish, standing

APP_FILES = ("*.py", "*.css", "*.js", "*.html", "requirements.txt", "README.md", "examples/*")
ERRORS = ("NO_APP_FILE", "CONFIG_ERROR", "BUILD_ERROR", "RUNTIME_ERROR", "DELETING", "STOPPED", "PAUSED")
SECONDS_BETWEEN_LOOKS = 5


def push_space(
    name: str,
    model: str,
    *,
    model_revision: str = "main",
    private: bool = True,
    dry_run: bool = False,
    message: str = "Publish the demo",
    timeout: int = 1800,
) -> str | None:
    """Publishes the demo for one commit of a published model, waits until it runs, and returns its address.

    A dry run prints what it would do and returns None. `timeout` is in seconds. Raises ValueError if the model is not
    visible, if a file must not be published, or if the Space does not start.
    """
    check_repository_name(name)
    check_repository_name(model)
    api = HfApi()
    with hub_errors(model):
        if not dry_run:
            patiently(api.whoami)
        about = patiently(api.model_info, model, revision=model_revision)
    with hub_errors(name), temporary_folder("ms-resampler-space") as place:
        staged = stage_space(find_app().parent, place / "staged", about)
        remote = as_visible_as(look_at(api, name, "main", "space"), private)
        plan = make_plan(staged, remote, "main", lambda file: not file.startswith("."))
        print(describe(plan), flush=True)
        if dry_run:
            print(f"\n{(staged / 'README.md').read_text(encoding='utf-8')}\nNothing was sent (--dry-run).")
            return None
        if not remote.exists:
            create(api, remote)
            plan = replace(plan, remote=look_at(api, name, "main", "space"))
        set_variables(api, name, {"MODEL_ID": model, "MODEL_REVISION": str(about.sha)})
        commit = publish(api, plan, message).commit
        if about.private:
            print(f"{model} is private: give the Space a secret HF_TOKEN that may read it, on its settings page.")
        address = f"{api.endpoint}/spaces/{name}"
        wait_until_running(api, name, commit, timeout)
        print(f"Running: {address}")
        return address


def stage_space(app: Path, staged: Path, model: Any) -> Path:
    """Copies the app, pins its requirements, and writes the model and commit that it shows.

    `model` is the Hub's description of a model's revision. Raises ValueError for files that must not be published.
    """
    files = sorted({file for pattern in APP_FILES for file in app.glob(pattern) if file.is_file()})
    refuse_links(files)
    inspect_files(files)
    for file in files:
        target = staged / file.relative_to(app)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    requirements = (app / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (staged / "requirements.txt").write_text("".join(f"{line}\n" for line in pinned(requirements)))
    metadata_save(staged / "README.md", front_matter(metadata_load(staged / "README.md") or {}, model))
    return staged


def pinned(requirements: Iterable[str]) -> list[str]:
    """Requirements at the versions that are installed here; Gradio's is the front matter's `sdk_version`."""
    names = [re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0] for line in requirements if line.strip()]
    return [f"{name}=={installed(name)}" for name in names if name.lower() != "gradio"]


def installed(package: str) -> str:
    """The public version of an installed package: without "+cpu". Raises ValueError if it is not installed."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError as error:
        raise ValueError(f"The Space needs {package}, in the version installed here: pip install {package}") from error


def front_matter(metadata: dict[str, Any], model: Any) -> dict[str, Any]:
    """The Space's settings: the app's own, the versions that are installed here, and the model at a commit.

    A private model is not preloaded, because the builder has no token.
    """
    settings = metadata | {
        "sdk": "gradio",
        "sdk_version": installed("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "models": [model.id],
    }
    if not model.private:
        names = [file.rfilename for file in model.siblings if not file.rfilename.startswith((".", "README"))]
        settings["preload_from_hub"] = [f"{model.id} {','.join(sorted(names))} {model.sha}"]
    return settings


def set_variables(api: HfApi, name: str, variables: dict[str, str]) -> None:
    """Sets those of a Space's variables that differ: each change restarts it."""
    present = patiently(api.get_space_variables, name)
    for key, value in variables.items():
        if key not in present or present[key].value != value:
            patiently(api.add_space_variable, name, key, value)


def wait_until_running(api: HfApi, name: str, commit: str, timeout: int) -> None:
    """Waits until a Space runs a commit, and prints its stages. Raises ValueError if it fails, or takes too long."""
    end, before = time.monotonic() + timeout, None
    while time.monotonic() < end:
        with standing(name, f"{name} is published", "look at its page to see whether it runs"):
            runtime = patiently(api.get_space_runtime, name)
        if runtime.stage != before:
            print(f"  {runtime.stage}", flush=True)
        before = runtime.stage
        if runtime.raw.get("sha") in (None, commit):
            if runtime.stage == "RUNNING":
                return
            if runtime.stage in ERRORS:
                told = runtime.raw.get("errorMessage") or "its page has the log"
                raise ValueError(f"{name} is published, but does not run ({runtime.stage}): {told}.")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise ValueError(f"{name} is published, but does not run after {timeout} seconds ({before}): look at its page.")
