"""The Space as people meet it: its page in Chromium."""

import io
import re
from base64 import b64decode
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pytest
import space_server
import tiny_models
import tiny_proxy
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import app  # isort: skip (space_server made it importable)
import examples
import known
import measures
import pictures
import proof
import scope_view
import settings

pytestmark = pytest.mark.browser
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
QUESTION = "What is this?"
TOKENS, SECONDS_A_TOKEN = 60, 0.03
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def answerer():
    return space_server.make_answerer()


@pytest.fixture
def knowing(monkeypatch):
    """A model that knows the words of QUESTION, and every picture."""
    monkeypatch.setattr(settings.Settings, "max_new_tokens", 12)
    monkeypatch.setattr(known.Known, "is_foreign", lambda *_: False)
    answerer = space_server.make_answerer()
    answerer.known = known.Known({}, 1.0, frozenset({"what", "is", "this"}), 0.0, [QUESTION])
    return answerer


@pytest.fixture(scope="module")
def slow():
    return space_server.slowed(space_server.make_answerer(), SECONDS_A_TOKEN)


@pytest.fixture(scope="module")
def address(answerer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings.Settings, "max_new_tokens", 12)
        with space_server.served(answerer) as address:
            yield address


@pytest.fixture(scope="module")
def slow_address(slow):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings.Settings, "max_new_tokens", TOKENS)
        with space_server.served(slow) as address:
            yield address


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS + CAMERA)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page; afterwards there was no error in the console, and no request left this computer."""
    complaints, pages = [], []

    def open_page(address=address, **options):
        page = browser.new_page(**{"viewport": {"width": 1400, "height": 900}, **options})
        page.set_default_timeout(60_000)
        page.on(
            "console",
            lambda message: (
                message.type == "error"
                and "/app_id" not in str(message.location)  # asked for after the server's end
                and complaints.append(f"{message.text} {message.location}")
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: is_local(request.url) or complaints.append(request.url))
        listen_to_streams(page)
        page.goto(address)
        page.locator("#scenes [data-scene='0']").wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture
def picture_files(tmp_path):
    for seed in range(5):
        tiny_models.picture(seed).save(tmp_path / f"{seed}.png")
    return [tmp_path / f"{seed}.png" for seed in range(5)]


def is_local(url):
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob") or parts.hostname in ("127.0.0.1", "localhost")


def wait_until_done(page, box="#ask"):
    """For the end of an answer that has begun: the box shows Send before it begins, too."""
    expect(page.locator(f"{box} [data-testid=submit-button]")).to_be_visible()


def listen_to_streams(page):
    """Keeps account of the streams by which answers come."""
    page.streams = set()
    page.on("request", lambda request: "/queue/data" in request.url and page.streams.add(request))
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda request: page.streams.discard(request))


def settle(page):
    """Waits until the last answer's stream is closed: before, Gradio's page skips a question put in the same way."""
    while page.streams:
        page.wait_for_timeout(50)
    page.evaluate("() => new Promise(done => requestIdleCallback(done))")


@contextmanager
def answering(page):
    """What is done in this context asks a question; it ends when the maps are drawn anew and the answer is whole."""
    settle(page)
    page.locator("#view .tokens").evaluate_all("all => all.forEach(tokens => { tokens.dataset.old = true; })")
    yield
    page.locator("#view .tokens:not([data-old])").first.wait_for()
    wait_until_done(page)
    settle(page)


def ask_example(page, number=0):
    with answering(page):
        page.locator(f"#scenes [data-scene='{number}']").click()


def ask(page, question=QUESTION, files=()):
    """Asks, and waits for the answer."""
    with answering(page):
        send(page, question, files)


def send(page, question=QUESTION, files=()):
    if files:
        page.locator("#ask input[type=file]").set_input_files(files)
        expect(page.locator("#ask .thumbnail-item")).to_have_count(len(files))
    page.locator("#ask textarea").fill(question)
    page.locator("#ask textarea").press("Enter")


def answers(page):
    return page.locator("#chat .bot:not(.pending) .message-content")


def status(page, view="#view"):
    return page.locator(f"{view} .status")


def drawn(page, figure, view="#view"):
    """What stands on a canvas of the view, (height, width, 3)."""
    url = page.locator(f"{view} [data-figure='{figure}'] canvas").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(b64decode(url.split(",")[1]))).convert("RGB")).astype(float)


def percents(text):
    return [float(number) for number in re.findall(r"([\d.]+) %", text)]


# --- Asking -----------------------------------------------------------------------------------------------------


def test_an_example_is_answered_word_by_word(open_page, slow_address):
    page = open_page(slow_address)
    page.evaluate(
        """() => {
          window.lengths = [];
          const note = () => lengths.push(document.querySelector('#chat .bot:not(.pending)')?.innerText.length || 0);
          new MutationObserver(note).observe(
            document.querySelector('#chat'), {childList: true, characterData: true, subtree: true});
        }"""
    )
    ask_example(page, 1)
    expect(page.locator("#chat .user .message-content")).to_have_text("Where is the red star?")
    lengths = page.evaluate("lengths")
    assert len(set(lengths)) > 4
    assert lengths == sorted(lengths)


def test_stop_stops(open_page, slow_address, slow):
    page = open_page(slow_address)
    page.locator("#scenes [data-scene='0']").click()
    page.locator("#view .tokens").wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_until_done(page)
    page.wait_for_timeout(1000 * SECONDS_A_TOKEN + 100)
    made, text = slow.model.tokens_made, answers(page).last.inner_text()
    page.wait_for_timeout(600)
    assert slow.model.tokens_made == made
    assert answers(page).last.inner_text() == text
    ask_example(page, 1)
    expect(answers(page)).to_have_count(2)


def test_clear_clears_what_is_being_written(open_page, slow_address):
    page = open_page(slow_address)
    page.locator("#scenes [data-scene='0']").click()
    page.locator("#view .tokens").wait_for()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#view .tokens")).to_have_count(0)
    expect(page.locator("#chat .message-content")).to_have_count(0)
    wait_until_done(page)
    page.wait_for_timeout(1000 * 5 * SECONDS_A_TOKEN)  # words that were under way
    expect(page.locator("#view .tokens")).to_have_count(0)
    expect(page.locator("#chat .message-content")).to_have_count(0)


def test_a_scene_picked_during_an_answer_leaves_that_answer(open_page, slow_address, picture_files):
    page = open_page(slow_address)
    send(page, QUESTION, picture_files[:1])
    page.locator("#view .tokens").wait_for()
    page.locator("#scenes [data-scene='1']").click()
    wait_until_done(page)
    settle(page)
    expect(page.locator("#chat .user .message-content")).to_have_text([QUESTION])
    ask_example(page, 1)
    expect(answers(page)).to_have_count(2)


def test_several_pictures_are_asked_about_twice(open_page, answerer, picture_files):
    page = open_page()
    ask(page, files=picture_files[:2])
    expect(page.locator("#ask textarea")).to_have_value("")
    expect(page.locator("#view .cost")).to_contain_text("8 visual tokens from 72 patches, 89 % saved · read in")
    for number, maps in enumerate(answerer.look([tiny_models.picture(0), tiny_models.picture(1)], settings.Settings())):
        page.get_by_role("button", name=f"Picture {number + 1}").click()
        page.locator("#view [data-token='2']").click()
        expect(status(page)).to_contain_text("row 2, column 1")
        np.testing.assert_allclose(percents(status(page).inner_text()), 100 * maps.weights[:, 2], atol=0.51)
    ask(page, "And now?")
    expect(page.locator("#view .cost")).to_contain_text("read before, and reused · first token after")
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="Answer 1").click()
    expect(page.get_by_role("button", name="Answer 1")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="Answer 1")).to_be_focused()


GIVE = """(place, [kinds, name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name));
  for (const kind of kinds) place.dispatchEvent(kind === 'paste'
    ? new ClipboardEvent(kind, {clipboardData: data, bubbles: true, cancelable: true})
    : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


def give(page, place, kinds, file):
    """Pastes or drops a file somewhere on the page."""
    page.locator(place).evaluate(GIVE, [kinds, file.name, list(file.read_bytes())])


@pytest.mark.parametrize("kinds", [["paste"], ["dragenter", "dragover", "drop"]], ids=["pasted", "dropped"])
def test_a_picture_is_taken_from_anywhere_on_the_page(open_page, picture_files, kinds):
    page = open_page()
    for number, place in enumerate(("#ask textarea", "#header", "#view")):
        give(page, place, kinds, picture_files[number])
        expect(page.locator("#ask .thumbnail-item")).to_have_count(number + 1)
    ask(page)
    page.get_by_role("tab", name="Compare").click()
    give(page, "body", kinds, picture_files[0])
    expect(page.locator("#compare-ask .thumbnail-item")).to_have_count(1)
    expect(page.locator("#ask .thumbnail-item")).to_have_count(0)


def test_a_long_question_that_is_pasted_stays_text_and_is_refused(open_page, picture_files):
    page = open_page()
    page.locator("#ask input[type=file]").set_input_files(picture_files[0])
    expect(page.locator("#ask .thumbnail-item")).to_have_count(1)
    page.locator("#ask textarea").focus()
    page.evaluate(
        """() => {
          const data = new DataTransfer(), box = document.querySelector('#ask textarea');
          data.setData('text/plain', 'x'.repeat(501));
          if (box.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})))
            document.execCommand('insertText', false, 'x'.repeat(501));  // what a browser does by itself
        }"""
    )
    expect(page.locator("#ask textarea")).to_have_value("x" * 501)
    page.locator("#ask textarea").press("Enter")
    expect(page.get_by_text("The question has 501 characters; please ask in at most 500.")).to_be_visible()
    expect(page.locator("#ask .thumbnail-item")).to_have_count(1)


def test_a_photograph_goes_into_the_box(open_page):
    page = open_page(permissions=["camera"])
    page.get_by_role("button", name="Camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#camera video')?.readyState >= 2")  # there is a frame to take
    page.get_by_role("button", name="capture photo").click()
    expect(page.locator("#ask .thumbnail-item")).to_have_count(1)
    ask(page)


def test_a_question_is_edited_and_asked_again(open_page, picture_files):
    page = open_page()
    ask(page, files=picture_files[:1])
    page.get_by_role("button", name="Edit the question").click()
    expect(page.locator("#ask textarea")).to_have_value(QUESTION)
    expect(page.locator("#chat .message-content")).to_have_count(0)
    expect(page.locator("#ask .thumbnail-item")).to_have_count(1)
    ask(page, "And what is that?")
    expect(page.locator("#chat .user .message-content").last).to_have_text("And what is that?")
    before = answers(page).inner_text()
    with answering(page):
        page.get_by_role("button", name="Retry").click()
    expect(answers(page)).to_have_text(before)  # the likeliest words are the same again
    expect(page.get_by_role("button", name="Answer 2")).to_have_count(0)


def test_a_budget_is_chosen(open_page):
    page = open_page()
    slider = page.get_by_role("slider", name="Visual tokens a picture")
    expect(page.locator("#budget output")).to_have_text("4 for 36 patches, 89 % saved")
    slider.press("ArrowRight")
    expect(page.locator("#budget output")).to_have_text("9 for 36 patches, 75 % saved; the model was trained with 4")
    ask_example(page)
    expect(page.locator("#view [data-token]")).to_have_count(9)
    expect(page.locator("#view .cost")).to_contain_text("9 visual tokens from 36 patches, 75 % saved")


def test_the_slider_shows_how_often_each_budget_is_right(open_page):
    measured = space_server.make_answerer()
    rows = ((4, 0.5), (1, 0.25), (25, 0.907))
    measured.scores = [
        {"visual_tokens": count, "mean": mean, "low": mean - 0.02, "high": mean + 0.014} for count, mean in rows
    ]
    with space_server.served(measured) as address:
        page = open_page(address, viewport={"width": 390, "height": 800}, color_scheme="dark")
        curve = page.locator("#budget .curve")
        name = "Right answers by number of visual tokens: 1: 25.0%, 4: 50.0%, 25: 90.7%"
        expect(curve.get_by_role("img", name=name)).to_be_visible()
        expect(curve.locator("p")).to_have_text("At 4 tokens: 50.0% of the questions of its test (48.0 to 51.4)")
        before = curve.locator("circle").bounding_box()
        page.get_by_role("slider", name="Visual tokens a picture").press("End")
        expect(curve.locator("p")).to_have_text(
            "At 25 tokens, the nearest number measured: 90.7% of the questions of its test (88.7 to 92.1)"
        )
        after = curve.locator("circle").bounding_box()
        assert after["x"] > before["x"] + 50
        assert after["y"] < before["y"] - 10
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_note_stands_at_the_answer_with_questions_that_ask(open_page, picture_files, knowing):
    with space_server.served(knowing) as address:
        page = open_page(address, permissions=["clipboard-read", "clipboard-write"])
        ask(page, "What is <b>Paris</b>?", picture_files[:1])
        note = "The model has not learned the words “b” and “Paris”."
        answer, said = page.locator("#chat .bot-row .message-content").all_inner_texts()
        assert (said.strip(), "Paris" in answer) == (note, False)
        page.get_by_role("button", name="Copy message").last.click()
        assert page.evaluate("navigator.clipboard.readText()") == answer.strip()
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        page.locator("#chat").get_by_role("button", name=QUESTION).click()
        expect(page.locator("#chat .bot-row")).to_have_count(2)
        wait_until_done(page)
        expect(page.locator("#chat .user .message-content .md").last).to_have_text(QUESTION)
        assert page.locator("#chat").get_by_text(note).count() == 1
        expect(page.locator("#chat").get_by_role("button", name=QUESTION)).to_have_count(0)
        expect(page.get_by_role("button", name="Answer 2")).to_be_visible()
        settle(page)


@pytest.mark.parametrize(
    ("question", "files", "sentence"),
    [(QUESTION, 0, "Please add a picture first"), ("", 1, "Please type a question")],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(open_page, picture_files, question, files, sentence):
    page = open_page()
    send(page, question, picture_files[:files])
    expect(page.get_by_text(sentence)).to_be_visible()
    expect(page.locator("#ask textarea")).to_have_value(question)
    expect(page.locator("#ask .thumbnail-item")).to_have_count(files)
    expect(page.locator("#chat .message-content")).to_have_count(0)
    wait_until_done(page)


@pytest.mark.parametrize("box", ["#ask", "#compare-ask"])
def test_bad_files_are_refused_when_they_are_added(open_page, picture_files, tmp_path, box):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "heavy.png").write_bytes(bytes(pictures.MAX_FILE_MEGABYTES * 2**20 + 1))
    Image.new("1", (8000, 5001)).save(tmp_path / "wide.png")
    page = open_page()
    if box == "#compare-ask":
        page.get_by_role("tab", name="Compare").click()
    for files, sentence in [
        ([tmp_path / "text.png"], "This file cannot be read as a picture"),
        ([tmp_path / "heavy.png"], "The file is larger than 20 MB"),
        ([tmp_path / "wide.png"], "The picture has more than 40 million pixels"),
        (picture_files[:5], "at most 4 pictures to a question; these are 5"),
    ]:
        page.locator(f"{box} input[type=file]").set_input_files(files)
        expect(page.get_by_text(sentence).locator("visible=true")).to_be_visible()
        expect(page.locator(f"{box} .thumbnail-item")).to_have_count(0)
    page.locator(f"{box} input[type=file]").set_input_files([picture_files[0], tmp_path / "text.png"])
    expect(page.locator(f"{box} .thumbnail-item")).to_have_count(1)


def test_a_photograph_of_a_telephone_is_shown(open_page, tmp_path):
    tiny_models.picture(size=(60, 80)).save(tmp_path / "photograph.heic", "HEIF")
    page = open_page()
    page.locator("#ask input[type=file]").set_input_files(tmp_path / "photograph.heic")
    page.wait_for_function("document.querySelector('#ask .thumbnail-item img')?.naturalWidth === 80")
    ask(page)


WRITTEN = "1<b>  a<i>c &amp; $$x$$\n<img src=http://other.test/x>"


def test_what_people_and_models_write_is_shown_and_copied_as_it_is(open_page, picture_files, monkeypatch):
    html = space_server.make_answerer()
    reply = html.reply
    monkeypatch.setattr(html, "reply", lambda *asked: (replace(step, text=WRITTEN) for step in reply(*asked)))
    heard = []
    prepare = html.prepare
    monkeypatch.setattr(html, "prepare", lambda turns, *rest: heard.append(turns) or prepare(turns, *rest))
    with space_server.served(html) as address:
        page = open_page(address, permissions=["clipboard-read", "clipboard-write"])
        ask(page, WRITTEN, picture_files[:1])
        ask(page, "And?")
        written = page.locator("#chat .message-content .md")
        assert written.evaluate_all("all => all.map(one => one.textContent)") == [WRITTEN, WRITTEN, "And?", WRITTEN]
        assert written.locator("*").count() == 0
        assert [turn["content"][-1]["text"] for turn in heard[-1]] == [WRITTEN, WRITTEN, "And?"]
        assert page.locator("#chat [aria-label*='&lt;']").count() == 0
        page.get_by_role("button", name="Copy message").last.click()
        assert page.evaluate("navigator.clipboard.readText()") == WRITTEN
        page.get_by_role("button", name="Edit the question").click()
        expect(page.locator("#ask textarea")).to_have_value("And?")
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-ask input[type=file]").set_input_files(picture_files[0])
        page.locator("#compare-ask .thumbnail-item").wait_for()
        page.locator("#compare-ask textarea").fill(WRITTEN)
        page.locator("#compare-ask textarea").press("Enter")
        for place in ("#asked", "#answer-a", "#answer-b"):
            expect(page.locator(f"{place} textarea")).to_have_value(WRITTEN)
        wait_until_done(page, "#compare-ask")
        page.locator("#compare-ask textarea").fill("<img src=http://other.test/y>" * 20)
        page.locator("#compare-ask textarea").press("Enter")
        expect(page.get_by_text("The question has 580 characters")).to_be_visible()
        settle(page)


def test_a_question_given_back_is_as_it_was(open_page, picture_files):
    page = open_page()
    ask(page, WRITTEN, picture_files[:2])
    page.locator("#ask textarea").fill("typed since")
    page.get_by_role("button", name="Edit the question").click()
    expect(page.locator("#ask textarea")).to_have_value(f"{WRITTEN}\ntyped since")
    expect(page.locator("#ask .thumbnail-item img")).to_have_count(2)


def test_a_waiting_question_is_in_the_chat_and_what_is_typed_stays(browser, slow_address, picture_files):
    first, second = browser.new_page(), browser.new_page()
    for page in (first, second):
        listen_to_streams(page)
        page.goto(slow_address)
        page.locator("#scenes [data-scene='0']").wait_for()
    send(second, QUESTION, [])  # refused: it shows no more than that nothing is lost
    expect(second.locator("#ask textarea")).to_have_value(QUESTION)
    first.locator("#scenes [data-scene='0']").click()
    first.locator("#view .tokens").wait_for()
    second.locator("#ask input[type=file]").set_input_files(picture_files[0])
    expect(second.locator("#ask .thumbnail-item")).to_have_count(1)
    second.locator("#ask textarea").press("Enter")
    expect(second.locator("#chat .user .message-content")).to_have_text(QUESTION)
    assert second.locator("#view .tokens").count() == 0
    second.locator("#ask textarea").fill("Mine")
    second.locator("#ask input[type=file]").set_input_files(picture_files[1])
    expect(second.locator("#ask .thumbnail-item")).to_have_count(1)
    second.locator("#scenes [data-scene='1']").click()
    second.locator("#ask textarea").press("Enter")
    second.locator("#view .tokens").wait_for()
    wait_until_done(second)
    settle(second)
    expect(second.locator("#chat .user .message-content")).to_have_text([QUESTION])
    ask_example(second, 1)
    expect(second.locator("#ask textarea")).to_have_value("Mine")
    expect(second.locator("#ask .thumbnail-item")).to_have_count(1)
    for page in (first, second):
        page.close()


def test_an_example_to_compare_on_leaves_the_box_alone(open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-ask textarea").fill("Mine")
    page.locator("#compare-scenes [data-scene='1']").click()
    expect(page.locator("#asked textarea")).to_have_value("Where is the red star?")
    page.locator("#view-b .tokens").wait_for()
    wait_until_done(page, "#compare-ask")
    expect(page.locator("#compare-ask textarea")).to_have_value("Mine")
    settle(page)


def test_a_page_that_loses_its_server_says_so_and_keeps_what_was_typed(browser, answerer):
    page = browser.new_page()
    with space_server.served(answerer) as address:
        page.goto(address)
        page.locator("#scenes [data-scene='0']").click()
        page.locator("#view .tokens").wait_for()
        wait_until_done(page)
        page.locator("#ask textarea").fill("Typed <before>")
    expect(page.get_by_text("The server cannot be reached").first).to_be_visible()
    with space_server.served(answerer, server_port=urlsplit(address).port):
        expect(page.get_by_text("The page was loaded anew, and the conversation has ended").first).to_be_visible()
        expect(page.locator("#ask textarea")).to_have_value("Typed <before>")
        page.locator("#scenes [data-scene='0']").click()
        page.locator("#view .tokens").wait_for()
        wait_until_done(page)
        page.close()


def test_who_comes_when_too_many_wait_is_told_so(browser, monkeypatch, slow):
    monkeypatch.setattr(app, "QUEUE_LENGTH", 1)
    monkeypatch.setattr(settings.Settings, "max_new_tokens", settings.MAX_NEW_TOKENS)
    with space_server.served(slow) as address:
        first, second, third = (browser.new_page() for _ in range(3))
        for page in (first, second, third):
            page.goto(address)
            page.locator("#scenes [data-scene='0']").click()
            shown = {first: page.locator("#view .tokens"), second: page.get_by_text("queue: 1/1").first}
            expect(shown.get(page, page.get_by_text("This application is currently busy."))).to_be_visible()
        expect(third.locator("#chat .message-content")).to_have_count(0)
        for page in (third, second, first):
            page.close()


# --- Seeing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(open_page, answerer, picture_files):
    """A page with an answer, and the maps that it is to show."""
    page = open_page()
    ask(page, files=picture_files[:1])
    return page, answerer.look([tiny_models.picture()], settings.Settings())[0]


def heat(page, figure, patch_grid=(6, 6)):
    """A heat map's values at the centre of each patch, as shares of its largest, (rows * columns)."""
    pixels = drawn(page, figure)
    height, width = pixels.shape[0] // patch_grid[0], pixels.shape[1] // patch_grid[1]
    centres = pixels[height // 2 :: height, width // 2 :: width][: patch_grid[0], : patch_grid[1]]
    distance = np.abs(255 - centres).sum(-1).ravel()
    return (distance / distance.max()) ** 2  # a colour is as strong as the root of its value


def test_maps_show_where_each_scope_looked(seen):
    page, maps = seen
    page.get_by_text("Heat map").click()
    page.mouse.move(2, 2)
    for scope in range(3):
        np.testing.assert_allclose(
            percents(page.locator(f"#view [data-figure='{scope}'] .number").inner_text()),
            [100 * maps.weights[scope].mean()],
            atol=0.51,
        )
        assert np.corrcoef(heat(page, scope), maps.attentions[scope].mean(0))[0, 1] > 0.97
    fused = np.einsum("sm,smn->n", maps.weights, maps.attentions) / 4
    assert np.corrcoef(heat(page, "fused"), fused)[0, 1] > 0.97
    page.get_by_text("Original").click()
    np.testing.assert_array_equal(drawn(page, 0), drawn(page, "picture"))
    page.get_by_text("Overlay").click()
    faint = drawn(page, 0)
    page.get_by_role("slider", name="Opacity").press("Home")
    assert np.abs(faint - drawn(page, 0)).mean() > 1


def test_tokens_are_coloured_by_trust(seen, answerer):
    """By the scope that each trusts most above its mean over the example pictures."""
    page, maps = seen
    page.mouse.move(2, 2)
    colours = page.locator("#view [data-figure='tokens'] .legend")
    expect(colours).to_have_text("Colour: the scope that a token trusts most above its mean over the example pictures.")
    usual = answerer.usual(settings.Settings(), examples.examples_for("tiny")).in_grid((2, 2))[-1]
    above = maps.weights - usual
    cells = drawn(page, "tokens")[96::192, 96::192].reshape(4, 3)
    for token in range(4):
        colour = scope_view.PALETTE[above[:, token].argmax()]
        away, full = 255 - cells[token], 255 - np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
        strength = 0.1 + 0.9 * above[:, token].max() / above.max()
        np.testing.assert_allclose(away, strength * full, atol=3)
    page.locator("#view [data-figure='picture'] .frame").click()
    expect(colours).to_be_hidden()  # a place has tokens by attention


def test_a_token_is_picked_by_mouse_and_by_keys(seen):
    page, maps = seen
    page.get_by_text("Heat map").click()
    page.locator("#view [data-token='0']").click()
    expect(page.locator("#view [data-token='0']")).to_have_attribute("aria-pressed", "true")
    page.locator("#view [data-token='0']").press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#view [data-token='3']")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#view [data-token='3']")).to_be_focused()
    page.mouse.move(2, 2)
    expect(status(page)).to_contain_text("Token in row 2, column 2 trusts local")
    np.testing.assert_allclose(percents(status(page).inner_text()), 100 * maps.weights[:, 3], atol=0.51)
    rows, columns = np.indices((6, 6)) + 0.5
    away = np.hypot(rows / 6 - 0.75, columns / 6 - 0.75).ravel()
    for scope, reach in enumerate(measures.reach(maps)[:, 3]):
        clear = np.abs(away - reach) > 0.1  # of the ring and its number
        assert np.corrcoef(heat(page, scope)[clear], maps.attentions[scope, 3, clear])[0, 1] > 0.97
    page.locator("#view [data-token='1']").hover()
    expect(status(page)).to_contain_text("Token in row 1, column 2")
    page.mouse.move(2, 2)
    expect(status(page)).to_contain_text("Token in row 2, column 2")
    page.get_by_role("button", name="Show all tokens").click()
    expect(status(page)).to_contain_text("All 4 visual tokens")


def test_escape_lets_go_of_what_was_picked(seen):
    page, _ = seen
    for pick in ("#view [data-token='0']", "#view [data-figure='picture'] .frame"):
        page.locator(pick).click()
        page.mouse.move(2, 2)
        expect(page.get_by_role("button", name="Show all tokens")).to_be_visible()
        page.keyboard.press("Escape")
        expect(status(page)).to_contain_text("All 4 visual tokens")


def test_a_click_on_an_answer_shows_its_maps(seen):
    page, _ = seen
    ask_example(page)
    expect(page.get_by_role("button", name="Answer 2")).to_have_attribute("aria-pressed", "true")
    answers(page).first.click()
    expect(page.get_by_role("button", name="Answer 1")).to_have_attribute("aria-pressed", "true")


def test_one_token_is_one_token(open_page):
    page = open_page()
    page.get_by_role("slider", name="Visual tokens a picture").press("Home")
    ask_example(page)
    expect(page.locator("#view .cost")).to_contain_text("1 visual token from 36 patches")
    expect(status(page)).to_contain_text("The only visual token")
    page.locator("#view [data-figure='picture'] .frame").click()
    page.mouse.move(2, 2)
    expect(status(page)).to_contain_text("is read most by the token in row 1")
    assert "1 visual tokens" not in page.locator("body").inner_text()


def test_a_place_in_the_picture_shows_who_read_it(seen):
    page, maps = seen
    frame = page.get_by_role("application", name="Places in the picture")
    box = frame.bounding_box()
    frame.click(position={"x": box["width"] * 4.5 / 6, "y": box["height"] * 1.5 / 6})
    patch = 1 * 6 + 4
    page.mouse.move(2, 2)
    expect(status(page)).to_contain_text("Place in row 2, column 5")
    read = (maps.weights * maps.attentions[:, :, patch]).sum(0)
    most = np.argsort(-read)[:3]
    said = re.findall(r"row (\d), column (\d) \(([\d.]+) %\)", status(page).inner_text())
    assert [(int(row) - 1) * 2 + int(column) - 1 for row, column, _ in said] == most.tolist()
    np.testing.assert_allclose([float(share) for *_, share in said], 100 * read[most] / read.sum(), atol=0.6)
    frame.focus()
    page.keyboard.press("ArrowDown")  # from the middle, where the cursor began
    expect(status(page)).to_contain_text("Place in row 5, column 1")


def test_the_words_of_an_answer_are_played(seen, answerer):
    page, _ = seen
    text = answers(page).inner_text()
    everything = drawn(page, "tokens")
    page.get_by_role("button", name="Play the words").click()
    expect(page.locator("#view [data-word]")).to_have_count(len(text.split()))
    assert page.locator("#view [data-word]").all_inner_texts() == text.split()
    page.locator("#view [data-word]").last.click()
    page.mouse.move(2, 2)
    content = [{"type": "image", "image": tiny_models.picture()}, {"type": "text", "text": QUESTION}]
    prompt = answerer.prepare([{"role": "user", "content": content}], [tiny_models.picture()], settings.Settings())
    word = answerer.attend(prompt, text)[-1]
    expect(status(page)).to_contain_text(f"“{word.text}” gave")
    np.testing.assert_allclose(percents(status(page).inner_text())[0], 100 * word.shares.sum(), atol=0.6)
    assert not np.array_equal(drawn(page, "tokens"), everything)


def test_the_maps_are_saved_as_one_picture(seen, tmp_path):
    page, _ = seen
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    download.value.save_as(tmp_path / "scopes.png")
    with Image.open(tmp_path / "scopes.png") as sheet:
        assert sheet.size == (3 * 384 + 4 * 24, 24 + 2 * (384 + 34 + 24) + 34)
        corner = np.asarray(sheet.convert("RGB")).astype(float)[24 + 34 : 24 + 34 + 384, 24 : 24 + 384]
    np.testing.assert_array_equal(corner, drawn(page, "picture"))


def test_maps_that_cannot_be_shown_do_not_keep_those_after_them_away(browser, address, monkeypatch):
    page = browser.new_page()
    listen_to_streams(page)
    page.goto(address)
    with monkeypatch.context() as broken, page.expect_console_message(lambda message: "decode" in message.text):
        broken.setattr(scope_view, "data_url", lambda picture: "data:image/webp;base64,AAAA")
        page.locator("#scenes [data-scene='0']").click()
        expect(answers(page)).to_have_count(1)
        wait_until_done(page)
    expect(page.locator("#view .tokens")).to_have_count(0)
    ask_example(page, 1)
    page.close()


def test_a_projector_without_scopes_says_so(open_page):
    peer = space_server.make_answerer(projector={"projector_type": "avg_pool"})
    with space_server.served(peer) as address:
        page = open_page(address)
        ask_example(page)
        expect(page.get_by_text("The projector of this model, avg_pool, has no scopes")).to_be_visible()
        expect(page.locator("#view [data-figure]")).to_have_count(2)
        expect(page.get_by_role("application")).to_have_count(0)
        expect(page.locator("#view [data-figure='picture'] [tabindex]")).to_have_count(0)
        page.get_by_role("button", name="Play the words").click()
        expect(status(page)).to_contain_text("of its attention to the picture")


def test_a_scope_that_takes_all_the_trust_is_named(open_page, monkeypatch):
    one_sided = space_server.make_answerer()
    original = one_sided._maps_of

    def all_to_the_second(*args):
        maps = original(*args)
        maps.weights[:] = np.array([[0.02], [0.97], [0.01]])
        return maps

    monkeypatch.setattr(one_sided, "_maps_of", all_to_the_second)
    with space_server.served(one_sided) as address:
        page = open_page(address)
        ask_example(page)
        expect(page.get_by_text("Here the regional scope took nearly all the trust")).to_be_visible()


# --- The first sight ----------------------------------------------------------------------------------------------


def test_the_page_opens_with_an_answer_that_plays_once_and_a_token(open_page, answerer, address):
    with space_server.served(answerer, opening=True) as alive:
        page = open_page(alive)
        assert str(space_server.SPACE) not in page.request.get(f"{alive}/config").text()
        expect(page.locator("#chat .user .message-content")).to_have_text("What is in the picture?")
        expect(page.get_by_role("button", name="■ Stop")).to_be_visible()
        expect(page.locator("#view [data-word][aria-pressed=true]")).to_have_count(1)
        expect(page.get_by_role("button", name="▶ Play the words")).to_be_visible()
        expect(status(page)).to_contain_text("Token in row")
        still = open_page(alive, reduced_motion="reduce")
        expect(status(still)).to_contain_text("Token in row")
        expect(still.get_by_role("button", name="■ Stop")).to_have_count(0)
        ask(still)  # about the picture that is there
        expect(answers(still)).to_have_count(2)


def test_the_tour_is_shown_once_and_comes_back(open_page):
    page = open_page()
    tour, begin = page.get_by_role("region", name="Tour"), page.get_by_role("button", name="What are tokens")
    for said in ("A patch is a small square of the picture, one of 36.", "A scope is how far", "The budget is"):
        expect(tour).to_contain_text(said)
        tour.get_by_role("button", name=re.compile("Next|Done")).click()
    expect(tour).to_be_hidden()
    expect(begin).to_be_focused()
    page.reload()
    begin.click()
    expect(tour).to_contain_text("1 of 3")
    page.keyboard.press("Escape")
    expect(tour).to_be_hidden()


def test_a_scope_s_reach_is_a_ring_a_sentence_and_a_number(seen):
    page, maps = seen
    page.locator("#view [data-token='3']").click()
    page.mouse.move(2, 2)
    reach, bits = measures.reach(maps)[:, 3], measures.entropy(maps)[:, 3]
    said = re.fullmatch(
        r"How far: local looks ([\d.]+) of the picture’s width away, regional ([\d.]+) and global ([\d.]+)\.",
        page.locator("#view .reach").inner_text(),
    )
    np.testing.assert_allclose([float(number) for number in said.groups()], reach, atol=0.0051)
    page.get_by_text("Numbers").click()
    expect(page.locator("#view .numbers tbody tr")).to_have_count(3)
    rows = page.locator("#view .numbers tbody tr").all_inner_texts()
    np.testing.assert_allclose([float(re.search(r"([\d.]+) bits", row)[1]) for row in rows], bits, atol=0.0051)
    pixels = drawn(page, "picture")
    for scope, away in enumerate(reach):
        colour = [int(scope_view.PALETTE[scope][place : place + 2], 16) for place in (1, 3, 5)]
        rows, columns = np.nonzero(np.abs(pixels - colour).max(-1) < 3)
        distance = np.hypot(rows + 0.5 - 0.75 * 384, columns + 0.5 - 0.75 * 384) / 384
        assert (np.abs(distance - away) < 0.008).mean() > 0.5  # the rest frames the number, or is of the picture


def choose(page, what, option):
    page.get_by_role("combobox", name=what).select_option(option)
    expect(page.locator("#view [aria-busy]")).to_have_count(0)


def test_a_layer_and_a_head_are_chosen_for_maps_and_for_words(open_page, picture_files):
    deep = space_server.make_answerer(projector={"num_hidden_layers": 2, "scope_heads": [2, 1, 1]})
    with space_server.served(deep) as address:
        page = open_page(address)
        ask(page, files=picture_files[:1])
        page.locator("#view [data-token='3']").click()
        page.get_by_text("Numbers", exact=True).click()
        rows = page.locator("#view .numbers tbody tr")
        expect(rows).to_have_count(3)
        before, content = rows.all_inner_texts(), [{"type": "text", "text": QUESTION}]
        content[:0] = [{"type": "image", "image": tiny_models.picture()}]
        asked = [{"role": "user", "content": content}], [tiny_models.picture()]
        prompt = deep.prepare(*asked, settings.Settings())
        maps, layers = deep.by_layer(prompt, 0)
        choose(page, "Layer of the maps", "layer 1")
        choose(page, "Head of the maps", "local 2")
        expect(page.locator("#view .note").last).to_contain_text("the projector’s layer 1, by head 2 of local.")
        shown = layers[0].within(maps, 0, 1)
        bits, reach = measures.entropy(shown)[:, 3], measures.reach(shown)[:, 3]
        told = [re.search(r"([\d.]+)\s+([\d.]+) bits", row).groups() for row in rows.all_inner_texts()]
        np.testing.assert_allclose(np.array(told, dtype=float), np.stack([reach, bits], axis=1), atol=0.0051)
        choose(page, "Layer of the maps", "layer 2")
        choose(page, "Head of the maps", "mean over heads")
        expect(page.locator("#view .note")).to_have_count(0)
        assert rows.all_inner_texts() == before
        choose(page, "Layer of the words", "layer 2")
        choose(page, "Head of the words", "head 3")
        expect(page.locator("#view .note")).to_contain_text("as in layer 2, head 3 of the language model.")
        word = deep.attend(prompt, answers(page).inner_text(), 1, 2)[0]
        page.locator("#view [data-word='0']").click()
        read = word.shares / word.shares.sum()
        bits = f"entropy {-(read * np.log2(read)).sum():.2f} bits of 2.00"
        expect(page.locator("#view .spoken")).to_contain_text(bits)
        settle(page)


def test_scopes_are_shown_on_one_scale_and_by_what_differs(seen):
    page, maps = seen
    page.mouse.move(2, 2)
    peaks = page.locator("#view .peak").all_inner_texts()
    assert set(peaks) == {f"{100 * maps.attentions.mean(1).max():.0f} %"}
    together = drawn(page, 0)
    page.get_by_text("Difference").click()
    differs = maps.attentions.mean(1) - maps.attentions.mean((0, 1))
    assert set(page.locator("#view .peak").all_inner_texts()) == {f"{100 * np.abs(differs).max():.0f} %"}
    assert np.abs(drawn(page, 0) - together).mean() > 1


# --- Proof ----------------------------------------------------------------------------------------------------------


def test_the_question_is_asked_again_without_what_was_read(seen, answerer, monkeypatch):
    page, maps = seen
    asked, proofs = [], [proof.Proof(0.5, 0.0002, "abc"), proof.Proof(0.5, 0.25, answers(page).inner_text())]

    def prove(prompt, answer, change):
        asked.append((answer, change))
        return proofs[len(asked) - 1]

    monkeypatch.setattr(answerer, "prove", prove)
    before, text = drawn(page, "picture"), answers(page).inner_text()
    page.locator("#view [data-token='1']").click()
    page.get_by_role("button", name="cover what this token read most").click()
    fused = (maps.weights[:, 1, None] * maps.attentions[:, 1]).sum(0)
    order = np.argsort(-fused)
    most = order[: np.searchsorted(np.cumsum(fused[order]), fused.sum() / 2) + 1].tolist()
    lines = page.locator("#view .proofs li")
    expect(lines).to_have_text(
        [f"With {len(most)} patches covered: the answer’s probability went from 50 % to 1 in 5,000; now it says “abc”."]
    )
    page.mouse.move(2, 2)
    grey = np.abs(drawn(page, "picture") - 0x8C).max(-1) < 1
    assert 0.5 < grey.mean() / (len(most) / 36) <= 1  # stripes, the token's frame, rings and the numbers are on it
    assert (np.abs(before - 0x8C).max(-1) < 1).mean() < 0.01
    page.get_by_role("button", name="without local").click()
    expect(lines.nth(1)).to_have_text(
        "Without local: the answer’s probability went from 50 % to 25 %; it is still the answer."
    )
    expect(page.get_by_role("button", name="without local")).to_be_focused()
    assert asked == [(text, proof.Change(0, tuple(most))), (text, proof.Change(scope=0))]


def test_maps_are_downloaded_and_a_link_brings_a_view_back(open_page, answerer, tmp_path):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("slider", name="Visual tokens a picture").press("ArrowRight")
    ask_example(page, 1)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as npz").click()
    download.value.save_as(tmp_path / "scopes.npz")
    arrays = np.load(tmp_path / "scopes.npz")
    assert arrays["attentions_0"].shape == (3, 9, 36)
    page.locator("#view [data-token='5']").click()
    page.get_by_text("Heat map").click()
    page.get_by_role("button", name="Copy a link to this view").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    again = open_page(page.evaluate("navigator.clipboard.readText()"))
    expect(status(again)).to_contain_text("Token in row 2, column 3")
    expect(again.locator("#view [data-token]")).to_have_count(9)
    expect(again.get_by_role("radio", name="Heat map")).to_be_checked()
    expect(again.locator("#chat .user .message-content")).to_have_text("Where is the red star?")
    settle(again)


def test_a_new_scene_is_marked_and_counted_on_both_pages(open_page, answerer, monkeypatch):
    reply = answerer.reply
    truthful = [True, False, True, False]

    def told(prompt, wanted):
        said = "yes, no, 0, 1" if truthful.pop() else "?"
        return (replace(step, text=said) for step in reply(prompt, wanted))

    monkeypatch.setattr(answerer, "reply", told)
    monkeypatch.setattr("examples.is_right", lambda answer, truth: answer != "?")
    page = open_page()
    for line in ("The answer is wrong: the truth is “", "The answer is right. 1 of 2 answers are right so far."):
        with answering(page):
            page.get_by_role("button", name="A new scene").click()
        expect(page.locator("#view .verdict")).to_contain_text(line)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-scenes").get_by_role("button", name="A new scene").click()
    expect(page.locator("#view-a .verdict")).to_contain_text("The answer is wrong")
    expect(page.locator("#view-b .verdict")).to_contain_text("The answer is right")
    wait_until_done(page, "#compare-ask")
    settle(page)


# --- Large pictures ---------------------------------------------------------------------------------------------


@pytest.fixture
def large_file(tmp_path):
    tiny_models.picture(size=(48, 72)).save(tmp_path / "large.png")
    return tmp_path / "large.png"


def choose_tiles(page, count, choice="#tiles"):
    page.locator(f"{choice} label", has_text=f"up to {count}").click()
    expect(page.locator(f"{choice} input:checked")).to_have_value(str(count))


def test_a_large_picture_is_seen_whole_and_so_are_its_tokens(open_page, answerer, large_file):
    page = open_page()
    slider = page.get_by_role("slider", name="Visual tokens a picture")
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    choose_tiles(page, 9)
    ask(page, files=[large_file])
    (maps,) = answerer.look([tiny_models.picture(size=(48, 72))], settings.Settings(visual_tokens=16, tiles=9))
    assert (maps.patch_grid, maps.overview_grid) == ((12, 18), (2, 2))
    expect(page.locator("#view .cost")).to_contain_text("16 visual tokens from 216 patches")
    expect(page.locator("#view [data-figure='picture'] .number")).to_have_text("in 2 × 3 tiles, 72 × 48")
    seen = np.asarray(tiny_models.picture(size=(48, 72)).resize((384, 256), Image.Resampling.LANCZOS)).astype(float)
    assert drawn(page, "picture").shape == seen.shape
    assert np.corrcoef(drawn(page, "picture").ravel(), seen.ravel())[0, 1] > 0.9
    page.get_by_text("Heat map").click()
    page.mouse.move(2, 2)
    rows, columns = (((np.arange(side) + 0.5) * 64 / 3).astype(int) for side in maps.patch_grid)
    for scope in range(3):
        coloured = np.abs(255 - drawn(page, scope)[rows][:, columns]).sum(-1).ravel()
        assert np.corrcoef(coloured**2, maps.attentions[scope].mean(0))[0, 1] > 0.95
    overview = page.get_by_role("group", name="Visual tokens of the overview")
    expect(overview.get_by_role("button")).to_have_count(4)
    overview.get_by_role("button").last.click()
    page.mouse.move(2, 2)
    expect(status(page)).to_contain_text("Token in row 2, column 2 of the overview trusts local")
    np.testing.assert_allclose(percents(status(page).inner_text()), 100 * maps.weights[:, 3], atol=0.51)
    page.locator("#view [data-token='4']").click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#view [data-token='5']")).to_have_attribute("aria-pressed", "true")
    page.mouse.move(2, 2)
    expect(status(page)).to_contain_text("Token in row 1, column 2 trusts local")
    np.testing.assert_allclose(percents(status(page).inner_text()), 100 * maps.weights[:, 5], atol=0.51)
    page.locator("#view [data-figure='picture'] .frame").click(position={"x": 2, "y": 2})
    expect(status(page)).to_contain_text("Place in row 1, column 1")
    page.get_by_role("button", name="cover this place").click()
    expect(page.locator("#view .proofs li")).to_contain_text("With 4 patches covered")
    settle(page)


def test_the_same_question_with_one_tile_and_with_nine(open_page, large_file):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    choose_tiles(page, 9, "#tiles-b")
    for side in "AB":
        page.get_by_role("slider", name=f"{side}, visual tokens").press("End")  # 36
    page.locator("#compare-ask input[type=file]").set_input_files(large_file)
    page.locator("#compare-ask .thumbnail-item").wait_for()
    page.locator("#compare-ask textarea").fill(QUESTION)
    page.locator("#compare-ask textarea").press("Enter")
    expect(page.locator("#view-b .cost")).to_contain_text("36 visual tokens from 216 patches")
    wait_until_done(page, "#compare-ask")
    expect(page.locator("#view-a .cost")).to_contain_text("36 visual tokens from 36 patches")
    expect(page.locator("#view-a [data-figure='overview']")).to_have_count(0)
    seen = page.locator("#view-b [data-figure='overview'] [data-token]").count()
    assert 0 < seen < 36
    page.locator("#view-a [data-token='35']").click()
    page.mouse.move(2, 2)
    expect(page.locator("#view-b [data-token='35']")).to_have_attribute("aria-pressed", "true")  # at the same place
    page.locator("#view-b [data-token='0']").click()  # of the overview
    expect(page.locator("#view-a [aria-pressed=true][data-token]")).to_have_count(1)
    settle(page)


def test_a_link_brings_back_tiles_layers_and_heads(open_page):
    deep = space_server.make_answerer(projector={"num_hidden_layers": 2, "scope_heads": [2, 1, 1]})
    with space_server.served(deep) as address:
        page = open_page(address, permissions=["clipboard-read", "clipboard-write"])
        page.get_by_role("slider", name="Visual tokens a picture").press("End")
        choose_tiles(page, 4)
        ask_example(page, 1)
        page.get_by_text("Numbers", exact=True).click()
        choose(page, "Layer of the maps", "layer 1")
        choose(page, "Head of the maps", "local 2")
        choose(page, "Head of the words", "head 3")
        page.locator("#view [data-token='20']").click()
        page.mouse.move(2, 2)
        told = page.locator("#view .note").last.inner_text()
        assert "layer 1, by head 2 of local; the words attend as in head 3 of the language model" in told
        rows = page.locator("#view .numbers tbody tr").all_inner_texts()
        page.get_by_role("button", name="Copy a link to this view").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        again = open_page(page.evaluate("navigator.clipboard.readText()"))
        expect(again.locator("#view .note").last).to_have_text(told)
        expect(again.locator("#view [aria-busy]")).to_have_count(0)
        expect(again.locator("#tiles input:checked")).to_have_value("4")
        expect(again.get_by_role("combobox", name="Head of the maps")).to_have_value("0,1")
        expect(again.get_by_role("combobox", name="Head of the words")).to_have_value("2")
        expect(again.locator("#view [data-token='20']")).to_have_attribute("aria-pressed", "true")
        assert again.locator("#view .numbers tbody tr").all_inner_texts() == rows
        settle(again)


# --- Comparing --------------------------------------------------------------------------------------------------


def test_a_note_stands_at_both_answers_that_are_compared(open_page, picture_files, knowing):
    with space_server.served(knowing) as address:
        page = open_page(address)
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-ask input[type=file]").set_input_files(picture_files[0])
        page.locator("#compare-ask .thumbnail-item").wait_for()
        page.locator("#compare-ask textarea").fill("What is <b>Paris</b>?")
        page.locator("#compare-ask textarea").press("Enter")
        note = page.get_by_role("group", name="Note on the answer")
        expect(note.locator("p")).to_have_text(["The model has not learned the words “b” and “Paris”."] * 2)
        wait_until_done(page, "#compare-ask")
        assert serious(page) == []
        note.last.get_by_role("button", name=QUESTION).click()
        expect(page.get_by_label("Question", exact=True)).to_have_value(QUESTION)
        wait_until_done(page, "#compare-ask")
        expect(note).to_have_count(0)
        settle(page)


def test_two_budgets_are_compared(open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("slider", name="B, visual tokens").press("End")
    page.locator("#compare-scenes [data-scene='1']").click()
    expect(page.locator("#view-b [data-token]")).to_have_count(36)
    expect(page.locator("#view-a [data-token]")).to_have_count(4)
    wait_until_done(page, "#compare-ask")
    expect(page.locator("#view-b .cost")).to_contain_text("36 visual tokens from 36 patches · read")
    one, other = (page.get_by_label(f"{side} answers").input_value() for side in "AB")
    assert one
    assert other
    assert one != other
    page.locator("#view-a [data-token='3']").click()
    page.mouse.move(2, 2)
    expect(status(page, "#view-a")).to_contain_text("Token in row 2, column 2")
    expect(status(page, "#view-b")).to_contain_text("Token in row 5, column 5")  # at the same place
    expect(page.locator("#view-b [data-figure='versus'] .peak")).to_contain_text("more in B")
    page.locator("#view-b .play").click()
    for side in "ab":
        expect(page.locator(f"#view-{side} .play")).to_have_text("■ Stop")
    tops = [page.locator(f"#view-{side} [data-figure='picture']").bounding_box()["y"] for side in "ab"]
    assert abs(tops[0] - tops[1]) < 30


def test_three_budgets_answer_in_a_row_and_tokens_are_dropped(open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("radio", name="DivPrune").check()
    expect(page.locator("#about-b")).to_have_text(
        "What stays: The tokens that are least alike, in raster order (DivPrune, arXiv 2503.02175)."
    )
    expect(page.locator("#budget-b output")).to_contain_text("1 for 36 patches")
    page.get_by_role("checkbox", name="Also ask A with 1, 4 and 36 visual tokens").check()
    page.locator("#compare-scenes [data-scene='1']").click()
    expect(page.locator("#view-b .cost")).to_contain_text("1 visual token from 36 patches")
    expect(page.locator("#budgets-in-a-row p")).to_have_count(3)
    rows = page.locator("#budgets-in-a-row p").all_inner_texts()
    said = " ".join(page.get_by_label("A answers").input_value().split())  # as texts are shown
    assert rows[1] == f"4 visual tokens: {said} ✗"
    wait_until_done(page, "#compare-ask")
    settle(page)


def test_a_method_in_the_layers_shows_why_there_are_no_words(open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("radio", name="FitPrune").check()
    expect(page.get_by_label("B: tiny with FitPrune answers")).to_have_value("")
    page.locator("#compare-scenes [data-scene='1']").click()
    expect(page.locator("#view-b .note", has_text="FitPrune drops tokens between")).to_be_visible()
    wait_until_done(page, "#compare-ask")
    expect(page.locator("#view-b [data-word]")).to_have_count(0)
    expect(page.locator("#view-a [data-word]")).not_to_have_count(0)
    expect(page.locator("#view-b [data-figure='fused'] canvas")).to_be_visible()  # the scopes looked as they do
    page.get_by_role("radio", name="tiny", exact=True).check()
    expect(page.locator("#about-b")).to_have_text("")
    settle(page)


def test_two_models_are_compared(open_page, answerer, picture_files):
    other = space_server.make_answerer(projector={"projector_type": "avg_pool"})
    other.name = "average"
    with space_server.served(answerer, other) as address:
        page = open_page(address)
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-ask input[type=file]").set_input_files(picture_files[0])
        page.locator("#compare-ask .thumbnail-item").wait_for()
        page.locator("#compare-ask textarea").fill(QUESTION)
        page.locator("#compare-ask textarea").press("Enter")
        expect(page.locator("#view-b").get_by_text("has no scopes")).to_be_visible()
        wait_until_done(page, "#compare-ask")
        expect(page.locator("#view-a [data-figure]")).to_have_count(6)
        for name in ("A: tiny answers", "B: average answers"):
            assert page.get_by_label(name).input_value()
        page.get_by_role("radio", name="tiny", exact=True).check()
        expect(page.get_by_label("B: tiny answers")).to_have_value("")
        expect(page.locator("#budget-b output")).to_contain_text("1 for 36 patches")
        page.locator("#compare-scenes [data-scene='1']").click()
        expect(page.locator("#view-b [data-token]")).to_have_count(1)
        expect(page.locator("#view-b [data-figure]")).to_have_count(7)  # one shows how it differs from A
        wait_until_done(page, "#compare-ask")
        settle(page)  # before the server ends


def test_another_model_brings_its_own_budgets_and_scopes(open_page, answerer):
    other = space_server.make_answerer(tower_changes={"image_size": 32}, projector={"projector_type": "avg_pool"})
    other.name = "average"
    with space_server.served(answerer, other) as address:
        page = open_page(address)
        page.get_by_role("tab", name="Compare").click()
        slider, said = page.get_by_role("slider", name="B, visual tokens"), page.locator("#budget-b output")
        expect(said).to_have_text("4 for 64 patches, 94 % saved")
        expect(page.locator("#view-b figure")).to_have_count(2)
        for name, patches, figures in [("tiny", 36, 6), ("average", 64, 2)]:
            page.get_by_role("radio", name=name, exact=True).check()
            expect(page.locator("#view-b figure")).to_have_count(figures)
            slider.press("End")
            expect(said).to_have_text(f"{patches} for {patches} patches, 0 % saved; the model was trained with 4")


def test_another_model_ends_the_comparison_with_the_one_before(open_page, slow):
    other = space_server.slowed(space_server.make_answerer(), SECONDS_A_TOKEN)
    other.name = "other"
    with space_server.served(slow, other) as address:
        page = open_page(address)
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-scenes [data-scene='0']").click()
        page.locator("#view-b .tokens").wait_for()
        page.get_by_role("radio", name="tiny", exact=True).check()
        wait_until_done(page, "#compare-ask")
        page.wait_for_timeout(1000 * 10 * SECONDS_A_TOKEN)  # words that were under way
        expect(page.get_by_label("B: tiny answers")).to_have_value("")
        expect(page.locator("#view-b .tokens")).to_have_count(0)


# --- For everyone, everywhere -----------------------------------------------------------------------------------


def serious(page):
    """What axe finds that keeps people out."""
    page.wait_for_timeout(400)  # what fades in has its full contrast
    return [
        (finding["id"], finding["nodes"][0]["html"])
        for finding in Axe().run(page).response["violations"]
        if finding["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, scheme):
    page = open_page(color_scheme=scheme)
    found = []
    for act in (
        lambda: None,
        lambda: ask_example(page, 3),
        lambda: page.locator("#view").get_by_text("Numbers", exact=True).click(),
        lambda: page.get_by_role("button", name="More settings").click(),
        lambda: page.get_by_role("tab", name="Compare").click(),
        lambda: page.locator("#compare-scenes [data-scene='2']").click(),
        lambda: page.locator("#view-b .tokens").wait_for(),
    ):
        act()
        found += serious(page)
    wait_until_done(page, "#compare-ask")
    assert found == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_where_two_models_are_compared(open_page, answerer, scheme):
    other = space_server.make_answerer(projector={"projector_type": "resampler"})
    other.name = "one_scope"
    with space_server.served(answerer, other) as address:
        page = open_page(address, color_scheme=scheme)
        page.get_by_role("tab", name="Compare").click()
        expect(page.get_by_role("radio", name="one_scope")).to_be_checked()
        found = serious(page)
        page.locator("#compare-scenes [data-scene='2']").click()
        page.locator("#view-b .tokens").wait_for()
        wait_until_done(page, "#compare-ask")
        assert found + serious(page) == []


def test_the_accessibility_tree_names_what_matters(open_page):
    page = open_page()
    ask_example(page)
    expect(page.locator(".talk")).to_match_aria_snapshot("""
      - button "Clear"
      - log "chatbot conversation":
        - button "The picture asked about"
        - button "Copy message"
        - button "Retry"
        - button "Edit the question"
      - group "Multimedia input field":
        - button "Upload a file"
        - textbox "Your question"
        - button "Submit"
      - slider "Visual tokens a picture"
      - heading "Or ask about one of these" [level=2]
      - button "More settings ▼"
      - button "Camera ▼"
    """)
    expect(page.get_by_role("region", name="Maps", exact=True)).to_match_aria_snapshot("""
      - heading "What each scope looked at" [level=2]
      - group "Words of the answer":
        - button "▶ Play the words"
      - figure:
        - application "Places in the picture. Arrow keys move over its patches and show which tokens read them":
          - img "The picture as the model saw it"
      - figure:
        - group "Visual tokens":
          - button /Token in row 1, column 1/
      - figure:
        - img "Where the tokens looked, all scopes, fused"
      - figure:
        - img "Where the tokens looked, local"
      - figure:
        - img "Where the tokens looked, regional"
      - figure:
        - img "Where the tokens looked, global"
      - group "Show":
        - radio "Original"
        - radio "Overlay" [checked]
        - radio "Heat map"
        - radio "Difference"
      - slider "Opacity"
      - group "Save":
        - button "Save as PNG"
        - button "Save as npz"
        - button "Save as json"
      - button "Copy a link to this view"
      - group "Ask again":
        - button "without local"
        - button "without regional"
        - button "without global"
    """)
    nameless = page.locator("img:not([alt]), img[alt='']").locator("visible=true")
    assert nameless.evaluate_all("all => all.filter(i => !i.closest('footer')).map(i => i.outerHTML)") == []


def test_keys_lead_through_the_page_in_reading_order(open_page):
    page = open_page()
    ask_example(page)
    page.locator("#ask textarea").focus()
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                """() => {
                  const e = document.activeElement, outline = getComputedStyle(e).outlineStyle;
                  const label = e.closest('label') || e;
                  const name = e.dataset.scene && 'scene' || e.dataset.focus || e.type;
                  return [name, outline + getComputedStyle(label).outlineStyle];
                }"""
            )
        )
    names = [name for name, _ in order]
    wanted = ["range", "scene", "play", "picture", "token0", "overlay"]
    places = [names.index(name) for name in wanted]
    assert places == sorted(places)
    assert all("solid" in outline or "auto" in outline for name, outline in order if name in wanted), order


@pytest.mark.parametrize("width", [390, 768, 2560])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits(open_page, scheme, width):
    page = open_page(viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce")
    ask_example(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in page.locator("#view canvas, #view button, #view input, #ask, #budget input").all():
        place = box.bounding_box()
        if place:
            assert place["x"] >= 0
            assert place["x"] + place["width"] <= width
    moving = "all => all.filter(e => parseFloat(getComputedStyle(e).transitionDuration) > 0).length"
    assert page.locator("#view *, #scenes *").evaluate_all(moving) == 0


def test_a_narrow_page_begins_with_the_examples_and_goes_to_the_answer(open_page):
    page = open_page(viewport={"width": 390, "height": 844})
    top = {place: page.locator(place).bounding_box()["y"] for place in ("#scenes", "#chat", "#ask")}
    assert top["#scenes"] < min(top["#chat"], top["#ask"])
    ask_example(page)
    expect(answers(page)).to_be_in_viewport()
    page.get_by_role("button", name="Play the words").click()
    page.locator("#view [data-word]").first.wait_for()
    for button in page.locator("#view .words button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 44


@pytest.mark.parametrize("width", [390, 1280])
def test_the_footer_has_no_dividers_without_neighbours(open_page, width):
    page = open_page(viewport={"width": width, "height": 844})
    expect(page.locator("footer").get_by_role("button", name="Settings")).to_be_visible()
    expect(page.locator("footer .divider").locator("visible=true")).to_have_count(0)


def test_all_scopes_tell_their_trust_where_it_is_narrow(open_page):
    four = space_server.make_answerer(projector={"scope_sigmas": [0.3, 0.5, 1.5, None]})
    with space_server.served(four) as address:
        page = open_page(address, viewport={"width": 390, "height": 844})
        ask_example(page)
        for scope in range(4):
            expect(page.locator(f"#view [data-figure='{scope}'] .number")).to_be_visible()


def test_the_page_works_behind_a_path_of_a_proxy(open_page, answerer):
    with tiny_proxy.proxy("/models/scopes") as (front, connect), space_server.served(answerer, root_path=front) as own:
        connect(own)
        page = open_page(f"{front}/")
        requested = []
        page.on("request", lambda request: requested.append(request.url))
        ask_example(page)
        assert [url for url in requested if not url.startswith((front, "data:", "blob:"))] == []
        page.close()
