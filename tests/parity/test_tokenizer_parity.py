"""The same ids as llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import pytest

from pipo.formats.gguf import open_gguf
from pipo.text.pretokenizers import PRE_TOKENIZERS
from pipo.text.tokenizer import Tokenizer
from tests.support.llama_cpp_tokens import LlamaCppTokens
from tests.support.texts import mixed_texts
from tests.support.vocabularies import DictMetadata, byte_pair_metadata, sentence_piece_metadata, write_model

_SEED = 20240607
_FLAGS = [False, True]
_SPECIAL_CASES = [
    "", " ", "  ", "\n", "<|im_start|>", "<|im_start|>user\nhi<|im_end|>\n", "a<|im_start|>", "<|im_start|> b",
    "<|im_start|><|im_start|>", "<|im_<|im_start|>start|>", "<|im_end|", "<file_sep><repo_name>x<reponame>",
    "<s>", "</s>x", " <user> ", "x<user>y", "<user><user>", "<turn>\n\n x", "<turn> \t\r\n<turn> y", "<|bos|>",
    "<|bos|><|bos|>a", "\x00", "\x04\x06\x13", "a\x04b", "the\x06re", "\x7f", "\ufeffBOM", "\U00040000x", "e\u0301",
    "a" * 3000, " " * 700, "\n" * 300, "1" * 400, "▁▁ ▁", "=" * 257, "\t" * 65 + "x",
]  # fmt: skip


def _assert_same(tokenizer: Tokenizer, oracle: LlamaCppTokens, texts: Iterable[str], *, seed: int) -> None:
    for text, add_special, parse_special in product(texts, _FLAGS, _FLAGS):
        ours = tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
        theirs = oracle.encode(text, add_special=add_special, parse_special=parse_special)
        assert ours == theirs, f"{seed=} {text=} {add_special=} {parse_special=}\n{_first_difference(ours, theirs)}"


def _first_difference(ours: list[int], theirs: list[int]) -> str:
    pairs = enumerate(zip(ours, theirs, strict=False))
    idx = next((idx for idx, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return f"token {idx}: ours {ours[idx : idx + 5]}, llama.cpp's {theirs[idx : idx + 5]}"


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_metadata(open_gguf(smollm2_path).metadata)


def test_smollm2_has_the_ids_of_llama_cpp(smollm2: Tokenizer, smollm2_path: Path) -> None:
    texts = [*_SPECIAL_CASES, *mixed_texts(_SEED, 2500)]
    assert len(set(texts)) > 2000
    with LlamaCppTokens(smollm2_path) as oracle:
        _assert_same(smollm2, oracle, texts, seed=_SEED)


def test_smollm2_tokens_stand_for_the_bytes_of_llama_cpp(smollm2: Tokenizer, smollm2_path: Path) -> None:
    with LlamaCppTokens(smollm2_path) as oracle:
        for text in [*_SPECIAL_CASES, *mixed_texts(_SEED, 300)]:
            for token_id, piece in oracle.pieces(text):
                assert smollm2.token_bytes(token_id) == piece, f"{token_id=} in {text=}"


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
    tokenizer = _same_after_loading(sentence_piece_metadata(**changes), tmp_path / "spm.gguf", 600, _is_any)
    assert tokenizer.vocab_size > 2500


def _is_any(text: str) -> bool:
    return True


def _is_lower_ascii(text: str) -> bool:
    return text.isascii() and text == text.lower()


def _has_no_digits(text: str) -> bool:
    return not any(char.isnumeric() for char in text)


def _has_only_ascii_spaces(text: str) -> bool:
    return all(char.isascii() for char in text if char.isspace())


def _is_plain(text: str) -> bool:
    return _is_lower_ascii(text) and _has_no_digits(text)


# Where llama.cpp only approximates the model's pre-tokenizer: the texts on which it does not matter
_AGREEMENT: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tekken"], str.isascii),
    "granite-embed-multi-97m": str.isascii,
    **dict.fromkeys(["kimi-k2", "youtu"], _is_lower_ascii),
    **dict.fromkeys(["tiny_aya", "cohere2moe"], _is_plain),
    "afmoe": _has_no_digits,
    **dict.fromkeys(["deepseek-llm", "deepseek-coder"], _has_only_ascii_spaces),
}


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_each_pre_tokenizer_cuts_like_llama_cpp(name: str, tmp_path: Path) -> None:
    pre_tokenizer = PRE_TOKENIZERS[name]
    if not pre_tokenizer.is_byte_level:
        pytest.skip("needs a vocabulary with ▁, tested below")
    metadata = byte_pair_metadata(pre=name)
    _same_after_loading(metadata, tmp_path / "bpe.gguf", 120, _AGREEMENT.get(name, _is_any))


@pytest.mark.parametrize("changes", [{"model": "gemma4"}, {"pre": "gemma4"}, {"pre": "sarvam-moe"}])
def test_byte_pairs_with_marked_spaces_have_the_ids_of_llama_cpp(changes: dict[str, object], tmp_path: Path) -> None:
    pieces = sentence_piece_metadata().strings("tokenizer.ggml.tokens")
    known = set(pieces)
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in pieces[261:]
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    metadata = sentence_piece_metadata(scores=None, merges=merges, **{"model": "gpt2", **changes})
    _same_after_loading(metadata, tmp_path / "marked.gguf", 200, _is_any)


def _same_after_loading(
    metadata: DictMetadata, path: Path, num_texts: int, is_comparable: Callable[[str], bool]
) -> Tokenizer:
    write_model(path, metadata)
    tokenizer = Tokenizer.from_metadata(open_gguf(path).metadata)
    texts = [text for text in [*_SPECIAL_CASES, *mixed_texts(_SEED, num_texts)] if is_comparable(text)]
    assert len(texts) > 20
    with LlamaCppTokens(path) as oracle:
        _assert_same(tokenizer, oracle, texts, seed=_SEED)
    return tokenizer
