"""The header of a file of random weights: sizes, a vocabulary, and which tensors follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import TYPE_CHECKING, Protocol

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

if TYPE_CHECKING:
    from bench.random_model import Tensor


class Sizes(Protocol):
    """What the header of every decoder says."""

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_q_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_tokens(self) -> int: ...


def begin_header(path: Path, architecture: str, name: str, model: Sizes) -> GGUFWriter:
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.context_tokens)
    writer.add_embedding_length(model.hidden_size)
    writer.add_head_count(model.num_q_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    return writer


def finish_header(writer: GGUFWriter, model: Sizes, tensors: Sequence[Tensor]) -> None:
    """The vocabulary, and which tensors follow: their data has to be appended in this order."""
    writer.add_vocab_size(model.vocab_size)
    _add_vocab(writer, model.vocab_size)
    writer.add_quantization_version(2)
    for tensor in tensors:
        rows_first = tuple(reversed(tensor.shape))
        kind = GGMLQuantizationType(tensor.type)
        writer.add_tensor_info(tensor.name, rows_first, np.dtype(np.float32), tensor.num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_vocab(writer: GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary: specials, bytes, characters, and every word of up to three letters until full."""
    special_and_bytes = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = list(islice(_pieces(), size - len(special_and_bytes)))
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*special_and_bytes, *pieces])
    writer.add_token_scores([0.0] * len(types) + [-float(rank) for rank in range(len(pieces))])
    writer.add_token_types([*types, *[TokenType.NORMAL] * len(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _pieces() -> Iterator[str]:
    yield from chain("▁", ascii_lowercase, ascii_lowercase.upper(), digits, punctuation)
    for length in (1, 2, 3):
        words = ["".join(letters) for letters in product(ascii_lowercase, repeat=length)]
        yield from (f"▁{word}" for word in words)
        yield from words if length > 1 else ()
