from __future__ import annotations

import signal
from array import array
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.base.errors import MalformedFile, PipoError, UnsupportedModel, UsageError
from pipo.formats.gguf import open_gguf
from pipo.text import byte_pairs
from pipo.text.sentence_pieces import SentencePieces
from pipo.text.tokenizer import Tokenizer
from pipo.text.vocabulary import TokenKind
from tests.support.gguf_bytes import GgufBytes, count_key, write
from tests.support.vocabularies import DictMetadata, byte_pair_metadata, sentence_piece_metadata

Maker = Callable[..., DictMetadata]
BOTH = pytest.mark.parametrize("make", [byte_pair_metadata, sentence_piece_metadata])

BYTE_PAIRS = Tokenizer.from_metadata(byte_pair_metadata())
SENTENCE_PIECES = Tokenizer.from_metadata(sentence_piece_metadata())


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    by_text = {tokenizer.token_text(idx): idx for idx in range(tokenizer.vocab_size)}
    return [by_text[text] for text in texts]


def tiny_pieces(**scores: float) -> Tokenizer:
    """SentencePiece with just these tokens and no bytes; the score of unknown ones is 0."""
    tokens = ["<unk>", "<s>", "</s>", *scores]
    return Tokenizer.from_metadata(
        DictMetadata(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [2, 3, 3, *[1] * len(scores)],
                "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *scores.values()],
                "tokenizer.ggml.add_space_prefix": False,
                "tokenizer.ggml.add_bos_token": False,
            }
        )
    )


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    ids = tokenizer.encode(text, add_special=True, parse_special=False)
    return [tokenizer.token_text(token_id) for token_id in ids]


class TestRoundTrip:
    @pytest.mark.parametrize("tokenizer", [BYTE_PAIRS, SENTENCE_PIECES], ids=["gpt2", "llama"])
    @given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])), add_special=st.booleans())
    def test_decode_inverts_encode(self, tokenizer: Tokenizer, text: str, add_special: bool) -> None:
        assert tokenizer.decode(tokenizer.encode(text, add_special=add_special, parse_special=False)) == text

    @given(st.text("a b\n▁é", max_size=200))
    def test_words_beyond_the_cache(self, text: str) -> None:
        word = text + "x" * 65
        ids = SENTENCE_PIECES.encode(word, add_special=False, parse_special=False)
        assert SENTENCE_PIECES.decode(ids) == word.replace("▁", " ")

    def test_invalid_bytes_become_replacement_characters(self) -> None:
        start, end = ids_of(SENTENCE_PIECES, "<0xC3>", "<0xA9>")
        assert SENTENCE_PIECES.decode([start, end]) == "é"
        assert SENTENCE_PIECES.decode([start, start, end]) == "\ufffdé"

    @pytest.mark.parametrize("text", ["\ud83d", "a\udc80b", "ok \udfff"])
    @BOTH
    def test_lone_surrogates_are_refused(self, make: Maker, text: str) -> None:
        with pytest.raises(UsageError, match=r"lone surrogate U\+D"):
            Tokenizer.from_metadata(make()).encode(text, add_special=True, parse_special=True)


class TestSpecialTokens:
    @pytest.mark.parametrize(
        ("tokenizer", "control"), [(BYTE_PAIRS, "<|im_end|>"), (SENTENCE_PIECES, "<turn>")], ids=["gpt2", "llama"]
    )
    def test_control_tokens_are_text_unless_asked_for(self, tokenizer: Tokenizer, control: str) -> None:
        text = f"a{control}b"
        token_id = ids_of(tokenizer, control)[0]
        assert token_id not in tokenizer.encode(text, add_special=False, parse_special=False)
        assert token_id in tokenizer.encode(text, add_special=False, parse_special=True)

    @pytest.mark.parametrize("parse_special", [False, True])
    def test_user_defined_tokens_are_always_found(self, parse_special: bool) -> None:
        for tokenizer in (BYTE_PAIRS, SENTENCE_PIECES):
            user = ids_of(tokenizer, "<user>")[0]
            ids = tokenizer.encode("<user><user", add_special=False, parse_special=parse_special)
            assert ids[0] == user and ids.count(user) == 1

    @pytest.mark.parametrize("tokenizer", [BYTE_PAIRS, SENTENCE_PIECES], ids=["gpt2", "llama"])
    @pytest.mark.parametrize("text", ["the tide rises and falls. ", "aaaa", "日本", "   ", "<user>"])
    def test_a_text_is_longer_only_if_it_is(self, tokenizer: Tokenizer, text: str) -> None:
        text *= 20_000
        count = len(tokenizer.encode(text, add_special=False, parse_special=True))
        assert not tokenizer.is_longer(text, count, parse_special=True)
        assert tokenizer.is_longer(text, count * 2 // 3 - 64, parse_special=True)
        assert len(text.encode()) <= count * tokenizer.longest_token_bytes

    def test_bytes_written_out_stay_text(self) -> None:
        byte = ids_of(SENTENCE_PIECES, "<0x41>")[0]
        assert byte not in SENTENCE_PIECES.encode("<0x41>", add_special=False, parse_special=True)

    def test_text_that_spells_a_control_token_is_never_merged_to_it(self) -> None:
        scores = {"<": -1.0, "s": -2.0, ">": -3.0, "<s": -4.0}
        assert spelled(tiny_pieces(**scores), "<s>") == ["<s", ">"]

    def test_longest_match_wins(self) -> None:
        metadata = byte_pair_metadata()
        tokens = [*metadata.strings("tokenizer.ggml.tokens"), "<user>s"]
        kinds = [*metadata.array("tokenizer.ggml.token_type"), 4]
        tokenizer = Tokenizer.from_metadata(metadata.changed({"tokens": tokens, "token_type": kinds}))
        ids = tokenizer.encode("<user>s<user>", add_special=False, parse_special=False)
        assert [tokenizer.token_text(token_id) for token_id in ids] == ["<user>s", "<user>"]

    @BOTH
    def test_begin_and_end_follow_the_metadata(self, make: Maker) -> None:
        tokenizer = Tokenizer.from_metadata(make(add_bos_token=True, add_eos_token=True))
        bos, eos = tokenizer.special_ids.bos, tokenizer.special_ids.eos
        assert tokenizer.encode("", add_special=True, parse_special=False) == [bos, eos]
        assert tokenizer.encode("", add_special=False, parse_special=False) == []

    def test_begin_where_the_file_does_not_say(self) -> None:
        def begins(metadata: DictMetadata) -> bool:
            tokenizer = Tokenizer.from_metadata(metadata)
            return tokenizer.encode("", add_special=True, parse_special=False) == [tokenizer.special_ids.bos]

        assert begins(sentence_piece_metadata())
        assert begins(byte_pair_metadata(pre="llama-bpe"))
        assert not begins(byte_pair_metadata())

    def test_chat_begins_once(self) -> None:
        tokenizer = Tokenizer.from_metadata(byte_pair_metadata(add_bos_token=True))
        bos = tokenizer.special_ids.bos
        assert tokenizer.encode_chat("<|bos|>hi") == tokenizer.encode_chat("hi")
        assert tokenizer.encode_chat("hi").count(bos or 0) == 1
        assert BYTE_PAIRS.encode_chat("hi").count(bos or 0) == 0

    def test_tokens_that_swallow_spaces(self) -> None:
        tokenizer = Tokenizer.from_metadata(sentence_piece_metadata(**{"general.name": "phi-3"}))
        turn = ids_of(tokenizer, "<turn>")[0]
        assert tokenizer.encode("<turn> \n<turn>", add_special=False, parse_special=True) == [turn, turn]


class TestEndIds:
    @staticmethod
    def ends(texts: list[str], **changes: object) -> tuple[set[str], Tokenizer]:
        metadata = byte_pair_metadata()
        tokens = [*metadata.strings("tokenizer.ggml.tokens"), *texts]
        kinds = [*metadata.array("tokenizer.ggml.token_type"), *[1] * len(texts)]
        tokenizer = Tokenizer.from_metadata(metadata.changed({"tokens": tokens, "token_type": kinds, **changes}))
        return {tokenizer.token_text(token_id) for token_id in tokenizer.end_ids}, tokenizer

    def test_eos_and_texts_that_are_known_to_end(self) -> None:
        ends, tokenizer = self.ends(["<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|user|>"])
        assert ends == {"<|eos|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>"}
        assert tokenizer.special_ids.eot == ids_of(tokenizer, "<|eot_id|>")[0]

    def test_they_are_control_tokens_whatever_the_file_says(self) -> None:
        _, tokenizer = self.ends(["<|eot_id|>"])
        assert tokenizer.is_hidden(ids_of(tokenizer, "<|eot_id|>")[0])

    def test_ids_from_the_metadata(self) -> None:
        assert "the" not in self.ends([])[0]
        ends, tokenizer = self.ends(["the-end", "the-turn"], eot_token_id=byte_pair_size(), eos_token_id=None)
        assert ends == {"<|im_end|>", "the-end"}
        assert tokenizer.special_ids.eos is None

    def test_fill_in_the_middle(self) -> None:
        ends, tokenizer = self.ends(["<|fim_prefix|>", "<|fim_pad|>", "<REPO>"])
        assert {"<|fim_pad|>", "<REPO>"} <= ends and "<|fim_prefix|>" not in ends
        assert tokenizer.is_hidden(ids_of(tokenizer, "<|fim_prefix|>")[0])

    def test_harmony_ends_with_return_not_with_end(self) -> None:
        ends, tokenizer = self.ends(["<|end|>", "<|return|>", "<|call|>", "<|channel|>"])
        assert "<|end|>" not in ends and {"<|return|>", "<|call|>"} <= ends
        assert not tokenizer.is_hidden(ids_of(tokenizer, "<|channel|>")[0])


def byte_pair_size() -> int:
    return len(byte_pair_metadata().strings("tokenizer.ggml.tokens"))


class TestTokenBytes:
    def test_each_kind(self) -> None:
        space, byte, control = ids_of(SENTENCE_PIECES, "▁", "<0x0A>", "<s>")
        assert [SENTENCE_PIECES.token_bytes(idx) for idx in (space, byte, control)] == [b" ", b"\n", b"<s>"]
        letters = ids_of(BYTE_PAIRS, "Ġ", "Ċ", "ÿ")
        assert [BYTE_PAIRS.token_bytes(idx) for idx in letters] == [b" ", b"\n", b"\xff"]

    @pytest.mark.parametrize("token_id", [-1, 10**6])
    def test_ids_that_are_not_there(self, token_id: int) -> None:
        with pytest.raises(UsageError, match=f"no token {token_id}"):
            BYTE_PAIRS.token_bytes(token_id)
        assert BYTE_PAIRS.is_hidden(token_id)

    def test_tokens_not_spelled_in_bytes_are_themselves(self) -> None:
        metadata = byte_pair_metadata()
        tokens = [*metadata.strings("tokenizer.ggml.tokens"), "日"]
        tokenizer = Tokenizer.from_metadata(metadata.changed({"tokens": tokens, "token_type": None}))
        assert tokenizer.token_bytes(len(tokens) - 1) == "日".encode()


class TestBytePairs:
    def test_missing_bytes_are_dropped_and_keep_neighbours_apart(self) -> None:
        metadata = byte_pair_metadata()
        tokens = ["\x00no" if text == "Ą" else text for text in metadata.strings("tokenizer.ggml.tokens")]
        assert "Ą" not in tokens  # U+0104 stands for byte 4
        merges = [merge for merge in metadata.strings("tokenizer.ggml.merges") if "Ą" not in merge]
        tokenizer = Tokenizer.from_metadata(metadata.changed({"tokens": tokens, "merges": merges}))
        assert spelled(tokenizer, "i\x04n") == ["i", "n"]
        assert spelled(tokenizer, "in") == ["in"]

    def test_a_word_that_is_a_token_needs_no_merges(self) -> None:
        metadata = byte_pair_metadata(merges=[])
        assert spelled(Tokenizer.from_metadata(metadata), "in") == ["i", "n"]
        tokenizer = Tokenizer.from_metadata(metadata.changed({"pre": "llama-bpe", "add_bos_token": False}))
        assert spelled(tokenizer, "in") == ["in"]


class TestSentencePieces:
    def test_best_score_first(self) -> None:
        assert spelled(tiny_pieces(a=-9, b=-9, c=-9, ab=-2, bc=-1), "abc") == ["a", "bc"]
        assert spelled(tiny_pieces(a=-9, b=-9, c=-9, ab=-1, bc=-2), "abc") == ["ab", "c"]

    def test_leftmost_first_among_equals(self) -> None:
        assert spelled(tiny_pieces(a=-9, b=-9, c=-9, ab=-1, bc=-1), "abc") == ["ab", "c"]
        assert spelled(tiny_pieces(a=-9, aa=-1, aaa=-2), "aaaaa") == ["aa", "aaa"]

    def test_pieces_join_though_one_is_no_token_itself(self) -> None:
        assert spelled(tiny_pieces(ab=-1), "abb") == ["ab", "<unk>"]

    def test_unknown_characters_without_byte_tokens(self) -> None:
        assert spelled(tiny_pieces(a=-1), "añ") == ["a", "<unk>"]

    def test_tokens_that_span_words(self) -> None:
        scores = {"a": -9.0, "▁": -9.0, "b": -9.0, "a▁": -1.0, "a▁b": -2.0}
        assert spelled(tiny_pieces(**scores), "a b") == ["a▁b"]


MALFORMED: list[tuple[Maker, dict[str, object], str]] = [
    (byte_pair_metadata, {"model": None}, r"tokenizer\.ggml\.model"),
    (byte_pair_metadata, {"tokens": None}, r"tokenizer\.ggml\.tokens' is missing"),
    (byte_pair_metadata, {"tokens": [], "token_type": []}, r"tokenizer\.ggml\.tokens' has no tokens"),
    (byte_pair_metadata, {"merges": None}, r"tokenizer\.ggml\.merges' is missing"),
    (byte_pair_metadata, {"merges": ["i n", "q zz"]}, r"merges': merge 1 is 'q zz', but there is no token 'zz'"),
    (byte_pair_metadata, {"merges": ["in"]}, r"merge 0 is 'in', but there is no token ''"),
    (byte_pair_metadata, {"merges": ["\x00 \x01"]}, r"merge 0"),
    (byte_pair_metadata, {"token_type": [1, 1]}, r"token_type' has 2 elements"),
    (byte_pair_metadata, {"token_type": [9] * 6000}, r"token_type' has 6000 elements"),
    (byte_pair_metadata, {"eot_token_id": "x"}, r"eot_token_id' is 'x', wanted a token id"),
    (byte_pair_metadata, {"unknown_token_id": True}, r"unknown_token_id' is True"),
    (byte_pair_metadata, {"add_bos_token": True, "bos_token_id": None}, r"add_bos_token' wants a begin token"),
    (byte_pair_metadata, {"add_eos_token": True, "eos_token_id": None}, r"add_eos_token' wants an end token"),
    (sentence_piece_metadata, {"scores": None}, r"tokenizer\.ggml\.scores' is missing"),
    (sentence_piece_metadata, {"scores": [0.0]}, r"scores' has 1 elements"),
]


class TestRefusals:
    @pytest.mark.parametrize(("make", "changes", "message"), MALFORMED)
    def test_malformed(self, make: Maker, changes: dict[str, object], message: str) -> None:
        with pytest.raises(MalformedFile, match=message):
            Tokenizer.from_metadata(make(**changes))

    def test_a_name_that_is_a_number(self, tmp_path: Path) -> None:
        metadata = open_gguf(write(tmp_path, bytes(GgufBytes([count_key("tokenizer.ggml.model", 7)])))).metadata
        with pytest.raises(MalformedFile, match=r"tokenizer\.ggml\.model' is the int 7, wanted a string"):
            Tokenizer.from_metadata(metadata)

    @BOTH
    def test_duplicate_tokens(self, make: Maker) -> None:
        tokens = make().strings("tokenizer.ggml.tokens")
        tokens[300] = tokens[280]
        with pytest.raises(MalformedFile, match=r"tokens' has .* twice, as token 280 and 300"):
            Tokenizer.from_metadata(make(tokens=tokens))

    @BOTH
    def test_unknown_kinds(self, make: Maker) -> None:
        kinds = list(make().array("tokenizer.ggml.token_type"))
        kinds[4] = np.int32(7)
        with pytest.raises(MalformedFile, match="type 7 for token 4"):
            Tokenizer.from_metadata(make(token_type=kinds))

    @BOTH
    def test_byte_tokens_that_name_no_byte(self, make: Maker) -> None:
        kinds = list(make().array("tokenizer.ggml.token_type"))
        kinds[280] = np.int32(TokenKind.BYTE)
        with pytest.raises(MalformedFile, match="spells byte token 280"):
            Tokenizer.from_metadata(make(token_type=kinds))

    def test_scores_that_are_no_numbers(self) -> None:
        scores = np.array(sentence_piece_metadata()["tokenizer.ggml.scores"], np.float32)
        scores[5] = np.nan
        with pytest.raises(MalformedFile, match="no number for token 5"):
            Tokenizer.from_metadata(sentence_piece_metadata(scores=scores))

    def test_neither_bytes_nor_unknown(self) -> None:
        with pytest.raises(MalformedFile, match="neither 256 byte tokens nor an unknown token"):
            SentencePieces({"a": 0}, bytearray([TokenKind.NORMAL]), array("f", [0.0]), None)

    @pytest.mark.parametrize("name", ["bert", "t5", "rwkv", "plamo2", "none", ""])
    def test_other_models_by_name(self, name: str) -> None:
        with pytest.raises(UnsupportedModel, match=f"tokenizer '{name}'.*tokenizer.ggml.model"):
            Tokenizer.from_metadata(byte_pair_metadata(model=name))

    def test_unknown_pre_tokenizer_lists_the_known(self) -> None:
        with pytest.raises(UnsupportedModel, match=r"'klingon' .*tokenizer\.ggml\.pre") as caught:
            Tokenizer.from_metadata(byte_pair_metadata(pre="klingon"))
        assert "llama-bpe" in str(caught.value) and "qwen2" in str(caught.value)

    def test_no_pre_tokenizer_is_the_default_one(self) -> None:
        named = Tokenizer.from_metadata(byte_pair_metadata(pre="default"))
        missing = Tokenizer.from_metadata(byte_pair_metadata(pre=None))
        assert spelled(named, "1234 a>=b") == spelled(missing, "1234 a>=b")


TEXTS = st.lists(st.text(max_size=4), max_size=12)
PIECES = st.lists(st.text("abĠ▁<>0x4", max_size=4), max_size=16)
MERGES = st.lists(st.text("ab Ġ", max_size=4), max_size=6)


class TestHostile:
    @given(
        model=st.sampled_from(["gpt2", "llama", "gemma4"]),
        tokens=st.one_of(TEXTS, PIECES, PIECES.map(lambda pieces: sorted({*pieces, "a", "b", "ab", "Ġ"}))),
        kinds=st.lists(st.integers(0, 6), max_size=20),
        scores=st.lists(st.floats(width=32), max_size=20),
        merges=MERGES,
        ids=st.dictionaries(st.sampled_from(["bos_token_id", "eos_token_id", "eot_token_id"]), st.integers(-1, 12)),
        text=st.text("ab <>0x4▁é"),
    )
    def test_any_metadata_is_read_or_refused(
        self,
        model: str,
        tokens: list[str],
        kinds: list[int],
        scores: list[float],
        merges: list[str],
        ids: dict[str, int],
        text: str,
    ) -> None:
        metadata = DictMetadata({"tokenizer.ggml.model": model, "tokenizer.ggml.pre": "gpt-2"}).changed(
            {
                "tokens": tokens,
                "token_type": [*kinds, *[1] * len(tokens)][: len(tokens)],
                "scores": [*scores, *[0.0] * len(tokens)][: len(tokens)],
                "merges": merges if all(all(half in tokens for half in m.split(" ")) for m in merges) else [],
                **ids,
            }
        )
        try:
            tokenizer = Tokenizer.from_metadata(metadata)
        except PipoError:
            return
        found = tokenizer.encode(text, add_special=True, parse_special=True)
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in found)
        for token_id in range(tokenizer.vocab_size):
            tokenizer.decode([token_id])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_merges_are_read_is_raised_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The library that asks for them would swallow it, or take it for a wrong type."""

    class Ended(BaseException):
        pass

    def end(*_: object) -> None:
        raise Ended

    halves = byte_pairs._halves

    def interrupted(merge: str) -> tuple[str, str]:
        if isinstance(signal.getsignal(number), FunctionType) and signal.getsignal(number) is not end:
            signal.raise_signal(number)
        return halves(merge)

    monkeypatch.setattr(byte_pairs, "_halves", interrupted)
    kept = signal.signal(number, end)
    try:
        with pytest.raises(Ended):
            Tokenizer.from_metadata(byte_pair_metadata())
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, kept)
