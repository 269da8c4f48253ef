"""Embedding rows, gathered row by row: the table is never resident for their sake.

The rows of recent tokens are: text repeats itself, and a read past the page cache keeps a decode pass waiting for
0.5 ms, of which the drive takes a tenth and waking two threads the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.base.manifest import Extent, TensorSpec
from pipo.compute.dequantise import Dequantiser
from pipo.transfer.handle import Handle

RECENT_ROWS = 1024  # 2.3 MiB of a 7B in Q4_0


class RowReader(Protocol):
    def submit_rows(self, extents: Sequence[Extent], out: memoryview) -> Handle: ...


class Embedding:
    """Writes the embeddings of tokens into float32 rows. Each distinct token is read once per call, and not again
    while it is among the RECENT_ROWS last used.

    `wait` returns when a handle is done, and raises what it met or that the pass was cancelled meanwhile.
    """

    def __init__(
        self,
        table: TensorSpec,
        reader: RowReader,
        wait: Callable[[Handle], None],
        dequantiser: Dequantiser,
        max_tokens: int,
        scale: float = 1.0,
    ) -> None:
        self._table = table
        self._scale = np.float32(scale)
        self._reader = reader
        self._wait = wait
        self._last: Handle | None = None  # cancelled while it was read, it may still write to `_raw`
        self._dequantiser = dequantiser
        self._row_bytes = table.type.row_bytes(table.shape[0])
        self._raw = np.empty((max_tokens, self._row_bytes), np.uint8)
        self._recent = _RecentRows(_num_recent(table), self._row_bytes)

    def gather(self, token_ids: Sequence[int], out: npt.NDArray[np.float32], table_address: int | None) -> None:
        """out (tokens, hidden_size). The caller vouches for the range of the ids.

        Reads the rows from disk, unless the table lies plain at `table_address` because it is the head too.
        """
        if table_address is not None:
            self._convert([table_address + token * self._row_bytes for token in token_ids], out)
            return
        wanted = dict.fromkeys(token_ids)
        kept = {token: address for token in wanted if (address := self._recent.find(token)) is not None}
        read = self._read([token for token in wanted if token not in kept])
        addresses = kept | read
        self._convert([addresses[token] for token in token_ids], out)
        for token, row in zip(read, self._raw, strict=False):  # only now: a row kept before may have to go
            self._recent.keep(token, row)

    def _convert(self, sources: Sequence[int], out: npt.NDArray[np.float32]) -> None:
        hidden_size, target = self._table.shape[0], out.ctypes.data
        for i, source in enumerate(sources):
            self._dequantiser.convert(source, target + i * hidden_size * 4, hidden_size)
        if self._scale != 1:
            rows = out[: len(sources)]
            np.multiply(rows, self._scale, out=rows)

    def _read(self, token_ids: Sequence[int]) -> dict[int, int]:
        """Addresses of the rows of distinct tokens, read one after another into `_raw`."""
        if not token_ids:
            return {}
        if self._last is not None and not self._last.is_done:
            self._wait(self._last)
        out = self._raw[: len(token_ids)].reshape(-1)
        self._last = self._reader.submit_rows([self._extent(token) for token in token_ids], out.data)
        self._wait(self._last)
        base = self._raw.ctypes.data
        return {token: base + i * self._row_bytes for i, token in enumerate(token_ids)}

    def _extent(self, token_id: int) -> Extent:
        whole = self._table.extent
        return Extent(whole.file_idx, whole.offset + token_id * self._row_bytes, self._row_bytes)


class _RecentRows:
    """The last used rows, as they lie in the file."""

    def __init__(self, num_rows: int, row_bytes: int) -> None:
        self._rows = np.empty((num_rows, row_bytes), np.uint8)
        self._address: int = self._rows.ctypes.data
        self._place_of: OrderedDict[int, int] = OrderedDict()  # least recently used first

    def find(self, token_id: int) -> int | None:
        """The address of its row, valid until the next `keep`."""
        place = self._place_of.get(token_id)
        if place is None:
            return None
        self._place_of.move_to_end(token_id)
        return self._address + place * self._rows.shape[1]

    def keep(self, token_id: int, row: npt.NDArray[np.uint8]) -> None:
        """In place of the least recently used one, when there is no room left."""
        is_full = len(self._place_of) == len(self._rows)
        place = self._place_of.popitem(last=False)[1] if is_full else len(self._place_of)
        self._place_of[token_id] = place
        self._rows[place] = row


def embedding_bytes(table: TensorSpec, max_tokens: int) -> int:
    """What an Embedding takes."""
    return (max_tokens + _num_recent(table)) * table.type.row_bytes(table.shape[0])


def _num_recent(table: TensorSpec) -> int:
    return min(RECENT_ROWS, table.shape[1])
