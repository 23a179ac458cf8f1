"""The page as a browser shows it; skipped if there is no Chromium."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from netfission.report import write_report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
SCREENS = {"phone": (390, 844), "desk": (1280, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Shown:
    """An address opened in a window of some size and colours, with all that it complained of or asked for."""

    def __init__(self, browser, file: Path, screen: str = "desk", scheme: str = "light") -> None:
        width, height = SCREENS[screen]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())


@pytest.fixture
def open_(browser) -> Iterator[object]:
    opened: list[Shown] = []

    def show(*arguments, **settings) -> Shown:
        opened.append(Shown(browser, *arguments, **settings))
        return opened[-1]

    yield show
    for each in opened:
        each.page.context.close()


@pytest.fixture(scope="module")
def both(finished_run, reported, tmp_path_factory) -> Path:
    return write_report([finished_run, reported], tmp_path_factory.mktemp("both") / "both.html")


@pytest.fixture(params=["one", "several"])
def page(request, reported, both) -> Path:
    return reported / "report.html" if request.param == "one" else both


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_shown_without_complaint_or_request(page, screen, scheme, open_):
    shown = open_(page, screen=screen, scheme=scheme)
    assert shown.complaints == []
    assert [url for url in shown.requests if not url.startswith("data:")] == [page.as_uri()]


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_runs_over_the_edge(page, screen, open_):
    wide = open_(page, screen=screen).page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert wide == 0


def test_a_table_that_is_cut_has_a_shadow_at_its_edge_until_it_is_scrolled(page, open_):
    table = open_(page, screen="phone").page.locator(".scroll").first

    def lightest() -> int:
        picture = Image.open(io.BytesIO(table.screenshot())).convert("L")
        width, height = picture.size
        return picture.crop((width - 4, height // 4, width - 2, height // 2)).getextrema()[1]

    assert table.evaluate("table => table.scrollWidth > table.clientWidth")
    assert lightest() < 250
    table.evaluate("table => { table.scrollLeft = table.scrollWidth; }")
    assert lightest() == 255


@pytest.mark.thorough
def test_many_runs_side_by_side_fit_the_paper(finished_run, tmp_path, open_):
    runs = [shutil.copytree(finished_run, tmp_path / f"run number {number}") for number in range(8)]
    shown = open_(write_report(runs, tmp_path / "all.html")).page
    shown.set_viewport_size({"width": 688, "height": 900})  # A4 less its margins
    shown.emulate_media(media="print")
    assert shown.evaluate("document.querySelector('.beside').getBoundingClientRect().right") <= 688
    assert shown.evaluate("getComputedStyle(document.querySelector('.scroll')).backgroundImage") == "none"


@pytest.mark.parametrize("screen", SCREENS)
def test_every_plot_is_drawn(page, screen, open_):
    plots = open_(page, screen=screen).page.evaluate(
        """[...document.querySelectorAll("figure")].map(figure => {
            const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
            const marks = [...svg.querySelectorAll("path, rect, circle, use")].filter(mark => {
                const own = mark.getBoundingClientRect(), style = getComputedStyle(mark);
                return own.width + own.height > 1 && (style.fill !== "none" || style.stroke !== "none");
            });
            const texts = [...svg.querySelectorAll("text")];
            const letters = texts.filter(text => text.getBoundingClientRect().width > 0);
            return [svg.getAttribute("aria-label"), box.width, box.height, marks.length, letters.length];
        })"""
    )
    assert len(plots) == (8 if page.name == "report.html" else 18)
    for label, width, height, marks, letters in plots:
        assert label
        assert width > 250 and height > 60, label
        assert marks >= 6 and letters >= 4, label


@pytest.mark.parametrize("screen", SCREENS)
def test_letters_in_figures_can_be_read(page, screen, open_):
    """8 pixels and more on a phone, where figures are smallest."""
    heights = open_(page, screen=screen).page.evaluate(
        """[...document.querySelectorAll("figure svg text")].map(text => {
            const scale = text.ownerSVGElement.getScreenCTM().a;
            return [parseFloat(getComputedStyle(text).fontSize) * scale, text.textContent];
        })"""
    )
    assert min(heights) >= [8, ""]


def test_figures_follow_the_page_into_the_dark(page, open_):
    ask = """[getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector("figure svg text")).fill,
        getComputedStyle(document.body).color]"""
    light, dark = (open_(page, scheme=scheme).page.evaluate(ask) for scheme in ("light", "dark"))
    assert light[0] == "rgb(255, 255, 255)"
    assert all(one != other for one, other in zip(light, dark, strict=True))


def test_images_are_loaded_and_tiny_ones_not_smoothed(page, open_):
    images = open_(page).page.evaluate(
        """[...document.images].map(
            image => [image.complete && image.naturalWidth, getComputedStyle(image).imageRendering, image.alt]
        )"""
    )
    assert images
    assert all(each[:2] == [8, "pixelated"] and each[2] for each in images)


def test_each_figure_opens_alone(reported, open_):
    for file in (reported / "report").iterdir():
        shown, colours = open_(file), []
        for scheme in ("light", "dark"):
            shown.page.emulate_media(color_scheme=scheme)
            colours.append(shown.page.evaluate("getComputedStyle(document.querySelector('text')).fill"))
        assert shown.complaints == []
        assert colours[0] != colours[1], file


def test_on_paper_it_is_light_and_complete(page, open_):
    shown = open_(page, scheme="dark").page
    seen = "document.querySelector('details dl').checkVisibility()"
    assert not shown.evaluate(seen)
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.body).color") == "rgb(28, 33, 40)"
    assert shown.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert shown.evaluate(seen)
    assert shown.pdf(format="A4").startswith(b"%PDF")
