"""The same ids as llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, product
from pathlib import Path

import pytest

from pipo.formats.gguf import open_gguf
from pipo.text.pretokenizers import PRE_TOKENIZERS
from pipo.text.tokenizer import Tokenizer
from tests.support.llama_cpp_tokens import LlamaCppTokens
from tests.support.texts import mixed_texts
from tests.support.vocabularies import DictMetadata, byte_pair_metadata, sentence_piece_metadata, write_model

Flags = tuple[bool, bool]
Filter = Callable[[str], bool]

_SEED = 20240607
_PLAIN: Flags = (True, False)  # add_special, parse_special
_ALL_FLAGS: tuple[Flags, ...] = ((False, False), (False, True), (True, False), (True, True))
_SPECIAL_CASES = (
    "", " ", "  ", "\n", "<|im_start|>", "<|im_start|>user\nhi<|im_end|>\n", "a<|im_start|>", "<|im_start|> b",
    "<|im_start|><|im_start|>", "<|im_<|im_start|>start|>", "<|im_end|", "<file_sep><repo_name>x<reponame>",
    "<s>", "</s>x", " <user> ", "x<user>y", "<user><user>", "<turn>\n\n x", "<turn> \t\r\n<turn> y", "<|bos|>",
    "<|bos|><|bos|>a", "\x00", "\x04\x06\x13", "a\x04b", "the\x06re", "\x7f", "\ufeffBOM", "\U00040000x", "e\u0301",
    "a" * 3000, " " * 700, "\n" * 300, "1" * 400, "▁▁ ▁", "=" * 257, "\t" * 65 + "x",
)  # fmt: skip


def test_smollm2_has_the_ids_of_llama_cpp(smollm2_path: Path) -> None:
    texts = [*_SPECIAL_CASES, *mixed_texts(_SEED, 2500)]
    assert len(set(texts)) > 2000
    _assert_same_ids(smollm2_path, texts, _ALL_FLAGS)


def test_smollm2_tokens_stand_for_the_bytes_of_llama_cpp(smollm2_path: Path) -> None:
    tokenizer = Tokenizer.from_metadata(open_gguf(smollm2_path).metadata)
    with LlamaCppTokens(smollm2_path) as oracle:
        for text in [*_SPECIAL_CASES, *mixed_texts(_SEED, 300)]:
            for token_id, piece in oracle.pieces(text):
                assert tokenizer.token_bytes(token_id) == piece, f"{token_id=} in {text=}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_space_prefix": False},
        {"add_bos_token": False, "add_eos_token": True},
        {"general.name": "Phi-3 mini"},  # its special tokens take white space along
    ],
)
def test_sentence_pieces_have_the_ids_of_llama_cpp(changes: dict[str, object], tmp_path: Path) -> None:
    path = _written(sentence_piece_metadata(**changes), tmp_path)
    _assert_same_ids(path, [*_SPECIAL_CASES, *mixed_texts(_SEED, 600)], _ALL_FLAGS)


@pytest.mark.parametrize("changes", [{"model": "gemma4"}, {"pre": "gemma4"}, {"pre": "sarvam-moe"}])
def test_merges_with_marked_spaces_have_the_ids_of_llama_cpp(changes: dict[str, object], tmp_path: Path) -> None:
    pieces = sentence_piece_metadata().strings("tokenizer.ggml.tokens")
    metadata = sentence_piece_metadata(scores=None, merges=_all_splits(pieces), **{"model": "gpt2", **changes})
    _assert_same_ids(_written(metadata, tmp_path), [*_SPECIAL_CASES, *mixed_texts(_SEED, 200)], _ALL_FLAGS)


@pytest.mark.parametrize("name", sorted(name for name, entry in PRE_TOKENIZERS.items() if entry.is_byte_level))
def test_each_pre_tokenizer_cuts_like_llama_cpp(name: str, tmp_path: Path) -> None:
    texts = list(islice(filter(_AGREEMENT.get(name, bool), mixed_texts(_SEED, 2000)), 100))
    assert len(texts) == 100
    _assert_same_ids(_written(byte_pair_metadata(pre=name), tmp_path), texts, [_PLAIN])


def _is_lower_ascii(text: str) -> bool:
    return text.isascii() and text == text.lower()


def _has_no_digits(text: str) -> bool:
    return not any(char.isnumeric() for char in text)


def _has_only_ascii_spaces(text: str) -> bool:
    return all(char.isascii() for char in text if char.isspace())


def _is_lower_ascii_without_digits(text: str) -> bool:
    return _is_lower_ascii(text) and _has_no_digits(text)


# Where llama.cpp only approximates the model's pre-tokenizer: the texts for which that does not matter
_AGREEMENT: dict[str, Filter] = {
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tekken"], str.isascii),
    "granite-embed-multi-97m": str.isascii,
    **dict.fromkeys(["kimi-k2", "youtu"], _is_lower_ascii),
    **dict.fromkeys(["tiny_aya", "cohere2moe"], _is_lower_ascii_without_digits),
    "afmoe": _has_no_digits,
    **dict.fromkeys(["deepseek-llm", "deepseek-coder"], _has_only_ascii_spaces),
}


def _written(metadata: DictMetadata, folder: Path) -> Path:
    path = folder / "tiny.gguf"
    write_model(path, metadata)
    return path


def _all_splits(pieces: Sequence[str]) -> list[str]:
    known = set(pieces)
    halves = ((piece[:cut], piece[cut:]) for piece in pieces if "<" not in piece for cut in range(1, len(piece)))
    return [f"{left} {right}" for left, right in halves if left in known and right in known]


def _assert_same_ids(path: Path, texts: Sequence[str], flags: Sequence[Flags]) -> None:
    tokenizer = Tokenizer.from_metadata(open_gguf(path).metadata)
    with LlamaCppTokens(path) as oracle:
        for text, (add_special, parse_special) in product(texts, flags):
            ours = tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
            theirs = oracle.encode(text, add_special=add_special, parse_special=parse_special)
            assert ours == theirs, (
                f"seed={_SEED} {text=} {add_special=} {parse_special=}\n{_first_difference(ours, theirs)}"
            )


def _first_difference(ours: list[int], theirs: list[int]) -> str:
    pairs = enumerate(zip(ours, theirs, strict=False))
    idx = next((idx for idx, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return f"token {idx}: ours {ours[idx : idx + 5]}, llama.cpp's {theirs[idx : idx + 5]}"
