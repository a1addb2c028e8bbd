"""What every test shares: no network, an empty Hub cache, few threads, fixed seeds, one way to a browser."""

import atexit
import os
import random
import shutil
import sys
import tempfile
import time

import pytest

# These are read when the libraries are first imported, so they are set before any test module is.
assert "huggingface_hub" not in sys.modules, "huggingface_hub was imported before tests/conftest.py"
HF_HOME = tempfile.mkdtemp(prefix="ms-resampler-tests-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_ENDPOINT"):
    os.environ.pop(name, None)
os.environ.update(
    HF_HOME=HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    DISABLE_SAFETENSORS_CONVERSION="1",
    TOKENIZERS_PARALLELISM="false",
    GRADIO_ANALYTICS_ENABLED="False",
    MPLBACKEND="Agg",
)

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
hypothesis.settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("project")

BROWSERS = (
    os.environ.get("CHROMIUM", ""),
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries still draw from the global state)
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, the only one that this process's clients can see; large files go there by LFS."""
    from huggingface_hub import constants
    from loopback_hub import LoopbackHub

    (tmp_path / "hub").mkdir()
    with LoopbackHub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def impatient(monkeypatch):
    """Waits between retries, shortened."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


@pytest.fixture
def picture_file(tmp_path) -> str:
    """A file with the first picture of `tiny_models`."""
    from tiny_models import picture

    picture().save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium for playwright's `executable_path`; a machine without one fails, never skips."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail('no Chromium found: install one, set CHROMIUM to its path, or leave these out: -m "not browser"')
    return found
