"""Modules of the page by themselves, in a browser: markdown that stays text, and rates out of counters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import browser, page_server
from tests.support.browser import Tab
from tests.support.page_server import Server, stats_of, units_of

ALLOWED = {
    "P",
    "BR",
    "EM",
    "STRONG",
    "S",
    "CODE",
    "PRE",
    "A",
    "UL",
    "OL",
    "LI",
    "H3",
    "H4",
    "H5",
    "H6",
    "HR",
    "BLOCKQUOTE",
}
ALLOWED |= {"DIV", "SPAN", "BUTTON", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD"}
MARKS = [*"*_`>-+#|[]()!<\\/&", "**", "***", "__", "~~", "```", "~~~", "1.", "2)", "###", "|-", ":-:"]
WORDS = ["a", "b", "word", "é", "漢字", "😀", "[x](y)", "http://a.b", "https://c.d/e(f)", "javascript:x", "data:,"]
HTML = ["&lt;", "<b>", "<img>", "<script>", "</p>"]
BREAKS = ["", "", " ", " ", "  ", "\n", "\n", "\n\n", "    ", "\t"]
RENDER = """async texts => {
  const { update } = await import('/static/markdown.js')
  return texts.map(text => {
    const box = document.createElement('div')
    update(box, text)
    return box.innerHTML.replaceAll(' dir="auto"', '')
  })
}"""

DIRECTED = (".user .body", ".assistant p >> nth=0", ".assistant ul", ".assistant p >> nth=1", "#conversations .open")


@pytest.fixture
def tab(chromium: Any, stand_in: Server) -> Iterator[Tab]:
    with browser.tab(chromium, stand_in.url) as opened:
        yield opened.open()
        opened.check()


@pytest.fixture(scope="module")
def shared(chromium: Any) -> Iterator[Tab]:
    """One tab for what leaves nothing behind."""
    with page_server.running() as server, browser.tab(chromium, server.url) as opened:
        yield opened.open()
        opened.check()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo", "<p>one<br>two</p>"),
        ("**bold** and *thin*", "<p><strong>bold</strong> and <em>thin</em></p>"),
        ("__bold__ and _thin_", "<p><strong>bold</strong> and <em>thin</em></p>"),
        ("***both***", "<p><strong><em>both</em></strong></p>"),
        ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
        ("**open", "<p>**open</p>"),
        ("`a < b` and ``x ` y``", "<p><code>a &lt; b</code> and <code>x ` y</code></p>"),
        ("\\*no\\*", "<p>*no*</p>"),
        ("~~gone~~", "<p><s>gone</s></p>"),
        ("# A\n###### B", "<h3>A</h3><h6>B</h6>"),
        ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("- a\n\n- b\n\nend", "<ul><li>a</li><li>b</li></ul><p>end</p>"),
        ("1. a\n\n   more\n2. b", "<ol><li>a<p>more</p></li><li>b</li></ol>"),
        ("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ],
)
def test_markdown(shared: Tab, text: str, html: str) -> None:
    assert shared.page.evaluate(RENDER, [text]) == [html]


def test_text_of_another_direction_runs_from_its_side(tab: Tab, stand_in: Server) -> None:
    tab.ask("مرحبا")
    answer = stand_in.next_answer()
    answer.say("أنا بخير!\n\n- واحد\n\nAnd English.")
    answer.end()
    tab.wait_for_words("And English.")
    found = [tab.page.locator(name).evaluate("element => element.matches(':dir(rtl)')") for name in DIRECTED]
    assert found == [True, True, True, False, True]
    tab.page.fill("#prompt", "שלום")
    assert tab.page.locator("#prompt").evaluate("element => element.matches(':dir(rtl)')")


def test_code_keeps_every_character_and_ends_at_its_fence(shared: Tab) -> None:
    [html] = shared.page.evaluate(RENDER, ["```c++\na < b && *c*\n\n  d\n```\nafter"])
    assert "<code>a &lt; b &amp;&amp; *c*\n\n  d</code>" in html
    assert html.endswith("<p>after</p>")
    [html] = shared.page.evaluate(RENDER, ["```\nnot over"])  # as it looks while it is written
    assert "<code>not over</code>" in html


def test_tables(shared: Tab) -> None:
    [html] = shared.page.evaluate(RENDER, ["| a | b |\n|:--|--:|\n| **x** | y \\| z |\n| w |"])
    assert '<th class="align-start">a</th><th class="align-end">b</th>' in html
    assert '<td class="align-start"><strong>x</strong></td><td class="align-end">y | z</td>' in html
    assert '<td class="align-start">w</td><td class="align-end"></td>' in html


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "[x](javascript:alert(1))",
        "[x]( java\nscript:alert(1))",
        "[x](data:text/html,<script>alert(1)</script>)",
        "![x](https://elsewhere.example/x.png)",
        '[x](https://a.example/" onmouseover="alert(1))',
        "`<img src=x onerror=alert(1)>`",
        "```<img src=x>\n<img src=x onerror=alert(1)>\n```",
        "| <img src=x onerror=alert(1)> |\n|---|\n| <svg onload=alert(1)> |",
        "&lt;img src=x onerror=alert(1)&gt;",
    ],
)
def test_a_models_text_stays_text(tab: Tab, stand_in: Server, text: str) -> None:
    """In a whole conversation; that nothing is fetched from elsewhere and no policy is hurt, the fixture checks."""
    tab.ask("hello")
    answer = stand_in.next_answer()
    answer.think(text)
    answer.say(text)
    answer.end()
    tab.wait_for_end()
    inside = "[...document.querySelectorAll('.turn *')]"
    assert not tab.page.evaluate(f"{inside}.some(e => ['IMG', 'SCRIPT', 'SVG', 'IFRAME'].includes(e.tagName))")
    assert not tab.page.evaluate(f"{inside}.some(e => [...e.attributes].some(a => a.name.startsWith('on')))")
    links = tab.page.evaluate("[...document.querySelectorAll('.turn a')].map(a => a.protocol + a.rel)")
    assert all(link == "https:noopener noreferrer nofollow" for link in links)


def test_any_text_gives_known_elements_and_loses_no_word(shared: Tab) -> None:
    """A thousand random texts; also that growing one piece by piece ends as the whole does."""
    draw = random.Random(20261129)
    texts = [random_text(draw) for _ in range(1000)]
    found = shared.page.evaluate(
        """async texts => {
          const { update } = await import('/static/markdown.js')
          return texts.map(text => {
            const whole = document.createElement('div')
            const grown = document.createElement('div')
            update(whole, text)
            for (let end = 0; end <= text.length; end += 7) update(grown, text.slice(0, end))
            update(grown, text)
            const elements = [...whole.querySelectorAll('*')]
            return {
              tags: [...new Set(elements.map(e => e.tagName))],
              urls: elements.filter(e => e.hasAttribute('href')).map(e => e.protocol),
              isSame: whole.innerHTML === grown.innerHTML,
              text: whole.textContent,
            }
          })
        }""",
        texts,
    )
    for text, one in zip(texts, found, strict=True):
        assert set(one["tags"]) <= ALLOWED, text
        assert set(one["urls"]) <= {"http:", "https:"}, text
        assert one["isSame"], text
        assert one["text"].count("漢字") == text.count("漢字"), text


def random_text(draw: random.Random) -> str:
    num = draw.randrange(1, 40)
    return "".join(draw.choice(MARKS + WORDS + HTML) + draw.choice(BREAKS) for _ in range(num))


WALLS = ["*", "_", "`", "[", "> ", "- ", "**a ", "`` ` ", "![", "~~", "|", "a_", "[a](", "  - "]


@pytest.mark.parametrize("piece", WALLS)
def test_walls_of_marks_are_not_searched_again_and_again(shared: Tab, piece: str) -> None:
    """50,000 characters. Counted are those that indexOf passes over: quadratic would be a hundred times the bound."""
    passed, html = shared.page.evaluate(
        """async text => {
          const { update } = await import('/static/markdown.js')
          const find = String.prototype.indexOf
          let passed = 0
          String.prototype.indexOf = function (mark, from = 0) {
            const at = find.call(this, mark, from)
            passed += (at === -1 ? this.length : at) - from
            return at
          }
          const box = document.createElement('div')
          update(box, text)
          String.prototype.indexOf = find
          return [passed, box.innerHTML]
        }""",
        piece * (50_000 // len(piece)),
    )
    assert html
    assert passed <= 20 * 50_000


def test_a_device_has_its_own_bar_and_its_units_a_place_on_the_map(tab: Tab, stand_in: Server) -> None:
    units = units_of(80, resident=(0, 1, 2))
    for unit in units[:2]:
        unit["home"] = "device"
    stand_in.state.units = units
    stand_in.state.device = {
        "name": "GPU",
        "limit_bytes": 100,
        "breakdown_bytes": {"resident weights": 60, "slots": 20},
    }
    tab.page.reload()
    tab.page.click("#to-pipeline")
    tab.page.wait_for_selector("#p-device")
    bar = tab.page.get_attribute("#pipeline section:has(#p-device) .stack", "aria-label")
    assert bar.replace("\u00a0", " ").endswith("resident weights 60 B, slots 20 B")
    label = tab.page.get_attribute("canvas.map", "aria-label")
    assert label.startswith("Map of 161 units in the order of a pass: 2 on the device, 1 in memory, 158 on the drive.")


def test_a_server_without_a_plan_is_no_trouble(tab: Tab, stand_in: Server) -> None:
    stand_in.state.units = []
    tab.page.reload()
    tab.page.click("#to-pipeline")
    tab.page.wait_for_selector("#p-memory")
    assert tab.page.is_hidden("canvas.map")


def rates(tab: Tab, polls: list[dict[str, Any]]) -> list[float | None]:
    """Bytes a second of each interval after these polls."""
    found: list[float | None] = tab.page.evaluate(
        """async polls => {
          const { History } = await import('/static/stats.js')
          const history = new History()
          for (const poll of polls) history.add(poll)
          return [...history.intervals.map(one => one.rates && one.rates.bytes_read), history.now.bytes_read]
        }""",
        polls,
    )
    return found


def poll(server: Server, now: float, **engine: float) -> dict[str, Any]:
    stats: dict[str, Any] = stats_of(server.state)
    return stats | {"now": now, "uptime_s": now, "engine": stats["engine"] | engine}


def test_rates_are_differences_by_the_servers_clock(tab: Tab, stand_in: Server) -> None:
    polls = [poll(stand_in, 10 + 2 * i, bytes_read=600 * i, num_passes=i, num_running=1) for i in range(3)]
    assert rates(tab, polls) == [300, 300, 300]


def test_a_pass_of_many_seconds_is_shared_out_over_them(tab: Tab, stand_in: Server) -> None:
    """Counters move at its end: one second did not read what ten did."""
    counts = [(0, 0), (0, 0), (0, 0), (900, 1), (900, 1)]
    polls = [
        poll(stand_in, 10 + i, bytes_read=read, num_passes=num, num_running=1) for i, (read, num) in enumerate(counts)
    ]
    assert rates(tab, polls) == [300, 300, 300, None, 300]


def test_a_server_that_began_anew_begins_a_new_history(tab: Tab, stand_in: Server) -> None:
    polls = [poll(stand_in, 50 + i, bytes_read=900 * i, num_passes=i) for i in range(2)]
    again = poll(stand_in, 52, bytes_read=5, num_passes=1) | {"uptime_s": 1}
    assert rates(tab, [*polls, again]) == [0]
