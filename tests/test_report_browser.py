"""The page in a real browser: nothing loaded, nothing cut off, readable in both colour schemes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report_runs import record, write_hostile_run, write_run
from veiltune.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

# Contrast of each visible text against the nearest background that is painted, by WCAG 2.2.
LOW_CONTRAST = """() => {
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const paper = element => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color.slice(0, 3);
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0] : [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const low = []; let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(paper(element))].sort((x, y) => y - x);
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push([walker.currentNode.data.trim().slice(0, 30), ink, paper(element)]);
  }
  return [seen, low];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: without noise, with little, and a dominated one whose control failed."""
    folder = tmp_path_factory.mktemp("report")
    broken = tuple(c.model_copy(update={"passed": c.name != "shuffled"}) for c in record(0.5).controls)
    runs = [
        write_run(folder / "no-noise", record(0.992, disclosed=True), utility=0.879),
        write_run(folder / "d_chi-0.7", record(0.8)),
        write_run(folder / "d_chi-3-with-a-long-name-that-has-to-wrap", record(0.5, controls=broken), utility=0.646),
    ]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


def opened(browser: Any, report: Path, *, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and what it asked for or complained of."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    events: list[str] = []
    page.on("console", lambda message: events.append(f"console {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error {error}"))
    page.on("request", lambda request: events.append(f"request {request.url}"))
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    return page, events


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_loaded_and_nothing_is_complained_of(browser: Any, report: Path, width: int) -> None:
    page, events = opened(browser, report, width=width)
    assert events == [f"request {report.as_uri()}"]
    page.close()


def test_the_watch_sees_what_a_page_must_not_do(browser: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<body><script>console.error('x')</script><img src='missing.png'>")
    page, events = opened(browser, bad)
    assert any("console x" in event for event in events) and any("missing.png" in event for event in events)
    page.close()


@pytest.mark.parametrize("width", [1280, 360])
def test_hostile_names_neither_run_nor_break_the_page(browser: Any, tmp_path: Path, width: int) -> None:
    report = tmp_path / "report.html"
    write_report([write_hostile_run(tmp_path)], report)
    page, events = opened(browser, report, width=width)
    assert events == [f"request {report.as_uri()}"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize("width", [1280, 360, 320])
def test_nothing_sticks_out_of_the_page(browser: Any, report: Path, width: int) -> None:
    page, _ = opened(browser, report, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize(("width", "kind"), [(1280, "wide"), (360, "narrow")])
def test_every_plot_is_seen_once_and_inside_its_frame(browser: Any, report: Path, width: int, kind: str) -> None:
    page, _ = opened(browser, report, width=width)
    plots = page.locator("figure.plot")
    assert plots.count() == 1 + 3 * (3 + 2)  # the trade-off; attacks, frequency, repeated and two ROCs a run
    for index in range(plots.count()):
        shown = plots.nth(index).locator("svg:visible")
        assert shown.count() == 1
        box = shown.bounding_box()
        assert box["width"] > 250 and box["height"] > 120
        holder = plots.nth(index).locator(f".{kind}")
        assert holder.get_attribute("role") == "img" and len(holder.get_attribute("aria-label")) > 30
    outside = page.evaluate(
        """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
          const frame = svg.getBoundingClientRect();
          return frame.width ? [...svg.querySelectorAll('text')].filter(text => {
            const box = text.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
          }).map(text => text.textContent) : [];
        })"""
    )
    assert outside == []
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('figure svg text')).fontSize)") >= 12
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser: Any, report: Path, scheme: str) -> None:
    page, _ = opened(browser, report, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(item => item.open = true)")
    seen, low = page.evaluate(LOW_CONTRAST)
    assert seen > 500
    assert low == []
    page.add_style_tag(content=":root { --muted: #808080 !important; --paper: #777 !important }")
    assert page.evaluate(LOW_CONTRAST)[1], "grey on grey was not noticed"
    page.close()


def test_dark_paper_is_dark(browser: Any, report: Path) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        page, _ = opened(browser, report, scheme=scheme)
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(colours) == 2


def test_the_keyboard_reaches_the_report(browser: Any, report: Path) -> None:
    page, _ = opened(browser, report)
    page.keyboard.press("Tab")
    focused = page.evaluate("[document.activeElement.className, getComputedStyle(document.activeElement).outlineStyle]")
    assert focused == ["skip", "solid"]
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open] table").first.is_visible()
    page.close()


def test_it_prints(browser: Any, report: Path) -> None:
    page, _ = opened(browser, report, scheme="dark")
    assert page.pdf(format="A4").startswith(b"%PDF-")
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 673, "height": 900})  # A4 between the margins
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 673
    page.close()
