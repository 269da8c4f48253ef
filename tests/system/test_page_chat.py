"""The page's chat against a server that says what the test says, refuses, breaks off, and sees who hangs up."""

from __future__ import annotations

import pytest

from tests.support.browser import Tab
from tests.support.page_server import Server, asked

LONG = "\n\n".join(f"Paragraph {i} of many." for i in range(60))


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


def test_the_keyboard_goes_on_where_what_had_the_focus_went_away(tab: Tab, stand_in: Server) -> None:
    long = "word " * 1500 + "end"
    asked(tab.open(), stand_in, "first", long)
    asked(tab, stand_in, "second", "two")
    tab.ask("third")
    answer = stand_in.next_answer()
    answer.say(long)
    tab.wait_for_words(long)
    tab.page.focus("#stop")
    tab.page.keyboard.press("Enter")
    tab.wait_for_end()
    assert tab.page.evaluate("document.activeElement.id") == "prompt"
    tab.page.locator(".turn.user").nth(1).get_by_role("button", name="Delete").focus()  # which scrolls up to it
    tab.page.wait_for_selector("#latest")
    top = tab.page.evaluate("document.querySelector('#log').scrollTop")
    tab.page.keyboard.press("Enter")
    tab.until("document.querySelectorAll('.turn').length === 4")
    assert tab.page.evaluate("document.activeElement.id") == "prompt"
    assert tab.page.evaluate("document.querySelector('#log').scrollTop") == top > 0  # and the reader stays there
    tab.page.get_by_role("button", name="Close this note").first.focus()
    tab.page.keyboard.press("Enter")
    assert tab.page.evaluate("document.activeElement.id") == "prompt"
