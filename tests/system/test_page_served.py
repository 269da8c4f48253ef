"""The page on a real `pipo serve` that streams its weights: what is written, and what the pipeline view says of it."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support import browser
from tests.support.browser import Tab
from tests.support.command_line import CommandLine
from tests.support.server_process import Served, serving

SERVE = (
    "serve",
    "smollm2",
    "--ram",
    "290MB",
    "-c",
    "512",
    "--num-sequences",
    "2",
)  # 92 MiB of weights, most of which stream
STORY = "Write a long story about a river."
IN_REST = "fetch('stats').then(r => r.json()).then(s => s.engine.num_running === 0)"
MOVING = r"^1 running · [\d.]*[1-9][\d.]* tok\/s · [\d.]*[1-9]"  # tokens and bytes
BEING_WRITTEN = "document.querySelector('.turn.running .body')?.textContent.length > 10"


@pytest.fixture(scope="module")
def served(pipo: CommandLine) -> Iterator[Served]:
    with serving(pipo, *SERVE, "--port", "0") as found:
        yield found


@pytest.fixture
def tab(chromium: Any, served: Served) -> Iterator[Tab]:
    with browser.tab(chromium, served.url, viewport={"width": 1280, "height": 800}) as opened:
        opened.sample(temperature=0)
        yield opened
        opened.until(IN_REST)
        opened.errors = [error for error in opened.errors if not error.startswith("Failed to load resource")]
        opened.check()


def stats_of(served: Served) -> Any:
    with urllib.request.urlopen(f"{served.url}/stats") as response:
        return json.load(response)


def metrics_of(served: Served) -> dict[str, float]:
    with urllib.request.urlopen(f"{served.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_story_streams_is_seen_in_the_pipeline_stopped_and_kept(tab: Tab, served: Served) -> None:
    before = stats_of(served)["engine"]
    tab.open().ask(STORY)
    tab.until(BEING_WRITTEN)
    tab.page.click("#to-pipeline")
    tab.until(f"/{MOVING}/.test(document.querySelector('#strip-text').textContent)")
    words = tab.page.inner_text("#strip-text").replace("\u00a0", " ")
    assert re.search(r"[1-9]\d* % of the drive", words), words
    streamed = tab.page.locator(".spark", has_text="From the drive").locator("svg").get_attribute("aria-label")
    assert re.search(r"now [\d.]*[1-9]", streamed or ""), streamed
    assert "computing" in (tab.page.get_attribute("#p-time ~ .stacked .stack", "aria-label") or "")
    tab.page.click("#to-chat")
    tab.page.click("#stop")
    tab.wait_for_end()
    tab.until(IN_REST)
    after = stats_of(served)["engine"]
    assert after["bytes_read"] > before["bytes_read"] and after["completion_tokens"] > before["completion_tokens"]
    kept = tab.turns
    assert kept[0] == STORY and len(kept[1]) > 10
    tab.page.reload()
    tab.page.wait_for_selector(".turn.assistant")
    assert tab.turns == kept
    assert tab.page.inner_text(".turn.assistant .turn-error") == "Stopped here."
    assert stats_of(served)["engine"]["completion_tokens"] == after["completion_tokens"]  # nobody writes on


def test_the_pipeline_view_has_the_figures_of_stats_metrics_and_plan(tab: Tab, served: Served) -> None:
    tab.sample(temperature=0, max_tokens=8)
    tab.open().ask("Say hello.")
    tab.wait_for_end()
    tab.until(IN_REST)
    stats, metrics = stats_of(served), metrics_of(served)
    engine, plan = stats["engine"], stats["info"]["plan"]["plan"]
    tab.page.click("#to-pipeline")
    tab.until(f"document.querySelector('#p-requests ~ dl').textContent.includes('Passes{engine['num_passes']}')")
    text = tab.page.inner_text("#pipeline").replace("\u00a0", " ")
    assert metrics["pipo_bytes_read_total"] == engine["bytes_read"]
    assert metrics["pipo_completion_tokens_total"] == engine["completion_tokens"]
    assert metrics["pipo_prompt_tokens_total"] == engine["prompt_tokens"]
    assert f"{size(engine['bytes_read'])}\n" in text
    assert f"{size(sum(engine['ledger'].values()))} of {size(engine['limit_bytes'])} are spoken for." in text
    for name, num_bytes in engine["ledger"].items():
        assert metrics[f'pipo_ledger_bytes{{name="{name}"}}'] == num_bytes
        assert num_bytes == 0 or re.search(rf"{name}\s+{size(num_bytes)}", text), name
    assert engine["limit_bytes"] == plan["limit_bytes"] == 290_000_000
    num_resident = sum(unit["home"] == "ram" for unit in plan["units"])
    assert f"{num_resident} units in memory" in text or f"{num_resident} unit in memory" in text
    assert f"{size(plan['streamed_bytes_per_pass'])} planned" in text
    assert re.search(r"[\d.]+ planned for 2 at a time", text)
    lent = engine["ledger"]["resident weights"] - plan["breakdown_bytes"]["resident weights"]
    assert lent > 0 and f"and {size(lent)} more until the context needs the room" in text
    assert f"of {plan['drive_bytes_per_s'] / 1e9:.2f} GB/s" in text


def size(num_bytes: int) -> str:
    """As the page prints it."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def test_what_is_longer_than_the_context_is_refused_with_what_helps(tab: Tab, served: Served) -> None:
    context = stats_of(served)["info"]["context_tokens"]
    tab.open().ask("river " * (context + 1))
    tab.wait_for_end()
    words = tab.page.inner_text(".turn-error.is-error")
    assert f"{context}" in words and "new conversation" in words
    assert tab.page.inner_text(".turn.assistant .cost") == ""  # it cost nothing


def test_a_server_that_ends_and_comes_back_is_found_again(chromium: Any, pipo: CommandLine) -> None:
    with serving(pipo, *SERVE, "--port", "0") as first, browser.tab(chromium, first.url) as tab:
        tab.sample(temperature=0, max_tokens=8)
        tab.open().ask(STORY)
        tab.wait_for_end()
        first.end(signal.SIGTERM)
        tab.page.wait_for_selector("#strip.is-down")
        assert "These are the figures of" in (tab.page.text_content("#pipeline.is-stale .trouble") or "")
        tab.ask("And then?")
        tab.page.wait_for_selector(".turn-error.is-error")
        assert "Is `pipo serve` still running?" in tab.page.inner_text(".turn-error.is-error")
        with serving(pipo, *SERVE, "--port", f"{urlsplit(first.url).port}"):
            tab.page.click("text=Try again")
            tab.wait_for_end()
            assert tab.page.locator(".turn-error.is-error").count() == 0
            assert len(tab.answers) == 2 and tab.answers[1]
            tab.page.wait_for_selector("#strip:not(.is-down)")
            assert tab.page.locator("#pipeline.is-stale").count() == 0


@pytest.mark.parametrize(("scheme", "view"), [("dark", "chat"), ("light", "pipeline")])
def test_pictures_of_the_guide(chromium: Any, served: Served, tmp_path: Path, scheme: str, view: str) -> None:
    """In the middle of an answer. PIPO_PAGE_SHOTS=docs/guide puts them into the guide."""
    file = Path(os.environ.get("PIPO_PAGE_SHOTS", tmp_path)) / f"page-{view}.png"
    size = {"width": 1280, "height": 800}
    with browser.tab(chromium, served.url, color_scheme=scheme, viewport=size) as tab:
        tab.sample(temperature=0)
        tab.open().ask(STORY)
        tab.until("document.querySelector('.turn.running .body')?.textContent.length > 400")
        tab.page.click(f"#to-{view}")
        tab.page.screenshot(path=file)
        tab.page.click("#to-chat")
        assert tab.page.is_visible("#stop"), "it is still being written"
        tab.page.click("#stop")
        tab.wait_for_end()
    assert 10_000 < file.stat().st_size < 150_000
