"""The page at `/`, in a browser: what holds for whatever answers. With PIPO_PAGE_URL it is a running `pipo serve`."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import browser
from tests.support.browser import Tab

STEPS = 400  # of a keyboard, at most, to come round
QUESTION = "Write a long story about a river."  # of which a small model without luck writes hundreds of tokens


@pytest.fixture
def tab(chromium: Any, site: str) -> Iterator[Tab]:
    with browser.tab(chromium, site, viewport={"width": 1280, "height": 800}) as opened:
        opened.sample(temperature=0)
        yield opened
        opened.check()


def test_an_answer_appears_while_it_is_made_and_its_cost_after_it(tab: Tab) -> None:
    tab.sample(temperature=0, max_tokens=60)
    tab.open().ask(QUESTION)
    tab.until("document.querySelector('.turn.running .body')?.textContent.length > 10")
    early = tab.answers[-1]
    tab.wait_for_end()
    assert tab.answers[-1].startswith(early[:10])
    assert len(tab.answers[-1]) > len(early)
    cost = tab.page.inner_text(".turn.assistant .cost")
    assert "tok/s" in cost
    assert "prompt" in cost
    assert "≈" not in cost  # counted by the server


def test_stop_keeps_what_was_said_and_ends_the_work(tab: Tab) -> None:
    tab.open().ask(QUESTION)
    tab.until("document.querySelector('.turn.running .body')?.textContent.length > 10")
    tab.page.click("#stop")
    tab.wait_for_end()
    assert tab.page.inner_text(".turn.assistant .turn-error") == "Stopped here."
    assert len(tab.answers[-1]) > 10
    tab.until("fetch('stats').then(r => r.json()).then(s => s.engine.num_running === 0)")


def test_reloading_keeps_conversations_and_their_order(tab: Tab) -> None:
    tab.sample(temperature=0, max_tokens=20)
    tab.open().ask("first question")
    tab.page.wait_for_selector(".turn.running")
    tab.page.click("#stop")
    tab.page.click("#new")
    tab.ask("second question")
    tab.wait_for_end()
    before = tab.turns
    tab.page.reload()
    tab.page.wait_for_selector(".turn")
    assert tab.turns == before
    assert tab.page.locator("#conversations .open").all_inner_texts() == ["second question", "first question"]
    tab.page.click("text=first question")
    assert tab.turns[0] == "first question"


def test_reloading_in_the_middle_of_an_answer_keeps_what_was_said(tab: Tab) -> None:
    tab.open().ask(QUESTION)
    tab.until("document.querySelector('.turn.running .body')?.textContent.length > 10")
    tab.page.reload()
    tab.page.wait_for_selector(".turn.assistant")
    assert len(tab.answers[-1]) > 10
    assert tab.page.inner_text(".turn.assistant .turn-error") == "Stopped here."


def test_everything_is_reached_and_done_with_the_keyboard(tab: Tab) -> None:
    tab.open()
    assert tab.page.evaluate("document.activeElement.id") == "prompt"
    tab.page.keyboard.type("one")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("two")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector(".turn.running")
    assert tab.turns[0] == "one\ntwo"
    tab.page.keyboard.press("Escape")
    tab.wait_for_end()
    wanted = tab.page.evaluate(
        "[...document.querySelectorAll('a[href], button, textarea')].filter(e => e.checkVisibility()).length"
    )
    assert len(walk(tab)) == wanted


def walk(tab: Tab) -> set[str]:
    """Tab through everything. Each stop shows where it is."""
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.evaluate("[...document.querySelectorAll('*')].forEach((e, i) => e.dataset.walk = i)")
    seen: set[str] = set()
    for _ in range(STEPS):
        tab.page.keyboard.press("Tab")
        at = tab.page.evaluate(
            """() => {
              const e = document.activeElement
              if (!e.matches('a[href], button, textarea')) return null
              return { id: e.dataset.walk, outline: getComputedStyle(e).outlineStyle, what: e.outerHTML.slice(0, 80) }
            }"""
        )
        if at is None:
            continue
        if at["id"] in seen:
            return seen
        assert at["outline"] == "solid", at["what"]
        seen.add(at["id"])
    raise AssertionError("the focus never came round")


def test_shortcuts_are_listed_and_work(tab: Tab) -> None:
    tab.open()
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.keyboard.press("?")
    listed = tab.page.inner_text("#help-keys")
    assert "Shift+Enter" in listed
    tab.page.keyboard.press("Escape")
    tab.page.keyboard.press("2")
    tab.page.wait_for_selector("#pipeline")
    tab.page.keyboard.press("/")
    tab.until("document.activeElement.id === 'prompt'")
    tab.page.keyboard.type("2?")  # in a field they are letters
    assert tab.page.input_value("#prompt") == "2?"
    assert tab.page.is_visible("#chat")


def test_single_keys_can_be_switched_off(tab: Tab) -> None:
    tab.open().page.click("#open-settings")
    tab.page.uncheck("#single-keys")
    tab.page.keyboard.press("Escape")
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.keyboard.press("2")
    assert tab.page.evaluate("location.hash") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(chromium: Any, site: str, scheme: str) -> None:
    with browser.tab(chromium, site, color_scheme=scheme) as tab:
        tab.open()
        assert is_dark(tab) == (scheme == "dark")
        other = "dark" if scheme == "light" else "light"
        while tab.page.get_attribute("html", "data-theme") != other:
            tab.page.click("#theme")
        assert is_dark(tab) == (other == "dark")
        tab.page.reload()
        assert is_dark(tab) == (other == "dark")
        tab.check()


def is_dark(tab: Tab) -> bool:
    colour = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) < 3 * 128


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(chromium: Any, site: str, scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 to 1."""
    with browser.tab(chromium, site, color_scheme=scheme) as tab:
        tab.open()
        for name in ("ink", "soft", "wait", "bad"):
            for behind in ("paper", "sheet", "hover"):
                assert contrast(tab, name, behind) >= 4.5, (name, behind)
        for name in ("disk", "ram", "compute"):  # of figures 3 to 1
            assert contrast(tab, name, "paper") >= 3, name


def contrast(tab: Tab, name: str, behind: str) -> float:
    """Source: WCAG 2.2, contrast ratio."""
    colours = tab.page.evaluate(
        """names => names.map(name => {
          document.body.style.color = `var(--${name})`
          const colour = getComputedStyle(document.body).color
          document.body.style.color = ''
          return colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
        })""",
        [name, behind],
    )
    light, dark = sorted((luminance(colour) for colour in colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: list[float]) -> float:
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_it_fits_from_a_phone_to_a_wall(chromium: Any, site: str, width: int) -> None:
    with browser.tab(chromium, site, viewport={"width": width, "height": 740}) as tab:
        tab.open().ask("x" * 400)
        tab.page.wait_for_selector(".turn.running")
        assert not tab.is_too_wide
        tab.page.click("#to-pipeline")
        tab.page.wait_for_selector("#pipeline .stack >> nth=0")
        assert not tab.is_too_wide
        tab.page.click("#to-chat")
        tab.page.click("#open-settings")
        box = tab.page.locator("#settings").bounding_box()
        assert box is not None
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        tab.check()


def test_on_a_phone_the_list_opens_over_the_chat_and_escape_closes_it(chromium: Any, site: str) -> None:
    with browser.tab(chromium, site, viewport={"width": 360, "height": 740}) as tab:
        tab.open()
        assert tab.page.is_hidden("#new")
        tab.page.click("#open-list")
        tab.page.wait_for_selector("#new")
        assert tab.page.get_attribute("#open-list", "aria-expanded") == "true"
        tab.page.keyboard.press("Escape")
        tab.page.wait_for_selector("#new", state="hidden")
        assert tab.page.evaluate("document.activeElement.id") == "open-list"


def test_the_pipeline_view_says_in_words_what_it_draws(tab: Tab, site: str) -> None:
    tab.open().page.click("#strip")
    tab.page.wait_for_selector("#pipeline")
    with urllib.request.urlopen(f"{site}/stats") as response:
        stats = json.load(response)
    memory = tab.page.get_attribute("#pipeline .stack >> nth=0", "aria-label")
    for name in stats["engine"]["ledger"]:
        assert name in memory
    plan = stats["info"]["plan"]["plan"]
    assert f"Map of {len(plan['units'])} units" in tab.page.get_attribute("canvas.map", "aria-label")
    for figure in tab.page.locator(".spark svg").all():
        assert "last two minutes: now" in figure.get_attribute("aria-label")


def test_the_pipeline_view_moves_with_the_work(tab: Tab) -> None:
    tab.sample(temperature=0, max_tokens=100)
    tab.open().ask(QUESTION)
    tab.page.click("#to-pipeline")
    tab.until("document.querySelector('#strip-text').textContent.includes('running')")
    tab.until("/[1-9]/.test(document.querySelector('.spark strong').textContent)")
    tab.until("document.querySelector('.spark .line').getAttribute('d').length > 0")


def test_nothing_is_polled_while_nobody_looks(tab: Tab) -> None:
    tab.open()
    polls = [url for url in tab.requests if url.endswith("/stats")]
    tab.page.evaluate(
        """() => {
          Object.defineProperty(document, 'hidden', { value: true, configurable: true })
          document.dispatchEvent(new Event('visibilitychange'))
        }"""
    )
    seen = len([url for url in tab.requests if url.endswith("/stats")])
    tab.page.wait_for_timeout(2500)  # two polls and a half
    assert len([url for url in tab.requests if url.endswith("/stats")]) == seen >= len(polls) > 0


def test_who_wants_no_motion_sees_none(chromium: Any, site: str) -> None:
    with browser.tab(chromium, site, reduced_motion="reduce") as tab:
        tab.sample(temperature=0)
        tab.open().ask(QUESTION)
        tab.page.wait_for_selector(".turn.running")
        tab.until("document.querySelector('#strip-text').textContent.includes('running')")
        shots = []
        for _ in range(3):
            shots.append(tab.page.evaluate("document.querySelector('#strip-map').toDataURL()"))
            tab.page.wait_for_timeout(150)
        assert len(set(shots)) == 1
