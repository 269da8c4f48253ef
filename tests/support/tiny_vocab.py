"""The tokenizers of the tiny checkpoints: as small as llama.cpp will load, and usable for text.

Ids 0-2 are specials in both, so a checkpoint's `bos_token_id=1, eos_token_id=2` hold for either.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase
from typing import Literal

from gguf import GGUFWriter, TokenType

Tokenizer = Literal["spm", "gpt2"]
SMALLEST_VOCAB = 3 + 256 + 1 + 26  # specials, bytes, the space mark and the letters
LARGEST_VOCAB = 3 + 256 + 27 * 26  # … and every pair
_SPACE = {"spm": "▁", "gpt2": "Ġ"}
_SPECIALS = {"spm": ("<unk>", "<s>", "</s>"), "gpt2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}


@dataclass(frozen=True, slots=True)
class Vocab:
    """Tokens with one type and score each; `merges` only for gpt2."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]


def build_vocab(tokenizer: Tokenizer, size: int) -> Vocab:
    """Exactly `size` tokens: specials, bytes, and pairs of letters as the merges."""
    if not SMALLEST_VOCAB <= size <= LARGEST_VOCAB:
        raise ValueError(f"a tiny vocabulary has {SMALLEST_VOCAB} to {LARGEST_VOCAB} tokens, not {size}")
    return _spm_vocab(size) if tokenizer == "spm" else _gpt2_vocab(size)


def add_vocab(writer: GGUFWriter, tokenizer: Tokenizer, size: int) -> None:
    """Write the metadata of `tokenizer.ggml.*` under the keys a converted checkpoint has."""
    vocab = build_vocab(tokenizer, size)
    writer.add_tokenizer_model("llama" if tokenizer == "spm" else "gpt2")
    writer.add_tokenizer_pre("default" if tokenizer == "spm" else "gpt-2")
    writer.add_token_list(vocab.tokens)
    if tokenizer == "spm":
        writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    if tokenizer == "gpt2":
        writer.add_token_merges(vocab.merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(tokenizer == "spm")
    writer.add_add_eos_token(False)


def _pairs(space: str, count: int) -> list[tuple[str, str]]:
    """Word starts first (" a", " b", …), then "aa", "ab", …"""
    firsts = [space, *ascii_lowercase]
    return [(first, second) for first in firsts for second in ascii_lowercase][:count]


def _spm_vocab(size: int) -> Vocab:
    singles = [_SPACE["spm"], *ascii_lowercase]
    pairs = ["".join(pair) for pair in _pairs(_SPACE["spm"], size - SMALLEST_VOCAB)]
    pieces = [*pairs, *singles]
    tokens = [*_SPECIALS["spm"], *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return Vocab(tuple(tokens), tuple(types), tuple(scores), ())


def _gpt2_vocab(size: int) -> Vocab:
    pairs = _pairs(_SPACE["gpt2"], size - 259)
    tokens = [*_SPECIALS["gpt2"], *_byte_letters(), *("".join(pair) for pair in pairs)]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    return Vocab(tuple(tokens), tuple(types), (0.0,) * len(tokens), tuple(" ".join(pair) for pair in pairs))


def _byte_letters() -> list[str]:
    """A printable letter for each byte, as GPT-2 spells them: unprintable ones move to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(0x100 + idx) for idx in range(len(others))]
