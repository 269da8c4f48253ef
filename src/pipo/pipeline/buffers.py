"""The memory a pass works in besides weights and KV: inputs, hidden state, logits. Allocated once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipo.base.units import round_up
from pipo.kvcache.cache import kv_rows_class
from pipo.tiers.ram import Place

_ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class BufferShape:
    """`max_tokens` per pass, `num_kv_rows` of the whole context, `max_outputs` rows that reach the head."""

    hidden_size: int
    vocab_size: int
    max_tokens: int
    num_kv_rows: int
    max_outputs: int

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each array."""
        t, rows, out = self.max_tokens, self.num_kv_rows, self.max_outputs
        return {
            "hidden": t * self.hidden_size * 4,
            "positions": t * 4,
            "kv_rows": t * 8,
            "mask": t * rows * 2,
            "out_rows": out * 4,
            "normed": out * self.hidden_size * 4,
            "logits": out * self.vocab_size * 4,
        }

    @property
    def num_bytes(self) -> int:
        return sum(round_up(size, _ALIGNMENT) for size in self.sizes.values())


class PassBuffers:
    """Addresses of the arrays by leaf name, and the writes that prepare a pass."""

    INPUTS = ("hidden", "positions", "kv_rows", "mask", "out_rows", "normed")  # leaves of the stages

    def __init__(self, shape: BufferShape, place: Place) -> None:
        self.shape = shape
        self.addresses: dict[str, int] = {}
        arrays, offset = {}, 0
        for name, size in shape.sizes.items():
            arrays[name] = np.frombuffer(place.view, np.uint8, size, offset)
            self.addresses[name] = place.address + offset
            offset += round_up(size, _ALIGNMENT)
        self._positions = arrays["positions"].view(np.int32)
        self._kv_rows = arrays["kv_rows"].view(np.int64)
        self._mask = arrays["mask"].view(np.float16)
        self._out_rows = arrays["out_rows"].view(np.int32)
        self._logits = arrays["logits"].view(np.float32)
        self.hidden = arrays["hidden"].view(np.float32).reshape(shape.max_tokens, shape.hidden_size)

    def prepare(self, start: int, num_tokens: int, outputs: npt.NDArray[np.int32]) -> None:
        """Positions, KV rows and the causal mask of tokens start … start + num_tokens - 1."""
        assert num_tokens <= self.shape.max_tokens and len(outputs) <= self.shape.max_outputs
        positions = np.arange(start, start + num_tokens)
        self._positions[:num_tokens] = positions
        self._kv_rows[:num_tokens] = positions
        self._out_rows[: len(outputs)] = outputs
        num_rows = kv_rows_class(start + num_tokens)
        mask = self._mask[: num_tokens * num_rows].reshape(num_tokens, num_rows)
        for row, position in zip(mask, range(start, start + num_tokens), strict=True):
            # in place: an array of conditions would take three times the mask, outside any budget
            row[: position + 1] = 0
            row[position + 1 :] = -np.inf

    def logits(self, pieces: list[tuple[int, int]], num_outputs: int) -> npt.NDArray[np.float32]:
        """(outputs, vocabulary). A view for one output; a copy that joins the head's pieces for several."""
        if num_outputs == 1:
            return self._logits[: self.shape.vocab_size].reshape(1, -1)
        blocks = [
            self._logits[start * num_outputs : stop * num_outputs].reshape(num_outputs, stop - start)
            for start, stop in pieces
        ]
        return np.concatenate(blocks, axis=1)

    @staticmethod
    def logits_offset(first_row: int, num_outputs: int) -> int:
        """Where in the logits the piece of the head that begins at `first_row` puts its (rows, outputs) results."""
        return first_row * num_outputs * 4
