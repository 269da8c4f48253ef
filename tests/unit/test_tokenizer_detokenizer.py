from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.text.detokenizer import IncrementalDetokenizer
from pipo.text.tokenizer import Tokenizer
from tests.support.vocabularies import byte_pair_metadata, sentence_piece_metadata

BYTE_PAIRS = Tokenizer.from_metadata(byte_pair_metadata())
SENTENCE_PIECES = Tokenizer.from_metadata(sentence_piece_metadata())
EACH = pytest.mark.parametrize("tokenizer", [BYTE_PAIRS, SENTENCE_PIECES], ids=["gpt2", "llama"])
IDS = st.lists(st.integers(0, BYTE_PAIRS.vocab_size - 1), max_size=40)


class Bytes:
    """Token n is byte n; 256 is a control token."""

    prefixes_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"<control>" if token_id == 256 else bytes([token_id])

    def is_hidden(self, token_id: int) -> bool:
        return token_id == 256


def pieces(data: bytes) -> list[str]:
    detokenizer = IncrementalDetokenizer(Bytes())
    return [*map(detokenizer.push, data), detokenizer.flush()]


@EACH
@given(ids=IDS)
def test_pieces_join_to_what_decode_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = [token_id % tokenizer.vocab_size for token_id in ids]
    detokenizer = tokenizer.detokenizer(after=())
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == tokenizer.decode(ids)


@given(st.text())
def test_no_character_is_split(text: str) -> None:
    found = pieces(text.encode())
    assert "".join(found) == text
    assert all(len(piece) <= 1 for piece in found) and found[-1] == ""


@given(st.binary())
def test_bytes_that_are_not_utf8_become_replacements(data: bytes) -> None:
    assert "".join(pieces(data)) == data.decode("utf-8", "replace")


def test_half_a_character_is_shown_at_the_end() -> None:
    assert pieces("é".encode()[:1]) == ["", "\ufffd"]
    assert pieces("👍".encode()[:3]) == ["", "", "", "\ufffd"]


def test_control_tokens_are_not_shown() -> None:
    detokenizer = IncrementalDetokenizer(Bytes())
    assert [detokenizer.push(token_id) for token_id in (97, 256, 98)] == ["a", "", "b"]


def test_flush_holds_nothing_back() -> None:
    detokenizer = IncrementalDetokenizer(Bytes())
    assert detokenizer.push(0xC3) + detokenizer.flush() == "\ufffd"
    assert detokenizer.push(0xA9) == "\ufffd" and detokenizer.push(97) == "a"


class TestLeadingSpace:
    HELLO = SENTENCE_PIECES.encode("the", add_special=False, parse_special=False)
    BOS = SENTENCE_PIECES.special_ids.bos or 0

    def shown(self, after: list[int], tokenizer: Tokenizer = SENTENCE_PIECES) -> str:
        detokenizer = tokenizer.detokenizer(after)
        return "".join([*map(detokenizer.push, self.HELLO), detokenizer.flush()])

    def test_is_taken_away_where_text_begins(self) -> None:
        assert self.shown([]) == "the"
        assert self.shown([*self.HELLO, self.BOS]) == "the"

    def test_stays_in_a_continuation(self) -> None:
        assert self.shown([self.BOS, *self.HELLO]) == " the"

    def test_stays_where_encode_adds_none(self) -> None:
        tokenizer = Tokenizer.from_metadata(sentence_piece_metadata(add_space_prefix=False))
        assert self.shown([], tokenizer) == " the"

    def test_only_one_is_taken_away(self) -> None:
        ids = SENTENCE_PIECES.encode("  x", add_special=True, parse_special=False)
        assert SENTENCE_PIECES.decode(ids) == "  x"
