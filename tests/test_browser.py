from urllib.parse import urlsplit

import pytest
import space_server
import tiny_models
from playwright.sync_api import expect, sync_playwright

pytestmark = pytest.mark.browser
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUESTION = "What is this?"
SECONDS_A_TOKEN = 0.03


@pytest.fixture(scope="module")
def model_and_processor():
    model, processor = space_server.make_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.MAX_NEW_TOKENS", 60)
        yield space_server.slowed(model, SECONDS_A_TOKEN), processor


@pytest.fixture(scope="module")
def address(model_and_processor):
    with space_server.served(*model_and_processor) as address:
        yield address


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; afterwards there was no error in the console, and no request left this computer."""
    complaints, pages = [], []

    def open_page(**options):
        page = browser.new_page(**{"viewport": {"width": 1400, "height": 900}, **options})
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: is_local(request.url) or complaints.append(request.url))
        page.goto(address)
        page.locator("[data-scene='0']").wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def is_local(url):
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob") or parts.hostname in ("127.0.0.1", "localhost")


def answer(page):
    return page.locator("#chat .bot .message-content").last


def wait_until_done(page):
    expect(page.get_by_test_id("submit-button")).to_be_visible(timeout=30_000)


@pytest.fixture
def picture_file(tmp_path):
    path = tmp_path / "picture.png"
    tiny_models.picture().save(path)
    return path


def test_an_example_is_answered_word_by_word(open_page):
    page = open_page()
    page.locator("[data-scene='1']").click()
    expect(page.locator("#chat .user .message-content")).to_have_text("Where is the red star?")
    page.locator(".picker").wait_for()
    lengths = []
    while page.get_by_test_id("submit-button").count() == 0:
        lengths.append(len(answer(page).inner_text()))
        page.wait_for_timeout(100)
    assert len(set(lengths)) > 2
    assert lengths == sorted(lengths)


def test_stop_stops(open_page, model_and_processor):
    page = open_page()
    page.locator("[data-scene='0']").click()
    page.locator(".picker").wait_for()
    page.get_by_role("button", name="Stop").click()
    wait_until_done(page)
    page.wait_for_timeout(1000 * SECONDS_A_TOKEN + 100)
    made, text = model_and_processor[0].tokens_made, answer(page).inner_text()
    page.wait_for_timeout(600)
    assert model_and_processor[0].tokens_made == made
    assert answer(page).inner_text() == text
    page.locator("[data-scene='1']").click()
    expect(page.locator("#chat .bot .message-content")).to_have_count(2)
    wait_until_done(page)


def test_clear_clears(open_page):
    page = open_page()
    page.locator("[data-scene='0']").click()
    page.locator(".picker").wait_for()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".picker")).to_have_count(0)
    expect(page.locator("#chat .message-content")).to_have_count(0)
    wait_until_done(page)


def test_a_picture_is_dropped_and_asked_about_twice(open_page, picture_file):
    page = open_page()
    page.locator("#ask input[type=file]").set_input_files(picture_file)
    page.locator("#ask .thumbnail-item").wait_for()
    page.get_by_label("Your question", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    page.locator(".picker").wait_for()
    expect(page.get_by_label("Your question", exact=True)).to_have_value("")
    wait_until_done(page)
    page.get_by_label("Your question", exact=True).fill("And now?")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .bot .message-content")).to_have_count(2)
    wait_until_done(page)


def test_a_token_is_picked_by_mouse_and_by_keys(open_page):
    page = open_page()
    page.locator("[data-scene='2']").click()
    page.locator(".picker").wait_for()
    wait_until_done(page)
    maps = page.locator("#view .figures").nth(1)
    page.locator("[data-token='0']").click()
    expect(page.locator("[data-token='0']")).to_have_attribute("aria-pressed", "true")
    first = [image.get_attribute("src") for image in maps.locator("img").all()]
    page.locator("[data-token='0']").press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("[data-token='1']")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("[data-token='1']")).to_be_focused()
    expect(page.get_by_text("row 1, column 2", exact=True)).to_be_visible()
    second = [image.get_attribute("src") for image in maps.locator("img").all()]
    assert len(first) == len(second) == 3
    assert all(before != after for before, after in zip(first, second, strict=True))


def test_what_is_no_picture_is_refused_in_a_sentence(open_page, tmp_path):
    page = open_page()
    (tmp_path / "text.png").write_text("no picture")
    page.locator("#ask input[type=file]").set_input_files(tmp_path / "text.png")
    page.locator("#ask .thumbnail-item").wait_for()
    page.get_by_label("Your question", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.get_by_text("This file cannot be read as a picture")).to_be_visible()
    expect(page.get_by_label("Your question", exact=True)).to_have_value(QUESTION)


def test_a_question_without_a_picture_is_refused_in_a_sentence(open_page):
    page = open_page()
    page.get_by_label("Your question", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.get_by_text("Please add a picture first")).to_be_visible()


def test_everything_has_a_name(open_page):
    page = open_page()
    page.locator("[data-scene='3']").click()
    page.locator(".picker").wait_for()
    wait_until_done(page)
    assert (
        page.locator("img:not([alt]), img[alt='']")
        .locator("visible=true")
        .evaluate_all("images => images.filter(image => !image.closest('footer')).map(image => image.outerHTML)")
        == []
    )
    assert (
        page.locator("button:visible, textarea:visible").evaluate_all(
            "all => all.filter(e => !(e.ariaLabel || e.title || e.innerText.trim() || e.querySelector('img[alt]')))"
            ".map(e => e.outerHTML)"
        )
        == []
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_telephone(open_page, scheme):
    page = open_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.locator("[data-scene='0']").click()
    page.locator(".picker").wait_for()
    wait_until_done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for box in page.locator("#view img, #view .picker").all():
        place = box.bounding_box()
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= 390
