"""Takes the picture of docs/data.md: a few records as `ms-resampler data check` shows them.

python docs/make_labels_picture.py [--output docs/labels.png]
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from make_screenshot import BROWSER_OPTIONS, BROWSERS
from playwright.sync_api import sync_playwright

from ms_resampler.tiny.scenes import ask, make_scene
from ms_resampler_cli.main import main as ms_resampler

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "labels.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, page = folder / "data.json", folder / "labels.html"
        data.write_text(json.dumps([scene_record(folder, number) for number in (1, 5)]))
        ms_resampler(["data", "check", str(data), "--html", str(page), "--workers", "0"])
        with sync_playwright() as playwright:
            browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
            browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_OPTIONS)
            tab = browser.new_page(viewport={"width": 820, "height": 600})
            tab.goto(page.as_uri())
            tab.add_style_tag(content="h1, pre { display: none } section { margin: 1rem 0 }")
            tab.screenshot(path=arguments.output, full_page=True)
            browser.close()


def scene_record(folder: Path, number: int) -> dict:
    """A scene and three questions, in LLaVA's format."""
    scene = make_scene("train", number)
    scene.image.save(folder / f"{number}.png")
    said = []
    for turn, asked in enumerate(ask(scene, "train", number, 3)):
        said.append({"from": "human", "value": ("" if turn else "<image>\n") + asked.question})
        said.append({"from": "gpt", "value": asked.answer})
    return {"id": f"scene {number}", "image": f"{number}.png", "conversations": said}


if __name__ == "__main__":
    main()
