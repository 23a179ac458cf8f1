"""The page in headless Chromium; skipped if there is none."""

import shutil
import time

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

# Puts a file into what a drop or a paste brings, as a hand would.
BRING = """([kind, name, type, content]) => {
    const data = new DataTransfer();
    data.items.add(new File([Uint8Array.from(content)], name, { type }));
    const settings = { bubbles: true, cancelable: true };
    const event = kind === "drop" ? new DragEvent(kind, { ...settings, dataTransfer: data })
        : new ClipboardEvent(kind, { ...settings, clipboardData: data });
    document.getElementById("drop").dispatchEvent(event);
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield own
        own.close()


@pytest.fixture
def visit(browser, served):
    """Opens the page; at the end there must have been no complaint, and nothing asked of other hosts."""
    complaints, asked, contexts = [], [], []

    def opened(**settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{served.port}/")
        until(page, "document.getElementById('seen').textContent")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    own = (f"http://127.0.0.1:{served.port}/", f"blob:http://127.0.0.1:{served.port}/")
    assert [url for url in asked if not url.startswith(own)] == []


def until(page, expression):
    """Wait for a value that is true; Playwright's own waiting is what the page's security policy forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def bring(page, kind, content, name="digit.png", type_="image/png"):
    page.evaluate(BRING, [kind, name, type_, list(content)])


def shown(page):
    page.wait_for_selector("#result:not([hidden]):not(.stale)")


def widths(page, bars):
    """Of the coloured part of each bar, over the whole bar."""
    page.wait_for_timeout(600)  # they grow
    return page.eval_on_selector_all(
        bars,
        "all => all.map(bar => parseFloat(getComputedStyle(bar, '::before').width)"
        " / bar.getBoundingClientRect().width)",
    )


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_an_image_brought_is_answered_and_every_bar_drawn(visit, served, make_image, screen, kind):
    content = make_image(7)
    answer = served.predict(content)[2]
    page = visit(**screen)
    bring(page, kind, content)
    shown(page)
    assert page.inner_text("#class") == answer["class"]
    assert page.inner_text("#share") == f"{100 * answer['probability']:.1f} %"
    rest = 1 - sum(one["probability"] for one in answer["probabilities"])
    ensemble = [*(one["probability"] for one in answer["probabilities"]), rest]
    assert widths(page, "#ensemble .bar") == pytest.approx(ensemble, abs=0.01)
    rows = zip(*(exit_["probabilities"] for exit_ in answer["exits"]), strict=True)
    exits = [share for row in rows for share in row]
    exits += [1 - sum(exit_["probabilities"]) for exit_ in answer["exits"]]
    assert widths(page, "#exits .bar") == pytest.approx(exits, abs=0.01)
    assert len(widths(page, "#uncertainty .bar")) == 2
    for exit_, told in zip(answer["exits"], page.locator("#exits .vote").all_inner_texts(), strict=True):
        assert told.startswith(exit_["class"])
    assert f"entropy {answer['entropy']:.3f} nats" in page.inner_text("#uncertainty")
    assert page.evaluate("document.getElementById('preview').naturalWidth") == 8
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_chosen_file_and_then_another(visit, served, make_image):
    page = visit()
    for number in (1, 2):
        content = make_image(number)
        page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": content})
        answer = served.predict(content)[2]
        until(page, f"document.getElementById('summary').textContent.startsWith('{answer['class']}, ')")
        assert page.inner_text("#share") == f"{100 * answer['probability']:.1f} %"


def test_a_picture_from_the_camera(visit):
    page = visit()
    page.click("#start")
    until(page, "document.getElementById('video').videoWidth")
    page.click("#take")
    shown(page)
    assert page.is_hidden("#camera")
    assert page.evaluate("document.getElementById('video').srcObject") is None


def test_what_is_no_image_or_too_large_is_told_and_the_page_goes_on(visit, make_image, browser, served):
    page = browser.new_page()  # whose console tells of the status 415
    page.goto(f"http://127.0.0.1:{served.port}/")
    until(page, "document.getElementById('seen').textContent")
    bring(page, "drop", b"hello", "notes.txt", "text/plain")
    page.wait_for_selector("#error:not([hidden])")
    assert "notes.txt: image must be a BMP, GIF" in page.inner_text("#error")
    bring(page, "drop", bytes(200_001), "large.png")
    until(page, "document.getElementById('error').textContent.includes('large.png has 0.2 MB')")
    bring(page, "drop", make_image())
    shown(page)
    assert page.is_hidden("#error")
    page.close()


def test_names_are_text_and_never_markup(visit, served, make_image):
    answer = served.predict(make_image())[2]
    name = "<img src=x onerror=console.log('markup')>"
    answer["class"] = answer["probabilities"][0]["class"] = answer["exits"][0]["class"] = name
    page = visit()
    page.route("**/predict", lambda route: route.fulfill(json=answer))
    bring(page, "drop", make_image())
    shown(page)
    assert page.inner_text("#class") == name
    assert page.locator("#result img").count() == 0


def test_it_can_be_used_by_keyboard_and_in_the_dark(visit, make_image):
    page = visit(color_scheme="dark")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_the_page_allows_nothing_from_elsewhere(served):
    _, headers, _ = served.ask("GET", "/")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert headers["X-Content-Type-Options"] == "nosniff"
