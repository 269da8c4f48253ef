"""Where merges can be said by scores, sentence pieces give the ids that the merges give."""

from __future__ import annotations

from array import array

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE

from pipo.text.piece_scores import Merge, NoScoresError, doubtful_texts, scores_of
from pipo.text.sentence_pieces import SentencePieces
from pipo.text.vocabulary import TokenKind

LETTERS = "ab▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
Words = list[str]


def tokens_with(wholes: Words) -> tuple[list[str], bytearray]:
    tokens = ["<unk>", *BYTES, *LETTERS, *wholes]
    kinds = [TokenKind.UNKNOWN] + [TokenKind.BYTE] * 256 + [TokenKind.NORMAL] * (len(LETTERS) + len(wholes))
    return tokens, bytearray(kinds)


def merges_of(wholes: Words) -> list[Merge]:
    """As transformers makes them of a model's pieces, the best first: every way to join two pieces to one."""
    pieces = {*LETTERS, *wholes}
    return [
        (whole[:cut], whole[cut:])
        for whole in wholes
        for cut in range(1, len(whole))
        if whole[:cut] in pieces and whole[cut:] in pieces
    ]


def ids_by_merges(tokens: Words, merges: list[Merge], text: str) -> list[int]:
    engine = Engine(BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True))
    return list(engine.encode(text, add_special_tokens=False).ids)


_WHOLES = st.lists(st.text(LETTERS, min_size=2, max_size=5), max_size=14, unique=True)


@given(wholes=_WHOLES, shortest_first=st.booleans(), text=st.text(LETTERS + "c ", max_size=24))
@settings(max_examples=400, deadline=None)
def test_ids_are_those_of_the_merges(wholes: Words, shortest_first: bool, text: str) -> None:
    wholes = sorted(wholes, key=len) if shortest_first else wholes  # so that most can be said
    (tokens, kinds), merges = tokens_with(wholes), merges_of(wholes)
    try:
        scores = scores_of(tokens, kinds, merges)
    except NoScoresError:
        assume(False)
    pieces = SentencePieces({t: i for i, t in enumerate(tokens)}, kinds, array("f", scores), 0)
    marked = text.replace(" ", "▁")
    assert pieces.encode(text) == ids_by_merges(tokens, merges, marked)


def test_texts_in_which_merges_to_one_whole_overlap() -> None:
    first = [("o", "n"), ("on", "i"), ("i", "on")]
    assert list(doubtful_texts([*first, ("on", "ion"), ("oni", "on")])) == ["onionion"]
    assert list(doubtful_texts([*first, ("oni", "on"), ("on", "ion")])) == []  # the leftmost is the first
    assert set(doubtful_texts([("a", "a"), ("aa", "a"), ("a", "aa")])) == {"a" * n for n in (4, 5, 6, 7, 8)}
    touching = [("b", "aaa"), ("aa", "a"), ("a", "aa")]  # a whole that becomes part of a better one
    assert {"baaa", "aaaaaa"} <= set(doubtful_texts(touching))
