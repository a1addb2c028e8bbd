"""Takes the README's picture of the demo: picks an example, waits for the answer, picks a token.

python docs/make_screenshot.py [--model FOLDER] [--dark] [--narrow] [--output docs/screenshot.png]
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
BROWSER_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
EXAMPLE, TOKEN = 2, 27  # the example asks about the green triangle, where this token has its place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "screenshot.png")
    parser.add_argument("--example", type=int, default=EXAMPLE, help="number of the example, from 0")
    parser.add_argument("--token", type=int, default=TOKEN, help="number of the token to pick, from 0")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--narrow", action="store_true", help="a telephone's width, the whole page")
    parser.add_argument("--scale", type=int, default=1, help="pixels of the picture per pixel of the page")
    arguments = parser.parse_args()
    with serve(arguments.model) as address, browse(arguments) as page:
        page.goto(f"{address}/?__theme={'dark' if arguments.dark else 'light'}")
        use(page, arguments.example, arguments.token)
        page.screenshot(path=arguments.output, full_page=arguments.narrow, animations="disabled")
    print(f"{arguments.output} ({arguments.output.stat().st_size / 1024:.0f} KiB)")


@contextmanager
def serve(model: str | None) -> Iterator[str]:
    """`ms-resampler demo` on a free port, as long as the context lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ms_resampler.cli", "demo", "--no-browser", "--port", str(port)]
    app = subprocess.Popen([*command, *(["--model", model] if model else [])], cwd=ROOT)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, app)
        yield address
    finally:
        app.terminate()
        app.wait()


def wait_for(address: str, app: subprocess.Popen, seconds: int = 120) -> None:
    """Returns when the app answers; RuntimeError if it ends or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and app.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"The app did not answer at {address}.")


@contextmanager
def browse(arguments: argparse.Namespace) -> Iterator[Page]:
    """An empty page in Chromium."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise SystemExit("No Chromium was found: install one, or set CHROMIUM to its path.")
    size = {"width": 390, "height": 844} if arguments.narrow else {"width": 1400, "height": 900}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_OPTIONS)
        yield browser.new_page(viewport=size, device_scale_factor=arguments.scale)
        browser.close()


def use(page: Page, example: int, token: int) -> None:
    """What a person does: picks an example, reads the answer, picks a token."""
    page.locator(f"[data-scene='{example}']").click()
    page.locator(".picker").wait_for()
    page.get_by_test_id("submit-button").wait_for()  # it is back when the answer is complete
    page.locator(f"[data-token='{token}']").click()
    page.locator(f"[data-token='{token}'][aria-pressed='true']").wait_for()
    page.evaluate("document.fonts.ready")
    page.mouse.move(2, 2)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(600)


if __name__ == "__main__":
    main()
