"""The page about language models in a real browser: nothing loaded, nothing cut off, readable in both schemes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leakage_records import bound, defended, leakage, write_hostile_model, write_model
from test_report_browser import LOW_CONTRAST, opened
from veiltune.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leaking, a defended and a wrongly claimed model."""
    folder = tmp_path_factory.mktemp("report")
    folders = [
        write_model(folder / "undefended", leakage()),
        write_model(folder / "epsilon-8", defended()),
        write_model(folder / "wrong-with-a-long-name-to-wrap", leakage(0.7, 0.1, audited_epsilon=bound(4.2, 2.0))),
    ]
    write_report(folders, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


OUTSIDE = """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return frame.width ? [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
      || box.top < frame.top - 1;
  }).map(text => text.textContent) : [];
})"""


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (400, "light"), (320, "dark")])
def test_in_a_browser(browser: Any, report: Path, width: int, scheme: str) -> None:
    """Nothing loaded, nothing cut off, each plot seen once, every text with contrast."""
    page, events = opened(browser, report, width=width, scheme=scheme)
    assert events == [f"request {report.as_uri()}"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    plots = page.locator("figure.plot")
    assert plots.count() == 2 + 3 * 6
    assert [plots.nth(index).locator("svg:visible").count() for index in range(plots.count())] == [1] * plots.count()
    page.evaluate("document.querySelectorAll('details').forEach(item => item.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    seen, low = page.evaluate(LOW_CONTRAST)
    assert seen > 500 and low == []
    page.close()


def test_hostile_names_neither_run_nor_break_the_page(browser: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    write_report([write_hostile_model(tmp_path)], report)
    page, events = opened(browser, report, width=400)
    assert events == [f"request {report.as_uri()}"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.close()


def test_it_prints(browser: Any, report: Path) -> None:
    page, _ = opened(browser, report, scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 673, "height": 900})  # A4 between the margins
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 673
    page.close()
