"""Keys and values of one sequence, in RAM: per block, rows of all heads in the order of position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipo.base.errors import UsageError
from pipo.base.manifest import HyperParameters
from pipo.base.tensor_type import TensorType
from pipo.base.units import PAGE_BYTES, round_up
from pipo.tiers.ram import Place

ROWS_PER_CLASS = 256  # graphs see the KV length rounded up to this, as llama.cpp's do
ROWS_PER_PAGE = 32  # memory is taken in steps of this: 16 MiB in a 7B. Rows that are seen, not used, are the zero page
CACHE_TYPES = {t.name.lower(): t for t in (TensorType.F16, TensorType.F32, TensorType.Q8_0, TensorType.Q4_0)}


@dataclass(frozen=True, slots=True)
class KvShape:
    """Size of a cache. `num_rows` is the context rounded up to whole classes. Each block's keys, and its values, begin
    on a page, so that rows which are not used yet take none.
    """

    num_layers: int
    kv_size: int  # kv heads * head_dim
    num_rows: int
    type_k: TensorType
    type_v: TensorType

    @property
    def layer_bytes_k(self) -> int:
        return round_up(self.num_rows * self.type_k.row_bytes(self.kv_size), PAGE_BYTES)

    @property
    def layer_bytes_v(self) -> int:
        return round_up(self.num_rows * self.type_v.row_bytes(self.kv_size), PAGE_BYTES)

    @property
    def num_bytes(self) -> int:
        return self.num_layers * (self.layer_bytes_k + self.layer_bytes_v)

    def used_bytes(self, num_rows: int) -> int:
        """Of the pages that hold the first `num_rows` of every block."""
        return replace(self, num_rows=num_rows).num_bytes

    def unused_ranges(self, num_rows: int) -> Iterator[tuple[int, int]]:
        """From where to where the other pages lie, in bytes from the start of the cache."""
        used = replace(self, num_rows=num_rows)
        start = 0
        for _ in range(self.num_layers):
            for whole, part in ((self.layer_bytes_k, used.layer_bytes_k), (self.layer_bytes_v, used.layer_bytes_v)):
                if part < whole:
                    yield start + part, start + whole
                start += whole


def kv_shape(hyper: HyperParameters, context_tokens: int, type_k: TensorType, type_v: TensorType) -> KvShape:
    """Raises UsageError when a head is not whole blocks of the type."""
    for name, type_ in (("--cache-type-k", type_k), ("--cache-type-v", type_v)):
        if hyper.head_dim % type_.block_elems:
            raise UsageError(
                f"{name} {type_.name.lower()} needs heads of a multiple of {type_.block_elems}, "
                f"this model's have {hyper.head_dim}",
                hint="use f16",
            )
    rows = kv_rows_class(context_tokens)
    return KvShape(hyper.num_layers, hyper.num_kv_heads * hyper.head_dim, rows, type_k, type_v)


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

    def address_k(self, block_idx: int) -> int:
        return self._base + self._layer_of[block_idx] * (self.shape.layer_bytes_k + self.shape.layer_bytes_v)

    def address_v(self, block_idx: int) -> int:
        return self.address_k(block_idx) + self.shape.layer_bytes_k
