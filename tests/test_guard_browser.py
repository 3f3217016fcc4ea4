"""The page of the API in a real browser: it works, loads nothing from elsewhere, and shows refusals as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guard_server import serving
from test_report_browser import LOW_CONTRAST
from tiny import VOCAB
from tiny_text import causal_tokenizer
from veiltune.guard.decoding import Guard
from veiltune.guard.door import Door
from veiltune.guard.keys import Keys, new_key
from veiltune.guard.protected import ProtectedStrings
from veiltune.guard.vocabulary import Vocabulary

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_says_where_a_text_ends_for_protection(browser: Any) -> None:
    vocabulary = Vocabulary.of(causal_tokenizer(), size=VOCAB)
    guard = Guard(vocabulary, protected=ProtectedStrings(["Jane Doe"], vocabulary))
    with serving(guard=guard) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.fill("#prompt", "It is Jane D")
        page.click("#write")
        page.wait_for_selector("#text", state="attached")
        assert "what comes next is protected" in page.inner_text("#out")
        page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_asks_and_shows(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    key = new_key(tmp_path / "keys.jsonl", "alice")
    with serving(door=Door(keys=Keys(tmp_path / "keys.jsonl"))) as port:
        home = f"http://127.0.0.1:{port}/"
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(home)
        page.fill("#prompt", "Ann")
        page.click("#next")
        page.wait_for_selector(".error")
        assert "valid key" in page.inner_text("#out")
        complaints = [text for text in complaints if "401" not in text]
        page.fill("#key", key)
        page.click("#next")
        page.wait_for_selector("#out table")
        assert page.locator("#out tbody tr").count() == 10
        seen, low = page.evaluate(LOW_CONTRAST)
        assert seen > 20 and low == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.fill("#tokens", "8")
        page.fill("#temperature", "0")  # one draw in 128 would end the text at once, and nothing would show
        page.fill("#prompt", "<img src=x onerror=alert(1)>")
        page.click("#write")
        page.wait_for_selector("#text")
        assert len(page.inner_text("#text")) > 0 and page.locator("#out img").count() == 0
        assert page.evaluate("document.querySelectorAll('label').length") == page.locator("input, textarea").count()
        page.close()
    assert all(url.startswith((home, "data:")) for url in requests) and len(requests) >= 4
    assert complaints == []
