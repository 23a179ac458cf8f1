"""The page in headless Chromium; skipped if there is none."""

import base64
import re
import shutil
import time

import pytest

from netfission.classifier import Classifier
from netfission.utils.text import percent

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 400, "height": 800}, "has_touch": True, "is_mobile": True}
PIXEL = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAAAAAAALAAAAAABAAEAAAIBRAA7")  # a GIF
LONG_NAMES = [
    "Phalacrocorax auritus (double-crested cormorant), juvenile plumage, subspecies floridanus",
    "x" * 120,
    *(f"class {number}" for number in range(8)),
]

# Contrast of each piece of text with what is behind it, the smallest first (WCAG 2.2).
CONTRASTS = """() => {
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const colour = parse(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const seen = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
        && [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()));
    return seen.map((element) => {
        const levels = [parse(getComputedStyle(element).color), behind(element)].map(luminance);
        return [(Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05), element.textContent];
    }).sort((one, other) => one[0] - other[0]);
}"""

# Elements that stand out of the window, or whose content stands out of them.
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
    && !element.closest(".hidden-visually, svg, pre") && element.id !== "file"
    && (element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display !== "inline"
        || element.getBoundingClientRect().right > innerWidth)).map((element) => element.outerHTML)"""

# Puts a file into what a drop or a paste brings, as a hand would.
BRING = """([kind, name, type, content]) => {
    const data = new DataTransfer();
    for (const one of [name].flat()) data.items.add(new File([Uint8Array.from(content)], one, { type }));
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

    def opened(refused=None, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on(
            "console",
            lambda message: (refused and refused in message.text) or complaints.append(message.text),
        )
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


def file(name, content=PIXEL):
    """A file that is chosen."""
    return {"name": name, "mimeType": "image/png", "buffer": content}


def shown(page):
    page.wait_for_selector("#result:not([hidden]):not(.stale)")


def plain(text):
    """The page's text, whose spaces within numbers do not break, with ordinary spaces."""
    return text.replace("\u00a0", " ")


def lines_of(page, selector):
    """The lines of text in an element, without empty ones."""
    return [line.strip() for line in plain(page.inner_text(selector)).splitlines() if line.strip()]


def invented(page, names, probabilities, exits=6, **answer):
    """Give the page an answer in place of the server's: of `exits` exits, each with these probabilities."""
    listed = [{"class": name, "probability": p} for name, p in zip(names, probabilities, strict=False)]
    votes = [listed[0] | {"probabilities": [one["probability"] for one in listed]}] * exits
    answer = {"entropy": 1e-5, "mutual_information": 0.0, "disagreement": 0.0, "seconds": 0.01} | answer
    answer |= listed[0] | {"probabilities": listed, "exits": votes}
    page.route("**/predict", lambda route: route.fulfill(json=answer))
    model = {"calibration_images": 145, "risk": 0.05, "threshold": 0.6, "classes": names, "exits": exits}
    page.route("**/model", lambda route: route.fulfill(json=route.fetch().json() | model))
    page.reload()
    until(page, "document.getElementById('seen').textContent")
    bring(page, "drop", PIXEL)
    shown(page)


def widths(page, bars):
    """Of the coloured part of each bar, over the whole bar, once all have grown."""
    page.evaluate(
        "Promise.all(document.getAnimations().filter(one => one instanceof CSSTransition)"
        ".map(one => one.finished.catch(() => null)))"
    )
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
    best = [f"{one['class']} ({percent(one['probability'], 1)} %)" for one in answer["probabilities"][:3]]
    if answer["abstain"]:
        assert page.inner_text("#verdict h2").strip() == "Not sure enough to answer"
        assert plain(page.inner_text("#guesses")) == f"Best guesses: {', '.join(best)}"
    else:
        assert (
            plain(page.inner_text("#verdict h2"))
            == f"{answer['class']} {percent(answer['probability'], 1)} %"
        )
    assert page.evaluate("document.getElementById('verdict').getBoundingClientRect().bottom <= innerHeight")
    rest = 1 - sum(one["probability"] for one in answer["probabilities"])
    ensemble = [*(one["probability"] for one in answer["probabilities"]), rest]
    assert widths(page, "#ensemble .bar") == pytest.approx(ensemble, abs=0.01)
    rows = zip(*(exit_["probabilities"] for exit_ in answer["exits"]), strict=True)
    exits = [share for row in rows for share in row]
    exits += [1 - sum(exit_["probabilities"]) for exit_ in answer["exits"]]
    assert widths(page, "#exits .bar") == pytest.approx(exits, abs=0.01)
    assert len(widths(page, "#uncertainty .bar")) == 2
    told = page.inner_text("#agreement")
    for number, exit_ in enumerate(answer["exits"]):
        assert exit_["class"] in told
        columns = page.locator(f"#exits tr > :nth-child({number + 2}).votes")
        listed = [one["class"] for one in answer["probabilities"]]
        assert columns.count() == (exit_["class"] in listed)
    assert f"entropy {answer['entropy']:.3f} nats" in page.inner_text("#uncertainty")
    until(page, "document.getElementById('preview').naturalWidth === 8")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_chosen_file_and_then_another(visit, served, make_image):
    page = visit()
    for number in (1, 2):
        content = make_image(number)
        page.set_input_files("#file", file("x.png", content))
        answer = served.predict(content)[2]
        best = answer["probabilities"][0]["class"]
        shown(page)  # the first answer is stale from the moment that the second file is chosen
        assert page.inner_text("#ensemble li:first-child .label") == best
        probability = f"{percent(answer['probability'], 1)} %"
        assert plain(page.inner_text("#ensemble li:first-child .number")) == probability
        assert probability in plain(page.text_content("#summary"))


def test_a_picture_from_the_camera(visit):
    page = visit()
    page.click("#start")
    until(page, "document.getElementById('video').videoWidth")
    page.click("#take")
    shown(page)
    assert page.is_hidden("#camera")
    assert page.evaluate("document.getElementById('video').srcObject") is None


def test_what_is_no_image_or_too_large_is_told_and_the_page_goes_on(visit, make_image):
    page = visit("status of 415")
    bring(page, "drop", b"hello", "notes.txt", "text/plain")
    page.wait_for_selector("#error:not([hidden])")
    assert "notes.txt: image must be a file in " in page.inner_text("#error")
    bring(page, "drop", bytes(200_001), "large.png")
    until(
        page, "document.getElementById('error').textContent.includes('large.png: the file has 0.2\\u00a0MB')"
    )
    bring(page, "drop", make_image())
    shown(page)
    assert page.is_hidden("#error")


def test_names_are_text_and_never_markup(visit, served, make_image):
    name = "<img src=x onerror=console.log('markup')>"
    page = visit()
    invented(page, [name, "b"], [0.7, 0.3], abstain=False)
    assert page.inner_text("#title") == name
    assert page.locator("#result img").count() == 0
    page.set_input_files("#file", [file(name)] * 2)
    until(page, "document.querySelectorAll('#answers .confident').length === 2")
    assert page.locator("#answers .quiet").first.inner_text() == name
    assert page.locator("#answers img").count() == 2


def test_names_change_no_number_beside_them(visit):
    page = visit()
    invented(page, ["\u202eabc\x1b\t\u2028é", "b"], [0.7, 0.3], abstain=False)
    assert page.inner_text("#title") == r"\u202eabc\x1b\t\u2028é"  # as `printable` writes it
    page.set_input_files("#file", file("\u202egnp.png"))
    until(page, "document.getElementById('preview').alt !== 'digit.png'")
    assert page.get_attribute("#preview", "alt") == r"\u202egnp.png"


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("exits", [2, 6])
@pytest.mark.parametrize("abstain", [False, True])
def test_all_fits(visit, screen, exits, abstain):
    page = visit(**screen)
    invented(page, LONG_NAMES, [0.99997, 1e-5, 1e-5, 1e-5, 0.0], exits, abstain=abstain)
    assert page.evaluate(OVERFLOWING) == []
    assert len(page.locator("#exits tr").all()) == 7
    page.set_input_files("#file", [file("y" * 100)] * 3)
    until(page, "document.querySelectorAll('#answers .confident, #answers .unsure').length === 3")
    page.click("#answers li:nth-child(2) summary")
    shown(page)
    assert page.evaluate(OVERFLOWING) == []


def test_the_first_line_says_whether_to_trust_the_answer(visit):
    page = visit()
    share = [0.5, 0.3, 0.1, 0.05]
    invented(page, LONG_NAMES[2:], share, abstain=False)
    assert lines_of(page, "#verdict")[:2] == ["Confident enough to answer", "class 0 50.0 %"]
    assert plain(page.inner_text("#reason")) == (
        "It abstains if its confidence is below 60.0 %, which keeps the share of wrong answers within 5 % on "
        "the 145 validation images."
    )
    invented(page, LONG_NAMES[2:], share, abstain=True)
    lines = lines_of(page, "#verdict")
    assert lines[0] == "Not sure enough to answer"
    assert lines[1] == "Best guesses: class 0 (50.0 %), class 1 (30.0 %), class 2 (10.0 %)"
    assert page.text_content("#summary").startswith("Not sure enough to answer. Best guesses: class 0")
    invented(page, LONG_NAMES[2:], share, entropy=2.0)  # of at most ln 8 = 2.08
    assert page.inner_text("#verdict").startswith("This answer cannot be judged\n")
    assert page.inner_text("#reason").startswith(
        "The server was started without a risk, so how often it errs"
    )
    assert "close to guessing" in page.inner_text("#reason")
    page.route("**/model", lambda route: route.fulfill(json=route.fetch().json() | {"calibrated": False}))
    page.reload()
    until(page, "document.getElementById('seen').textContent")
    bring(page, "drop", PIXEL)
    shown(page)
    assert page.inner_text("#reason").startswith("The network was not calibrated, so how often it errs")


def test_the_page_rounds_as_all_other_output_does_and_never_to_certainty(visit):
    page = visit()
    shares = [0.0, 1e-9, 0.0004, 0.0006, 0.05, 0.3333, 0.9994, 0.9996, 1 - 1e-9, 1.0]
    on_page = page.evaluate("shares => import('/page.js').then(page => shares.map(page.percent))", shares)
    assert list(map(plain, on_page)) == [f"{percent(share, 1)} %" for share in shares]
    invented(page, ["a", "b", "c"], [1.0, 1e-12], abstain=False)  # 1: what float32 makes of 1 - 1e-8
    text = "\n".join(lines_of(page, "#result"))
    assert not re.search(r"\b(100|0\.0)\b", text.partition("Uncertainty")[0])
    assert text.count("> 99.9") == 8 and text.count("< 0.1") == 14
    assert "entropy < 0.001 nats" in text


def test_the_accuracy_on_the_test_split_is_shown(visit, finished_run):
    evaluation = Classifier.from_pretrained(finished_run).evaluation
    told = f"{percent(evaluation.ensemble['top1'], 1)} % of {evaluation.n} test images correct"
    assert plain(visit().inner_text("#about")).endswith(told)


def test_several_files_are_all_answered(visit, served, make_image):
    page = visit("status of 415")
    files = [file(f"{number}.png", make_image(number)) for number in range(5)]
    files[3] |= {"buffer": b"hello"}
    page.set_input_files("#file", files)
    until(page, "document.getElementById('summary').textContent")
    answers = [None if number == 3 else served.predict(make_image(number))[2] for number in range(5)]
    unsure = sum(answer is not None and answer["abstain"] for answer in answers)
    kinds = [(4 - unsure, "answered"), (unsure, "not sure enough"), (1, "failed")]
    told = ", ".join(f"{number} {kind}" for number, kind in kinds if number)
    assert page.inner_text("#count") == f"5 images: {told}" == page.text_content("#summary")
    for number, answer in enumerate(answers):
        row = page.locator(f"#answers li:nth-child({number + 1})")
        assert row.locator(".quiet").inner_text() == f"{number}.png"
        shown_verdict = plain(row.locator(".short").inner_text())
        if answer is None:
            assert shown_verdict.startswith("image must be a file in ")
            assert row.locator("img").count() == 0  # which would be the browser's broken image
            continue
        assert f"{answer['class']} ({percent(answer['probability'], 1)} %)" in shown_verdict
        assert shown_verdict.startswith("Not sure enough: ") == answer["abstain"]
        until(page, f"document.querySelector('#answers li:nth-child({number + 1}) img').naturalWidth === 8")
    page.focus("#answers li:nth-child(5) summary")
    page.keyboard.press("Enter")
    shown(page)
    assert page.locator("#answers li:nth-child(5) #result .label").first.inner_text() == answers[4]["class"]
    page.click("#answers li:nth-child(1) summary")
    until(page, "document.querySelector('#answers li:nth-child(1) #result')")
    assert page.locator("#result .label").first.inner_text() == answers[0]["class"]
    assert page.locator("#answers details[open]").count() == 1
    page.click("#answers li:nth-child(4) summary")  # which has no answer to open
    assert page.locator("#answers details[open]").count() == 1
    bring(page, "drop", make_image(1))
    until(page, "document.querySelector('#single #result:not([hidden]):not(.stale)')")
    assert page.is_hidden("#several")


def test_of_too_many_files_the_first_are_answered(visit, make_image):
    page = visit()
    bring(page, "drop", make_image(), [f"{number}.png" for number in range(103)])
    until(page, "document.getElementById('summary').textContent")
    assert page.inner_text("#left-out") == "Only the first 100 of 103 files are sent."
    assert page.locator("#answers .confident, #answers .unsure").count() == 100


def test_a_folder_is_told_of(visit, tmp_path):
    page = visit("ERR_FILE_NOT_FOUND")
    data = {"items": [], "files": [str(tmp_path)], "dragOperationsMask": 1}
    browser = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})
    until(page, "document.getElementById('error').textContent")
    assert page.inner_text("#error").endswith(
        "it cannot be read; instead of a folder, choose the images in it."
    )


def test_a_set_and_an_image_unlike_those_of_the_calibration_are_shown(visit):
    page = visit()
    promises = {"set": ["a", "b"], "coverage": 0.9, "class_wise": False}
    marks = {"out_of_distribution": True, "p_value": 0.01, "accept_false_alarms": 0.05}
    invented(page, ["a", "b", "c"], [0.6, 0.3, 0.1], abstain=False, **promises, **marks)
    assert page.inner_text("#classes") == "a, b"
    assert plain(page.inner_text("#promise")).startswith(
        "Such sets contain the true class of at least 90 % of the images, on average, by the 145 "
    )
    assert plain(page.inner_text("#outside")).startswith("Unlike the 145 validation images (p-value 0.010)")
    invented(page, ["a", "b", "c"], [0.6, 0.3, 0.1], abstain=False)
    assert page.is_hidden("#set") and page.is_hidden("#outside")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    assert page.evaluate(CONTRASTS)[0][0] >= 4.5
    for answer in ({"abstain": False}, {"abstain": True}, {}):
        invented(page, ["a", "b", "c"], [0.6, 0.2], **answer)
        assert page.evaluate(CONTRASTS)[0][0] >= 4.5
        page.set_input_files("#file", [file("y")] * 2)
        until(page, "document.getElementById('summary').textContent")
        assert page.evaluate(CONTRASTS)[0][0] >= 4.5
    bring(page, "drop", bytes(200_001), "large.png")
    page.wait_for_selector("#error:not([hidden])")
    assert page.evaluate(CONTRASTS)[0][0] >= 4.5


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
