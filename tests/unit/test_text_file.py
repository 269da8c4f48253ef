"""Files as token ids, piece by piece: the same ids as of the whole text, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo.base.errors import UsageError
from pipo.text import text_file
from pipo.text.pretokenizers import PRE_TOKENIZERS
from pipo.text.text_file import encode_file
from pipo.text.tokenizer import Tokenizer
from tests.support.texts import mixed_texts
from tests.support.vocabularies import byte_pair_metadata, sentence_piece_metadata

ALL = 1 << 40
TEXT = " ".join(mixed_texts(seed=11, count=400))
BYTE_PAIRS = Tokenizer.from_metadata(byte_pair_metadata())
SENTENCE_PIECES = Tokenizer.from_metadata(sentence_piece_metadata())
NAMES = sorted({pre: name for name, pre in reversed(PRE_TOKENIZERS.items()) if pre.is_byte_level}.values())


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text.removesuffix("\n"), add_special=True, parse_special=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tmp_path / "text.txt"


@pytest.fixture
def _cut_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "_LEAST_CHARS", 300)
    monkeypatch.setattr(text_file, "_READ_BYTES", 1001)


@pytest.mark.usefixtures("_cut_often")
@pytest.mark.parametrize("name", NAMES)
def test_the_ids_are_those_of_the_whole_text_for_every_pre_tokenizer(text: Path, name: str) -> None:
    """The merges of this vocabulary span words: a cut inside a word of a pre-tokenizer's shows."""
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata(pre=name))
    text.write_text(TEXT, newline="")
    assert list(encode_file(text, tokenizer, ALL)) == whole(tokenizer, TEXT)


@pytest.mark.usefixtures("_cut_often")
def test_sentence_pieces_get_one_space_in_front_and_a_begin_token(text: Path) -> None:
    text.write_text(TEXT, newline="")
    ids = list(encode_file(text, SENTENCE_PIECES, ALL))
    assert ids == whole(SENTENCE_PIECES, TEXT)
    assert ids[0] == SENTENCE_PIECES.special_ids.bos and SENTENCE_PIECES.prefixes_space


def test_special_tokens_are_text_and_no_end_token_follows(text: Path) -> None:
    tokenizer = Tokenizer.from_metadata(byte_pair_metadata(add_eos_token=True, add_bos_token=True))
    text.write_text("a<|eos|>b")
    ids = list(encode_file(text, tokenizer, ALL))
    assert ids[0] == tokenizer.special_ids.bos and tokenizer.special_ids.eos not in ids
    assert tokenizer.decode(ids) == "a<|eos|>b"


@pytest.mark.parametrize(
    ("written", "read"), [("a b\n", "a b"), ("a b\n\n", "a b\n"), ("a b", "a b"), ("a\r\n", "a\r")]
)
def test_one_newline_at_the_end_is_left_out(text: Path, written: str, read: str) -> None:
    text.write_text(written, newline="")
    assert list(encode_file(text, BYTE_PAIRS, ALL)) == BYTE_PAIRS.encode(read, add_special=True, parse_special=False)


def test_a_newline_at_the_end_of_a_read_is_kept(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "_READ_BYTES", 4)
    text.write_text("abc\ndef\n\u00e9\u00e9\n")
    assert list(encode_file(text, BYTE_PAIRS, ALL)) == whole(BYTE_PAIRS, "abc\ndef\néé\n")


def test_no_more_is_read_than_is_wanted(text: Path) -> None:
    text.write_bytes(TEXT.encode() + b"\xff")
    ids = encode_file(text, BYTE_PAIRS, 100)
    assert list(ids) == whole(BYTE_PAIRS, TEXT)[:100]


@pytest.mark.parametrize("before", [0, 3, 16383, 16384, 20000])
@pytest.mark.parametrize(
    ("bad", "byte"), [(b"\xff", "0xFF"), (b"\xc3", "0xC3"), (b"\xc3(", "0xC3"), (b"\xed\xa0\x80", "0xED")]
)
def test_what_is_not_utf_8_is_refused_with_its_place(text: Path, before: int, bad: bytes, byte: str) -> None:
    text.write_bytes(b"word " * (before // 5) + b"x" * (before % 5) + bad)
    with pytest.raises(UsageError, match=f"byte {before} is {byte}"):
        encode_file(text, BYTE_PAIRS, ALL)


@pytest.mark.parametrize("data", [b"", b"\n"])
def test_an_empty_file_is_refused(text: Path, data: bytes) -> None:
    text.write_bytes(data)
    with pytest.raises(UsageError, match="is empty"):
        encode_file(text, BYTE_PAIRS, ALL)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            encode_file(path, BYTE_PAIRS, ALL)


def test_a_text_that_cannot_be_cut_is_refused(text: Path) -> None:
    text.write_text("x" * 100_000)
    with pytest.raises(UsageError, match="without a border between words"):
        encode_file(text, BYTE_PAIRS, ALL)
