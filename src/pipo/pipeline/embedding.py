"""Embedding rows, gathered row by row: the table is never resident for their sake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipo.base.manifest import Extent, TensorSpec
from pipo.compute.dequantise import Dequantiser
from pipo.transfer.handle import Handle


class RowReader(Protocol):
    def submit_rows(self, extents: Sequence[Extent], out: memoryview) -> Handle: ...


class Embedding:
    """Writes the embeddings of tokens into float32 rows. Each distinct token is read once per call.

    `wait` returns when a handle is done, and raises what it met or that the pass was cancelled meanwhile.
    """

    def __init__(
        self,
        table: TensorSpec,
        reader: RowReader,
        wait: Callable[[Handle], None],
        dequantiser: Dequantiser,
        max_tokens: int,
    ) -> None:
        self._table = table
        self._reader = reader
        self._wait = wait
        self._last: Handle | None = None  # cancelled while it was read, it may still write to `_raw`
        self._dequantiser = dequantiser
        self._row_bytes = table.type.row_bytes(table.shape[0])
        self._raw = np.empty(max_tokens * self._row_bytes, np.uint8)

    @property
    def num_bytes(self) -> int:
        return self._raw.nbytes

    def gather(self, token_ids: Sequence[int], out: npt.NDArray[np.float32], table_address: int | None) -> None:
        """out (tokens, hidden_size). The caller vouches for the range of the ids.

        Reads the rows from disk, unless the table lies plain at `table_address` because it is the head too.
        """
        if table_address is not None:
            sources = [table_address + token * self._row_bytes for token in token_ids]
        else:
            sources = self._read(token_ids)
        hidden_size, target = self._table.shape[0], out.ctypes.data
        for i, source in enumerate(sources):
            self._dequantiser.convert(source, target + i * hidden_size * 4, hidden_size)

    def _read(self, token_ids: Sequence[int]) -> list[int]:
        """Addresses of the rows, after reading each distinct one once."""
        distinct, inverse = np.unique(np.asarray(token_ids), return_inverse=True)
        used = len(distinct) * self._row_bytes
        if self._last is not None and not self._last.is_done:
            self._wait(self._last)
        self._last = self._reader.submit_rows([self._extent(int(token)) for token in distinct], self._raw.data[:used])
        self._wait(self._last)
        base = self._raw.ctypes.data
        return [base + int(row) * self._row_bytes for row in inverse]

    def _extent(self, token_id: int) -> Extent:
        whole = self._table.extent
        return Extent(whole.file_idx, whole.offset + token_id * self._row_bytes, self._row_bytes)
