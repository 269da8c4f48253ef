"""What the page keeps in the browser: whole, full, blocked, in a file, and with two tabs at it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.browser import Tab
from tests.support.page_server import Server, asked


def test_conversations_go_to_a_file_and_come_back(tab: Tab, stand_in: Server, tmp_path: Path) -> None:
    asked(tab.open(), stand_in, "first", "one")
    with tab.page.expect_download() as download:
        tab.page.click("#export")
    file = tmp_path / "kept.json"
    download.value.save_as(file)
    tab.page.set_input_files("#import-file", file)
    tab.page.wait_for_selector("text=All of these conversations are here already.")
    tab.page.evaluate("localStorage.clear()")
    tab.page.reload()
    tab.page.set_input_files("#import-file", file)
    tab.page.click("#conversations >> text=first")
    assert tab.turns == ["first", "one"]
    assert json.loads(file.read_text())["version"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no conversations of pipo"),
        ('{"format": "pipo-conversations", "version": 9, "conversations": []}', "version 9, this page reads version 1"),
        (
            '{"format": "pipo-conversations", "version": 1, "conversations": [{"messages": [{"role": "boss"}]}]}',
            'role "boss", wanted "user" or "assistant"',
        ),
    ],
)
def test_a_file_that_is_none_is_refused_whole(tab: Tab, text: str, words: str) -> None:
    tab.open().page.set_input_files("#import-file", {"name": "x.json", "mimeType": "", "buffer": text.encode()})
    assert words in tab.page.inner_text(".notice.error")
    assert tab.page.locator("#conversations li").count() == 0


def test_a_full_browser_loses_nothing_and_says_so(tab: Tab, stand_in: Server) -> None:
    tab.open().page.evaluate(
        """() => {
          for (let size = 1 << 20; size >= 1; size >>= 1) {
            try {
              for (let i = 0; ; i++) localStorage.setItem(`fill${size}-${i}`, 'x'.repeat(size))
            } catch { /* full */ }
          }
        }"""
    )
    asked(tab, stand_in, "first", "one")
    assert "no room for more conversations" in tab.page.inner_text(".notice.error")
    asked(tab, stand_in, "second", "two")
    assert tab.turns == ["first", "one", "second", "two"]
    assert tab.page.locator(".notice.error").count() == 1


def test_what_cannot_be_read_is_left_alone(tab: Tab) -> None:
    tab.open().page.evaluate("localStorage.setItem('pipo:v1:conversation:bad', '{')")
    tab.page.reload()
    assert "1 kept conversation could not be read" in tab.page.inner_text(".notice.error")
    assert tab.page.evaluate("localStorage.getItem('pipo:v1:conversation:bad')") == "{"


def test_a_browser_that_lets_nothing_be_kept_still_talks_and_says_so(tab: Tab, stand_in: Server) -> None:
    for name in ("localStorage", "sessionStorage"):
        denied = "throw new DOMException('denied', 'SecurityError')"
        tab.page.add_init_script(f"Object.defineProperty(window, '{name}', {{ get() {{ {denied} }} }})")
    asked(tab.open(), stand_in, "first", "one")
    assert "lets the page keep nothing" in tab.page.inner_text(".notice.error >> nth=0")
    tab.page.click("#open-settings")
    tab.page.fill("#sampling-seed", "7")
    tab.page.keyboard.press("Escape")
    tab.page.click("#theme")
    tab.ask("second")
    assert stand_in.next_answer().body["seed"] == 7


def test_another_tab_sees_the_answer_grow_and_does_not_write_into_it(tab: Tab, stand_in: Server) -> None:
    asked(tab.open(), stand_in, "first", "one")
    other = Tab(tab.page.context.new_page(), tab.url).open()
    other.page.click("#conversations >> text=first")
    tab.ask("second")
    answer = stand_in.next_answer()
    answer.say("two ")
    other.wait_for_words("two")
    assert "another tab writes it" in other.page.inner_text(".turn.assistant:last-child .cost")
    other.ask("third")
    assert "Another tab writes this answer" in other.page.inner_text(".notice")
    assert other.page.input_value("#prompt") == "third"
    answer.end()
    other.wait_for_end()
    asked(other, stand_in, "third", "three")
    tab.wait_for_words("three")
    assert tab.turns == other.turns == ["first", "one", "second", "two", "third", "three"]
    tab.page.locator(".turn.user").last.get_by_role("button", name="Delete").click()
    other.until("document.querySelectorAll('.turn').length === 4")
    other.check()


def test_a_tab_that_closes_in_the_middle_of_an_answer_leaves_it_to_the_other(tab: Tab, stand_in: Server) -> None:
    asked(tab.open(), stand_in, "first", "one")
    other = Tab(tab.page.context.new_page(), tab.url).open()
    other.page.click("#conversations >> text=first")
    other.ask("second")
    stand_in.next_answer().say("two ")
    tab.wait_for_words("two")
    other.page.close(run_before_unload=True)
    tab.wait_for_end()
    asked(tab, stand_in, "third", "three")
    assert tab.turns[-2:] == ["third", "three"]
