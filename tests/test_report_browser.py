"""The page in a real browser: nothing fails, nothing is fetched, every control works."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from intact.report import render
from report_fixture import lenet_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REPORT = lenet_report()


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    executable = next((path for path in map(shutil.which, NAMES) if path), None)
    if executable is None:
        pytest.skip(f"no browser found: put one of {', '.join(NAMES)} on the PATH")
    # Chromium's sandbox refuses to run as root, which is who runs tests in a container.
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=executable, args=["--no-sandbox"] if root else []
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(REPORT), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(params=[(1366, 900), (390, 844)], ids=["laptop", "phone"])
def page(
    request: pytest.FixtureRequest, browser: playwright.Browser, address: str
) -> Iterator[playwright.Page]:
    """The page, opened; afterwards: no error, no message, no request but the file itself."""
    width, height = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, reduced_motion="reduce"
    )
    page, troubles, requests = context.new_page(), [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert troubles == []
    assert {url.split("#")[0] for url in requests} == {address}


def test_every_layer_is_there_and_can_be_reached(page: playwright.Page) -> None:
    assert page.title() == f"{REPORT.title} · intact"
    for i, layer in enumerate(REPORT.layers):
        section = page.locator(f"#layer-{i}")
        assert section.locator("h3 .name").inner_text() == layer.name
        panels = 1 if layer.weight is None else 2
        assert section.locator("figure.histogram .plot svg").count() == panels
        assert section.locator("figure.codes svg").count() == panels
    page.locator(".contents a", has_text="fc2").click()
    playwright.expect(page.locator("#layer-5 h3")).to_be_in_viewport()
    playwright.expect(page.locator('.contents a[href="#layer-5"]')).to_have_attribute(
        "aria-current", "location"
    )


def test_the_page_is_as_wide_as_the_screen(page: playwright.Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_counts_switch_to_a_log_scale_from_the_keyboard(page: playwright.Page) -> None:
    linear, log = page.locator("#layer-0 g.linear").first, page.locator("#layer-0 g.log").first
    assert (linear.is_visible(), log.is_visible()) == (True, False)
    page.locator("#counts-linear").focus()
    page.keyboard.press("ArrowRight")
    assert (linear.is_visible(), log.is_visible()) == (False, True)
    page.locator(".switch", has_text="Linear").get_by_text("Linear").click()
    assert (linear.is_visible(), log.is_visible()) == (True, False)


def test_the_theme_follows_the_system_until_it_is_chosen(page: playwright.Page) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="light")
    light = paper()
    page.emulate_media(color_scheme="dark")
    dark = paper()
    assert light != dark
    page.get_by_text("Light", exact=True).click()
    assert paper() == light
    page.emulate_media(color_scheme="light")
    page.get_by_text("Dark", exact=True).click()
    assert paper() == dark


def test_the_table_sorts_by_click_and_by_keyboard(page: playwright.Page) -> None:
    names = page.locator("#layer-table tbody th")
    original = names.all_inner_texts()
    by_macs = sorted(REPORT.layers, key=lambda layer: layer.macs)
    header = page.locator("#layer-table th", has_text="MACs")
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert names.all_inner_texts() == [layer.name for layer in by_macs]
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert names.all_inner_texts()[0] == by_macs[-1].name
    page.locator("#layer-table th button", has_text="Multiplier").click()
    assert set(names.all_inner_texts()[-2:]) == {"pool1", "pool2"}  # they have none
    page.locator("#layer-table th button", has_text="Layer").click()
    assert names.all_inner_texts() == original


@pytest.mark.parametrize("clipboard", [True, False], ids=["clipboard", "no clipboard"])
def test_copy_buttons_copy(page: playwright.Page, clipboard: bool) -> None:
    if not clipboard:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.evaluate(
        "document.addEventListener('copy', () => { window.copied = String(getSelection()); })"
    )
    button = page.get_by_role("button", name="Copy: command")
    button.click()
    playwright.expect(button).to_have_text("Copied")
    playwright.expect(page.get_by_role("status")).to_have_text("Copied to the clipboard")
    if not clipboard:
        assert page.evaluate("window.copied") == REPORT.command


def test_values_appear_under_the_pointer(page: playwright.Page) -> None:
    tooltip = page.locator("#tooltip")
    for figure, words in (("histogram", "quantized"), ("codes", "code"), ("channels", "channel")):
        plot = page.locator(f"#layer-0 figure.{figure} .plot").first
        plot.scroll_into_view_if_needed()
        plot.hover()
        playwright.expect(tooltip).to_contain_text(words)
        page.mouse.move(0, 0)
        playwright.expect(tooltip).to_be_hidden()


def test_the_histogram_reads_out_the_bin_that_is_there(page: playwright.Page) -> None:
    histogram = REPORT.inputs["input"].histogram
    plot = page.locator("#input-0 figure.histogram .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    first, last = (
        float(plot.locator("..").get_attribute(name) or "") for name in ("data-first", "data-last")
    )
    index = 30
    at = first + (last - first) * (index + 0.5) / len(histogram.before)
    page.mouse.move(box["x"] + at * box["width"], box["y"] + 20)
    lines = page.locator("#tooltip span").all_inner_texts()
    assert lines[1:] == [
        f"float: {histogram.before[index]:,.0f}",
        f"quantized: {histogram.after[index]:,.0f}",
    ]


def test_without_javascript_everything_can_be_read(
    browser: playwright.Browser, address: str
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page, requests = context.new_page(), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    for i, layer in enumerate(REPORT.layers):
        assert page.locator(f"#layer-{i} .histogram svg").first.is_visible()
        assert page.locator("#layer-table tbody th").nth(i).inner_text() == layer.name
    assert page.locator(".copy").first.is_hidden()  # what would do nothing is not shown
    page.locator(".switch").get_by_text("Log").click()  # CSS alone
    assert page.locator("#layer-0 g.log").first.is_visible()
    assert requests == [address]
    context.close()
