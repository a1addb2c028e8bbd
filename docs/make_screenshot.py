"""Takes the pictures of the demo that README and docs/space.md show: asks, waits for the answer, looks around.

python docs/make_screenshot.py [--model FOLDER] [--only space_dark.png] [--folder docs]
python docs/make_screenshot.py --small
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

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


def ask(page: Page, example: int) -> None:
    """Picks an example and reads the answer."""
    page.locator("#view .tokens").evaluate("tokens => { tokens.dataset.old = true; }")  # the page opens with an answer
    page.locator(f"#scenes [data-scene='{example}']").click()
    page.locator("#view .tokens:not([data-old])").wait_for()
    page.locator("#ask [data-testid=submit-button]").wait_for()  # it is back when the answer is complete


def pick_a_token(page: Page) -> None:
    """The example asks about the green triangle, where this token has its place."""
    ask(page, 2)
    page.locator("#view [data-token='27']").click()


def pick_a_token_of_the_small_model(page: Page) -> None:
    """A token on the picture's lion."""
    ask(page, 0)
    page.locator("#view [data-token='27']").click()


def click_a_place(page: Page) -> None:
    """A place on the word in the picture."""
    ask(page, 5)
    frame = page.locator("#view [data-figure='picture'] .frame")
    box = frame.bounding_box()
    frame.click(position={"x": 0.5 * box["width"], "y": 0.6 * box["height"]})


def play_a_word(page: Page) -> None:
    """The word that names the thing at the bottom."""
    ask(page, 5)
    page.get_by_role("button", name="Play the words").click()
    page.locator("#view [data-word]").last.click()


def compare(page: Page) -> None:
    """Two projectors, at the same budget; asked about another scene before, as a model's first answer takes longer."""
    page.get_by_role("tab", name="Compare").click()
    for example in (4, 5):
        page.locator("#view-b .tokens").evaluate_all("all => all.forEach(tokens => { tokens.dataset.old = true; })")
        page.locator(f"#compare-scenes [data-scene='{example}']").click()
        page.locator("#view-b .tokens:not([data-old])").wait_for()
        page.locator("#compare-ask [data-testid=submit-button]").wait_for()
        page.wait_for_timeout(500)  # before the answers' stream is closed, Gradio's page skips another question


@dataclass(frozen=True)
class Shot:
    """A picture of the page: what is done first, the page's width in pixels, and its colours."""

    act: Callable[[Page], None]
    width: int = 1400
    theme: str = "light"


SHOTS = {
    "screenshot.png": Shot(pick_a_token),
    "space_dark.png": Shot(click_a_place, theme="dark"),
    "space_narrow.png": Shot(play_a_word, width=390),
    "space_compare.png": Shot(compare),
    "space_wide.png": Shot(play_a_word, width=2560),
}
SHOTS_OF_SMALL = {"small.png": Shot(pick_a_token_of_the_small_model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the pictures go")
    parser.add_argument("--only", choices=SHOTS, help="take just this one")
    parser.add_argument("--small", action="store_true", help="the picture of the small model instead")
    arguments = parser.parse_args()
    shots = SHOTS_OF_SMALL if arguments.small else SHOTS
    model = ["--small"] if arguments.small else ["--model", arguments.model] if arguments.model else []
    with serve(model) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=BROWSER_OPTIONS)
        for name in [arguments.only] if arguments.only else shots:
            take(browser, address, shots[name], arguments.folder / name)
        browser.close()


def take(browser: Browser, address: str, shot: Shot, path: Path) -> None:
    """The whole page, when nothing moves any more."""
    page = browser.new_page(viewport={"width": shot.width, "height": 900}, reduced_motion="reduce")
    page.add_init_script("localStorage.setItem('toured', 'yes')")
    page.goto(f"{address}/?__theme={shot.theme}")
    shot.act(page)
    page.evaluate("document.fonts.ready")
    page.mouse.move(2, 2)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(800)
    page.screenshot(path=path, full_page=True, animations="disabled")
    page.close()
    print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")


@contextmanager
def serve(model: list[str]) -> Iterator[str]:
    """`ms-resampler demo` on a free port, as long as the context lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ms_resampler_cli.main", "demo", "--no-browser", "--port", str(port)]
    app = subprocess.Popen([*command, *model], cwd=ROOT)
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


def find_browser() -> str:
    """The path of a Chromium; SystemExit if there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit("No Chromium was found: install one, or set CHROMIUM to its path.")
    return path


if __name__ == "__main__":
    main()
