"""Keys and values, in RAM: per block, rows of all heads in the order of position, sequence by sequence."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipo.base.errors import UsageError
from pipo.base.manifest import HyperParameters
from pipo.base.tensor_type import TensorType
from pipo.base.units import PAGE_BYTES, round_down, round_up
from pipo.tiers.ram import Place

ROWS_PER_CLASS = 256  # graphs see the KV length rounded up to this, as llama.cpp's do
# memory is taken in steps of this, 16 MiB in a 7B. A graph reads rows beyond them, and those that a layer has left
# behind, as masked: on Linux they are the shared page of zeros, elsewhere reading may take memory
ROWS_PER_PAGE = 32 if sys.platform == "linux" else ROWS_PER_CLASS
CACHE_TYPES = {t.name.lower(): t for t in (TensorType.F16, TensorType.F32, TensorType.Q8_0, TensorType.Q4_0)}


@dataclass(frozen=True, slots=True)
class KvShape:
    """Size of a cache. `num_rows` is the context of each sequence rounded up to whole classes. Each block's keys, and
    its values, begin on a page, so that rows which are not used yet take none; nor do rows of layers that slide, by
    `sliding`, once `kept_rows` newer ones are there.
    """

    num_layers: int
    kv_size: int  # kv heads * head_dim
    num_rows: int
    type_k: TensorType
    type_v: TensorType
    num_sequences: int = 1
    sliding: tuple[bool, ...] = ()  # by layer; empty: none
    kept_rows: int = 0

    @property
    def sequence_bytes_k(self) -> int:
        """Of one sequence in one block."""
        return self.num_rows * self.type_k.row_bytes(self.kv_size)

    @property
    def sequence_bytes_v(self) -> int:
        return self.num_rows * self.type_v.row_bytes(self.kv_size)

    @property
    def layer_bytes_k(self) -> int:
        return round_up(self.num_sequences * self.sequence_bytes_k, PAGE_BYTES)

    @property
    def layer_bytes_v(self) -> int:
        return round_up(self.num_sequences * self.sequence_bytes_v, PAGE_BYTES)

    @property
    def num_bytes(self) -> int:
        return self.num_layers * (self.layer_bytes_k + self.layer_bytes_v)

    @property
    def page_bytes(self) -> int:
        """The most that ROWS_PER_PAGE more rows of every sequence and block take. One sequence begins on a page."""
        parts = 2 * self.num_layers * self.num_sequences * PAGE_BYTES if self.num_sequences > 1 else 0
        return self.used_bytes(ROWS_PER_PAGE) + parts

    @property
    def num_sliding(self) -> int:
        return sum(self.sliding)

    @property
    def staying(self) -> KvShape:
        """Of the layers that do not slide."""
        return replace(self, num_layers=self.num_layers - self.num_sliding, sliding=(), kept_rows=0)

    def first_row(self, num_rows: int) -> int:
        """The oldest that a layer which slides needs while `num_rows` are in use."""
        if not self.num_sliding or not self.kept_rows:
            return 0
        return round_down(max(num_rows - self.kept_rows, 0), ROWS_PER_PAGE)

    def used_bytes(self, num_rows: int) -> int:
        """Of the pages that hold the first `num_rows` of every sequence and block, where they are needed."""
        return self.used_bytes_of([num_rows] * self.num_sequences)

    def used_bytes_of(self, num_rows: Sequence[int]) -> int:
        """The same with so many rows of each sequence."""
        used = self.num_bytes
        for slides, num_layers in ((False, self.num_layers - self.num_sliding), (True, self.num_sliding)):
            for sequence, num in enumerate(num_rows):
                used -= num_layers * sum(end - start for start, end in self._unused_in_block(sequence, num, slides))
        return used

    def unused_ranges(self, sequence: int, num_rows: int) -> Iterator[tuple[int, int]]:
        """From where to where the other pages of a sequence lie, in bytes from the start of the cache."""
        unused = {slides: list(self._unused_in_block(sequence, num_rows, slides)) for slides in (False, True)}
        for layer in range(self.num_layers):
            begin = layer * (self.layer_bytes_k + self.layer_bytes_v)
            for start, end in unused[bool(self.sliding) and self.sliding[layer]]:
                yield begin + start, begin + end

    def _unused_in_block(self, sequence: int, num_rows: int, slides: bool) -> Iterator[tuple[int, int]]:
        """Of one block, from its start."""
        first, begin = self.first_row(num_rows) if slides else 0, 0
        for layer_bytes, row_bytes in (
            (self.layer_bytes_k, self.type_k.row_bytes(self.kv_size)),
            (self.layer_bytes_v, self.type_v.row_bytes(self.kv_size)),
        ):
            base = begin + sequence * self.num_rows * row_bytes
            is_last = sequence == self.num_sequences - 1
            stop = begin + layer_bytes if is_last else base + self.num_rows * row_bytes
            yield from _whole_pages(base, base + first * row_bytes)
            yield from _whole_pages(base + num_rows * row_bytes, stop)
            begin += layer_bytes


def _whole_pages(start: int, end: int) -> Iterator[tuple[int, int]]:
    start, end = round_up(start, PAGE_BYTES), round_down(end, PAGE_BYTES)
    if start < end:
        yield start, end


def kv_shape(
    hyper: HyperParameters,
    context_tokens: int,
    type_k: TensorType,
    type_v: TensorType,
    num_sequences: int = 1,
    pass_tokens: int | None = None,
) -> KvShape:
    """`pass_tokens` is the most that a pass stores, None where that is not known: then layers that slide keep all rows.
    So they do where several sequences share a pass, whose windows are not in step.

    Raises UsageError when a head is not whole blocks of the type.
    """
    for name, type_ in (("--cache-type-k", type_k), ("--cache-type-v", type_v)):
        if hyper.head_dim % type_.block_elems:
            raise UsageError(
                f"{name} {type_.name.lower()} needs heads of a multiple of {type_.block_elems}, "
                f"this model's have {hyper.head_dim}",
                hint="use f16",
            )
    rows, kv_size = kv_rows_class(context_tokens), hyper.num_kv_heads * hyper.head_dim
    shape = KvShape(hyper.num_layers, kv_size, rows, type_k, type_v, num_sequences)
    if not hyper.sliding_window or pass_tokens is None or num_sequences > 1 or sys.platform != "linux":
        return shape
    # the oldest token of a pass sees a window before itself; a page more, since rows are given back by the page
    kept_rows = round_up(hyper.sliding_window + pass_tokens, ROWS_PER_PAGE) + ROWS_PER_PAGE
    return replace(shape, sliding=hyper.sliding_layers, kept_rows=kept_rows)


def kv_rows_class(num_tokens: int) -> int:
    return round_up(max(num_tokens, 1), ROWS_PER_CLASS)


class KvCache:
    """Addresses of the keys and values of some blocks inside one place; None for none. Zeroed memory, so that masked
    rows stay finite.
    """

    def __init__(self, shape: KvShape, place: Place | None, blocks: Sequence[int]) -> None:
        assert len(blocks) == shape.num_layers and (place.num_bytes if place else 0) >= shape.num_bytes
        self.shape = shape
        self._base = place.address if place else 0
        self._layer_of = {block: i for i, block in enumerate(blocks)}

    def address_k(self, block_idx: int, sequence: int = 0) -> int:
        shape = self.shape
        layer = self._layer_of[block_idx] * (shape.layer_bytes_k + shape.layer_bytes_v)
        return self._base + layer + sequence * shape.sequence_bytes_k

    def address_v(self, block_idx: int, sequence: int = 0) -> int:
        return self.address_k(block_idx) + self.shape.layer_bytes_k + sequence * self.shape.sequence_bytes_v

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """The first rows of one sequence become those of another, in all blocks."""
        for block in self._layer_of:
            for address, type_ in ((self.address_k, self.shape.type_k), (self.address_v, self.shape.type_v)):
                num_bytes = num_rows * type_.row_bytes(self.shape.kv_size)
                ctypes.memmove(address(block, target), address(block, source), num_bytes)
