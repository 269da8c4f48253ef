"""text.special_tokens.SpecialMatcher against the rule in plain words, and against vocabularies made to be slow."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.text.special_tokens import SpecialMatcher
from pipo.text.tokenizer import Tokenizer
from tests.support.vocabularies import byte_pair_metadata

MAX_CPU_S = 3.0  # a hundredth of what trying every length at every place takes here


def cut(text: str, token_ids: dict[str, int]) -> list[str | int]:
    """The leftmost match first, of several there the longest."""
    for start in range(len(text)):
        found = max((token for token in token_ids if text.startswith(token, start)), key=len, default=None)
        if found is not None:
            before: list[str | int] = [text[:start]] if start else []
            return [*before, token_ids[found], *cut(text[start + len(found) :], token_ids)]
    return [text] if text else []


WORDS = st.text("ab", min_size=1, max_size=6) | st.sampled_from(["a" * 64, "a" * 65, "a" * 300, "b" * 256 + "a"])


@given(st.sets(WORDS, max_size=12), st.lists(WORDS | st.just("c"), max_size=12).map("".join))
def test_the_leftmost_then_the_longest(tokens: set[str], text: str) -> None:
    token_ids = {token: idx for idx, token in enumerate(sorted(tokens))}
    assert list(SpecialMatcher(token_ids).split(text)) == cut(text, token_ids)


NUM = 12_000


@pytest.mark.parametrize(
    ("tokens", "text", "num_pieces"),
    [
        (["a" * n + "b" for n in range(1, NUM)], "a" * NUM, 1),
        (["a" * n + "b" for n in range(1, NUM)], "a" * NUM + "c", 1),
        (["a" * n for n in range(1, NUM)], "ab" * (NUM // 2), NUM),
        (["b" * n + "a" for n in range(1, NUM)], "b" * NUM, 1),
    ],
    ids=["ends too early", "ends in another", "many begin alike", "begins later"],
)
def test_a_hostile_vocabulary_costs_no_minutes(tokens: list[str], text: str, num_pieces: int) -> None:
    begun_s = time.process_time()
    pieces = list(SpecialMatcher({token: idx for idx, token in enumerate(tokens)}).split(text))
    assert len(pieces) == num_pieces
    assert time.process_time() - begun_s < MAX_CPU_S


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "unknown", "fim_pad"])
@pytest.mark.parametrize("token_id", [-1, 10**6, 1 << 31])
def test_a_role_beyond_the_vocabulary_is_none(role: str, token_id: int, caplog: pytest.LogCaptureFixture) -> None:
    """As llama.cpp has it: such files run."""
    name = f"{role}_token_id"
    found = Tokenizer.from_metadata(byte_pair_metadata(**{name: token_id})).special_ids
    assert found == Tokenizer.from_metadata(byte_pair_metadata(**{name: None})).special_ids
    assert f"tokenizer.ggml.{name} token={token_id} action=ignored" in caplog.text
