"""The page's chat against a server that says what the test says, refuses, breaks off, and sees who hangs up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import browser
from tests.support.browser import Tab
from tests.support.page_server import Server

LONG = "\n\n".join(f"Paragraph {i} of many." for i in range(60))


@pytest.fixture
def tab(chromium: Any, stand_in: Server) -> Iterator[Tab]:
    """Errors that the browser itself reports of refused requests are looked at by the tests that cause them."""
    with browser.tab(chromium, stand_in.url, viewport={"width": 1280, "height": 800}) as opened:
        yield opened
        opened.errors = [error for error in opened.errors if not error.startswith("Failed to load resource")]
        opened.check()


def asked(tab: Tab, server: Server, text: str = "hello", answer: str = "Good day.") -> None:
    """One question and its whole answer."""
    tab.ask(text)
    request = server.next_answer()
    request.say(answer)
    request.end()
    tab.wait_for_words(answer)
    tab.wait_for_end()


def test_words_show_before_the_answer_is_whole(tab: Tab, stand_in: Server) -> None:
    tab.open().ask("hello")
    answer = stand_in.next_answer()
    answer.say("Good ")
    tab.wait_for_words("Good")
    answer.say("day.")
    tab.wait_for_words("Good day.")
    assert tab.page.is_visible("#stop")
    answer.end()
    tab.wait_for_end()
    assert tab.page.is_hidden("#stop")
    assert "2 tokens" in tab.page.inner_text(".turn.assistant .cost").replace("\u00a0", " ")


def test_a_request_says_only_what_was_set(tab: Tab, stand_in: Server) -> None:
    tab.open().page.click("#open-settings")
    tab.until("document.querySelector('#sampling-temperature').placeholder === '0.8'")  # as /props says
    tab.page.fill("#system", "Be brief.")
    tab.page.fill("#sampling-temperature", "0.25")
    tab.page.fill("#sampling-seed", "7")
    tab.page.keyboard.press("Escape")
    tab.ask("hello")
    assert stand_in.next_answer().body == {
        "model": "smollm2",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.25,
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [("top_p", "1.5", "1 or less"), ("max_tokens", "2.5", "whole number"), ("seed", "x", "not a number")],
)
def test_a_setting_that_cannot_be_is_refused_in_place_and_loses_nothing(
    tab: Tab, stand_in: Server, field: str, text: str, words: str
) -> None:
    tab.open().page.click("#open-settings")
    tab.page.fill(f"#sampling-{field}", text)
    assert words in tab.page.inner_text(f"#sampling-{field}-help")
    tab.page.keyboard.press("Escape")
    tab.ask("hello")
    assert words in tab.page.inner_text(".notice.error")
    assert tab.page.input_value("#prompt") == "hello"
    assert stand_in.state.answers.empty()


def test_stop_hangs_up(tab: Tab, stand_in: Server) -> None:
    tab.open().ask("hello")
    answer = stand_in.next_answer()
    answer.say("Good ")
    tab.wait_for_words("Good")
    tab.page.keyboard.press("Escape")
    tab.wait_for_end()
    assert answer.gone.wait(20)
    assert tab.answers == ["Good"]


def test_reasoning_is_folded_and_not_sent_back(tab: Tab, stand_in: Server) -> None:
    tab.open().ask("hello")
    answer = stand_in.next_answer()
    answer.think("Somebody greets. ", "Greet back.")
    tab.page.wait_for_selector("text=Reasoning, 4 words so far")
    answer.say("Good day.")
    answer.end()
    tab.wait_for_end()
    assert tab.page.is_hidden(".reasoning-text")
    tab.page.click(".reasoning summary")
    assert tab.page.inner_text(".reasoning-text") == "Somebody greets. Greet back."
    tab.ask("again")
    assert stand_in.next_answer().body["messages"][1] == {"role": "assistant", "content": "Good day."}


def test_a_refusal_is_shown_in_the_servers_words_and_can_be_tried_again(tab: Tab, stand_in: Server) -> None:
    words = "the prompt has 600 tokens, the context 512\n\nhint: <b>shorten</b> it"
    stand_in.state.refusals.append((400, words))
    tab.open().ask("hello")
    tab.wait_for_end()
    assert tab.page.inner_text(".turn-error.is-error") == words
    assert tab.page.text_content("#alert") == words  # said at once
    tab.page.click("text=Try again")
    answer = stand_in.next_answer()
    answer.say("Good day.")
    answer.end()
    tab.wait_for_words("Good day.")
    assert tab.turns == ["hello", "Good day."]


def test_an_error_in_the_stream_keeps_the_words_before_it(tab: Tab, stand_in: Server) -> None:
    tab.open().ask("hello")
    answer = stand_in.next_answer()
    answer.say("Good ")
    answer.fail("the drive refused to read")
    tab.page.wait_for_selector("text=the drive refused to read")
    assert tab.answers == ["Good"]


def test_a_connection_that_ends_early_is_not_taken_for_a_whole_answer(tab: Tab, stand_in: Server) -> None:
    tab.open().ask("hello")
    stand_in.next_answer().say("Good ")
    tab.wait_for_words("Good")
    stand_in.state.closing.set()
    tab.page.wait_for_selector(".turn-error.is-error")
    assert "ended before the answer did" in tab.page.inner_text(".turn-error.is-error")


def test_a_key_is_asked_for_kept_for_the_tab_and_sent(tab: Tab, stand_in: Server) -> None:
    stand_in.state.key = "secret"
    tab.page.goto(stand_in.url)
    tab.page.wait_for_selector("#ask-key[open]")
    assert "missing API key" in tab.page.inner_text("#ask-key-words")
    tab.page.fill("#ask-key-input", "wrong")
    tab.page.keyboard.press("Enter")
    tab.ask("hello")
    tab.page.wait_for_selector("#ask-key[open]")
    tab.page.fill("#ask-key-input", "secret")
    tab.page.keyboard.press("Enter")
    answer = stand_in.next_answer()  # what was asked is asked again
    assert answer.authorization == "Bearer secret"
    answer.say("Good day.")
    answer.end()
    tab.wait_for_words("Good day.")
    assert tab.page.evaluate("JSON.stringify(localStorage)").find("secret") == -1
    tab.page.reload()
    tab.until("document.querySelector('#empty-lead').textContent !== ''")
    assert tab.page.is_hidden("#ask-key")


def test_editing_a_message_asks_again_from_there_and_can_be_undone(tab: Tab, stand_in: Server) -> None:
    asked(tab.open(), stand_in, "first", "one")
    asked(tab, stand_in, "second", "two")
    tab.page.locator(".turn.user").first.get_by_role("button", name="Edit").click()
    assert tab.page.input_value(".edit textarea") == "first"
    tab.page.fill(".edit textarea", "other")
    tab.page.keyboard.press("Enter")
    answer = stand_in.next_answer()
    assert answer.body["messages"] == [{"role": "user", "content": "other"}]
    answer.say("three")
    answer.end()
    tab.wait_for_words("three")
    tab.wait_for_end()
    assert tab.turns == ["other", "three"]
    tab.page.click("text=Undo")
    assert tab.turns == ["first", "one", "second", "two"]


def test_answering_again_replaces_the_answer_and_can_be_undone(tab: Tab, stand_in: Server) -> None:
    asked(tab.open(), stand_in, "first", "one")
    tab.page.click("text=Answer again")
    answer = stand_in.next_answer()
    assert answer.body["messages"] == [{"role": "user", "content": "first"}]
    answer.say("two")
    answer.end()
    tab.wait_for_words("two")
    tab.wait_for_end()
    assert tab.turns == ["first", "two"]
    tab.page.click("text=Undo")
    assert tab.turns == ["first", "one"]


def test_deleting_a_message_takes_its_answer_and_can_be_undone(tab: Tab, stand_in: Server) -> None:
    asked(tab.open(), stand_in, "first", "one")
    asked(tab, stand_in, "second", "two")
    tab.page.locator(".turn.user").first.get_by_role("button", name="Delete").click()
    assert tab.turns == ["second", "two"]
    tab.page.click("text=Undo")
    assert tab.turns == ["first", "one", "second", "two"]


def test_an_answer_goes_on_while_another_conversation_is_open(tab: Tab, stand_in: Server) -> None:
    tab.open().ask("first")
    first = stand_in.next_answer()
    first.say("one ")
    tab.wait_for_words("one")
    tab.page.click("#new")
    asked(tab, stand_in, "second", "two")
    first.say("more")
    first.end()
    tab.page.wait_for_selector("#conversations li:not(.running) >> text=first")
    tab.page.click("#conversations >> text=first")
    assert tab.turns == ["first", "one more"]


def test_a_deleted_conversation_stays_deleted_and_its_answer_stops(tab: Tab, stand_in: Server) -> None:
    tab.open().ask("first")
    answer = stand_in.next_answer()
    answer.say("one ")
    tab.wait_for_words("one")
    tab.page.get_by_role("button", name="Delete: first").click()
    assert answer.gone.wait(20)
    tab.page.reload()
    tab.until("document.querySelector('#empty-lead').textContent !== ''")
    assert tab.page.locator("#conversations li").count() == 0


def test_the_reader_who_scrolls_up_is_left_there(tab: Tab, stand_in: Server) -> None:
    tab.open().ask("hello")
    answer = stand_in.next_answer()
    answer.say(LONG)
    tab.wait_for_words("Paragraph 59")
    tab.until("document.querySelector('#latest').hidden")  # it followed
    tab.page.hover("#log")
    tab.page.mouse.wheel(0, -300)
    tab.page.wait_for_selector("#latest")
    top = tab.page.evaluate("document.querySelector('#log').scrollTop")
    answer.say("\n\nThe end.")
    tab.wait_for_words("The end.")
    assert tab.page.evaluate("document.querySelector('#log').scrollTop") == top
    tab.page.click("#latest")
    answer.say("\n\nReally.")
    tab.wait_for_words("Really.")
    tab.until("document.querySelector('#latest').hidden")


def test_a_screen_reader_hears_paragraphs_not_tokens(tab: Tab, stand_in: Server) -> None:
    tab.open()
    tab.page.evaluate(
        """() => {
          window.heard = []
          new MutationObserver(changes => changes.forEach(c => c.addedNodes.forEach(n => heard.push(n.textContent))))
            .observe(document.querySelector('#live'), { childList: true })
        }"""
    )
    tab.ask("hello")
    answer = stand_in.next_answer()
    for text in ("Good ", "day ", "to you.\n\n", "How ", "are ", "you?"):
        answer.say(text)
    tab.wait_for_words("How are you?")
    assert tab.page.get_attribute(".turn.assistant", "aria-busy") == "true"
    answer.end()
    tab.wait_for_end()
    heard = tab.page.evaluate("window.heard")
    assert heard[:3] == ["Answering.", "Good day to you.", "How are you?"]
    assert heard[3].startswith("Answer complete, 6 tokens")


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


def test_a_model_that_is_still_loading_is_waited_for(tab: Tab, stand_in: Server) -> None:
    stand_in.state.loading = "the model is being loaded: 40 %"
    tab.page.goto(stand_in.url)
    tab.page.wait_for_selector("text=the model is being loaded: 40 %")
    assert not tab.page.evaluate("document.querySelector('#strip').classList.contains('is-down')")
    stand_in.state.loading = ""
    tab.until("document.querySelector('#strip-text').textContent.startsWith('At rest')")


def test_what_the_engine_does_is_said_until_the_first_word(tab: Tab, stand_in: Server) -> None:
    tab.open()
    stand_in.state.count(unread=340)
    tab.ask("hello")
    tab.page.wait_for_selector("text=Reading the prompt, 340 tokens to go")
    stand_in.state.count(unread=-340, waiting=1)
    tab.page.wait_for_selector("text=Waiting for a place: others are being answered")
    tab.page.wait_for_selector("text=/others are being answered · [1-9]/")  # seconds
    answer = stand_in.next_answer()
    answer.say("Good day.")
    tab.wait_for_words("Good day.")
    tab.until("!/Waiting|Reading/.test(document.querySelector('.turn.assistant .cost').textContent)")


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
