"""The wheel holds the package, its data and the Space's app, and nothing of the repository beside them."""

import os
import subprocess
import sys
import sysconfig
from email.parser import BytesParser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PLACES = {
    "ms_resampler": "ms_resampler",
    "ms_resampler_cli": "ms_resampler_cli",
    "space_app": "ms_resampler/space_app",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def files_in(folder: Path) -> set[Path]:
    return {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_packages_and_nothing_else(installed):
    expected = {Path(target, file) for source, target in PLACES.items() for file in files_in(ROOT / source)}
    found = {file for file in files_in(installed) if not file.parts[0].endswith(".dist-info")}
    assert found == expected
    kinds = {(file.parts[1], file.suffix) for file in found}
    assert kinds >= {("checkpoints", ".safetensors"), ("chat_templates", ".jinja"), ("space_app", ".js")}
    assert {Path("ms_resampler/training/launchers", name) for name in ("ddp.yaml", "zero3.json")} <= found


def test_the_wheel_says_who_made_it_and_where_to_read_on(installed):
    (about,) = installed.glob("*.dist-info/METADATA")
    fields = BytesParser().parsebytes(about.read_bytes())
    assert fields["Author"] == "The MS-Resampler authors"
    assert fields["License-Expression"] == "Apache-2.0"
    assert any("https://arxiv.org/abs/" in url for url in fields.get_all("Project-URL"))


def test_the_installed_command_starts_without_the_repository(installed, tmp_path):
    """Without the site's .pth files, which would find the checkout; the study is a command of the checkout alone."""
    paths = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", "-m", "ms_resampler_cli.main", "--help"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "demo" in run.stdout
    assert "study" not in run.stdout
