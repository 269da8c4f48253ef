"""Small tokenizers trained on the spot, as metadata and as GGUF files that llama.cpp loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer

from tests.support.texts import mixed_texts

_TRAINING_SEED = 7
_HIDDEN_SIZE = 32
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_VECTORS = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class DictMetadata(dict[str, object]):
    """Metadata in memory: a dict of scalars and lists."""

    def text(self, key: str) -> str | None:
        value = self.get(key)
        assert value is None or isinstance(value, str)
        return value

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        assert value is None or isinstance(value, bool)
        return value

    def strings(self, key: str) -> list[str]:
        value = self[key]
        assert isinstance(value, list)
        return list(value)

    def array(self, key: str) -> npt.NDArray[np.generic]:
        value = self[key]
        assert isinstance(value, (list, np.ndarray))
        return np.asarray(value)

    def changed(self, changes: Mapping[str, object]) -> DictMetadata:
        """A copy; keys get `tokenizer.ggml.` in front unless they have a dot, None removes one."""
        long_keys = {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        merged = {**self, **long_keys}
        return DictMetadata({key: value for key, value in merged.items() if value is not None})


def byte_pair_metadata(**changes: object) -> DictMetadata:
    """About 3000 byte-level tokens whose merges span words, so that every cut of a pre-tokenizer shows."""
    tokens, merges = _train_byte_pairs()
    specials = ["<|bos|>", "<|eos|>", "<|im_end|>", "<user>"]
    kinds = [TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED]
    metadata = DictMetadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*tokens, *specials],
            "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
            "tokenizer.ggml.merges": list(merges),
            "tokenizer.ggml.bos_token_id": len(tokens),
            "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        }
    )
    return metadata.changed(changes)


def sentence_piece_metadata(**changes: object) -> DictMetadata:
    """About 2000 pieces; three in a row share a score, so that the leftmost has to win."""
    pieces = _train_sentence_pieces()
    specials = ["<unk>", "<s>", "</s>", "<user>", "<turn>", "<|endoftext|>"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED, *[TokenType.CONTROL] * 2]
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces)
    scores = [0.0] * (len(specials) + 256) + [-float(rank // 3) for rank in range(len(pieces))]
    metadata = DictMetadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [*specials, *_BYTE_TOKENS, *pieces],
            "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
    )
    return metadata.changed(changes)


def write_model(path: Path, metadata: DictMetadata) -> None:
    """The smallest Llama that llama.cpp runs: one block of zeros."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_HIDDEN_SIZE)
    writer.add_feed_forward_length(_HIDDEN_SIZE)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        _add_value(writer, key, value)
    for name, shape in _shapes(len(metadata.strings("tokenizer.ggml.tokens"))):
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_value(writer: GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert isinstance(value, list)
        writer.add_array(key, value)


def _shapes(vocab_size: int) -> Iterable[tuple[str, tuple[int, ...]]]:
    yield "token_embd", (vocab_size, _HIDDEN_SIZE)
    yield from ((name, (_HIDDEN_SIZE,)) for name in _VECTORS)
    yield from ((f"blk.0.{name}", (_HIDDEN_SIZE, _HIDDEN_SIZE)) for name in _MATRICES)


@lru_cache
def _train_byte_pairs() -> tuple[list[str], list[str]]:
    engine = Tokenizer(BPE())
    engine.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=3000, initial_alphabet=sorted(ByteLevel.alphabet()), max_token_length=12, show_progress=False
    )
    engine.train_from_iterator(_training_texts(), trainer)
    model = json.loads(engine.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [" ".join(pair) for pair in model["merges"]]


@lru_cache
def _train_sentence_pieces() -> list[str]:
    """Merged pieces first, in the order they were learned, then characters."""
    engine = Tokenizer(BPE())
    engine.pre_tokenizer = Split("▁", "merged_with_next")
    trainer = BpeTrainer(vocab_size=2600, limit_alphabet=900, max_token_length=10, show_progress=False)
    engine.train_from_iterator((text.replace(" ", "▁") for text in _training_texts()), trainer)
    vocab = engine.get_vocab()
    return sorted(vocab, key=lambda piece: (len(piece) == 1, vocab[piece]))


def _training_texts() -> list[str]:
    """Without the letters of special tokens, and without NUL, where llama.cpp's reader ends a token."""
    return [text for text in mixed_texts(_TRAINING_SEED, 2000) if not {"<", "\0"} & set(text)]
