"""The Chromium of this system, without a screen, and what a tab of it complained about."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

ARGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 20_000  # on a machine that others use too
_VIOLATIONS = """
window.violations = []
document.addEventListener('securitypolicyviolation', (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`)
})
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium here: `apt-get install chromium`")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """A page in a context of its own: nothing kept from other tests."""

    page: Any
    url: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.add_init_script(_VIOLATIONS)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(f"{error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self, path: str = "/") -> Tab:
        self.page.goto(self.url + path)
        self.until("document.querySelector('#empty-lead').textContent !== ''")
        return self

    def until(self, expression: str) -> None:
        """Until it is true in the page. Playwright's own way wants eval there, which the page's policy forbids."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            self.page.wait_for_timeout(20)

    def sample(self, **fields: float) -> None:
        """Fill the settings of every page that is opened from now on."""
        texts = json.dumps(json.dumps({name: str(value) for name, value in fields.items()}))
        self.page.add_init_script(f"localStorage.setItem('pipo:v1:sampling', {texts})")

    def ask(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def wait_for_end(self) -> None:
        """Until the newest answer is whole."""
        self.page.wait_for_selector(".turn.assistant:last-child:not(.running)")

    def wait_for_words(self, words: str) -> None:
        self.page.locator(".turn.assistant:last-child .body", has_text=words).wait_for()

    @property
    def answers(self) -> list[str]:
        return list(self.page.locator(".turn.assistant .body").all_inner_texts())

    @property
    def turns(self) -> list[str]:
        return [text.strip() for text in self.page.locator(".turn .body").all_inner_texts()]

    @property
    def is_too_wide(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))

    def check(self) -> None:
        """Nothing was complained about, and nothing left the origin."""
        assert self.errors == []
        assert self.page.evaluate("window.violations") == []
        hosts = {urlsplit(url).netloc for url in self.requests if not url.startswith(("blob:", "data:"))}
        assert hosts <= {urlsplit(self.url).netloc}


@contextmanager
def tab(browser: Any, url: str, **options: Any) -> Iterator[Tab]:
    context = browser.new_context(**options)
    try:
        yield Tab(context.new_page(), url)
    finally:
        context.close()
