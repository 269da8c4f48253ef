"""The memory a pass works in besides weights and KV: inputs, hidden state, logits. Allocated once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipo.base.units import round_up
from pipo.kvcache.cache import kv_rows_class
from pipo.tiers.ram import Place

_ALIGNMENT = 128
# up to which the results of a pass's experts are kept apart until all are there: some may be missing. With more tokens
# nearly all experts of a block are needed, and are added as they come
FEW_TOKENS = 16
# leaves of the stages: of all models, of a mixture, and where the head puts its pieces
INPUTS = ("hidden", "positions", "kv_rows", "mask", "out_rows", "normed")
LOCAL_MASK = "local_mask"  # of models with layers that slide
ROUTING = ("ffn_x", "router", "next_router")
STAGE_ARRAYS = frozenset({*INPUTS, LOCAL_MASK, *ROUTING, "logits"})


def row_class(num_rows: int) -> int:
    """Rows of an expert's graph: a few sizes, so that few graphs serve; at most a quarter and three more than asked."""
    if num_rows <= 4:
        return num_rows
    step = 4
    while num_rows > 8 * step and step < 64:
        step *= 2
    return round_up(num_rows, step)


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """Of a mixture: the experts of a block, and how many of them a token passes."""

    num_experts: int
    num_experts_per_tok: int

    def num_results(self, max_tokens: int) -> int:
        """Rows of results that are kept apart; the last ones are for rows that pad an expert's graph."""
        return (min(max_tokens, FEW_TOKENS) + 1) * self.num_experts_per_tok

    def num_rows(self, max_tokens: int) -> int:
        """Of all experts' graphs together, at most."""
        pairs = max_tokens * self.num_experts_per_tok
        return pairs + pairs // 4 + 3 * min(self.num_experts, pairs)


@dataclass(frozen=True, slots=True)
class BufferShape:
    """`max_tokens` per pass, `num_kv_rows` of the whole context, `max_outputs` rows that reach the head. Layers that
    slide see the `sliding_window` newest tokens; 0: none slides.
    """

    hidden_size: int
    vocab_size: int
    max_tokens: int
    num_kv_rows: int
    max_outputs: int
    experts: ExpertCounts | None = None
    sliding_window: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each array."""
        t, rows, out = self.max_tokens, self.num_kv_rows, self.max_outputs
        return {
            "hidden": (t if self.experts is None else t + 1) * self.hidden_size * 4,
            "positions": t * 4,
            "kv_rows": t * 8,
            "mask": t * rows * 2,
            **({LOCAL_MASK: t * rows * 2} if self.sliding_window else {}),
            "out_rows": out * 4,
            "normed": out * self.hidden_size * 4,
            "logits": out * self.vocab_size * 4,
            **({} if self.experts is None else self._expert_sizes(self.experts)),
        }

    def _expert_sizes(self, experts: ExpertCounts) -> dict[str, int]:
        t, row, num_rows = self.max_tokens, self.hidden_size * 4, experts.num_rows(self.max_tokens)
        return {
            "ffn_x": (t + 1) * row,
            "router": t * experts.num_experts * 4,
            "next_router": t * experts.num_experts * 4,
            "expert_out": experts.num_results(t) * row,
            "expert_rows": num_rows * 4,
            "expert_out_rows": num_rows * 8,
            "expert_weights": num_rows * 4,
        }

    @property
    def num_bytes(self) -> int:
        return sum(round_up(size, _ALIGNMENT) for size in self.sizes.values())


@dataclass(frozen=True, slots=True)
class PassRows:
    """Whose tokens a pass computes: `tokens_each` of each sequence from `first` on, at positions from its start on."""

    starts: Sequence[int]
    tokens_each: int
    first: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.starts) * self.tokens_each

    @property
    def num_positions(self) -> int:
        """That the longest of them has after the pass."""
        return max(self.starts) + self.tokens_each

    @property
    def ends(self) -> Iterator[tuple[int, int]]:
        """Each sequence and the positions it has after the pass."""
        return ((self.first + i, start + self.tokens_each) for i, start in enumerate(self.starts))


class PassBuffers:
    """Addresses of the arrays by leaf name, and the writes that prepare a pass."""

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
        self._masks = [(0, arrays["mask"].view(np.float16))]  # with the tokens that a row sees, 0 for all before it
        if LOCAL_MASK in arrays:
            self._masks.append((shape.sliding_window, arrays[LOCAL_MASK].view(np.float16)))
        self._out_rows = arrays["out_rows"].view(np.int32)
        self._logits = arrays["logits"].view(np.float32)
        self.used_bytes: dict[str, int] = {}  # of the pass that was prepared last
        self.hidden = arrays["hidden"].view(np.float32).reshape(-1, shape.hidden_size)[: shape.max_tokens]
        self.arrays = arrays

    def prepare(self, rows: PassRows, outputs: npt.NDArray[np.int32], stride_rows: int = 0) -> None:
        """Positions, KV rows, causal masks. A sequence's rows begin `stride_rows` after those of the last one."""
        num_tokens, num_rows = rows.num_tokens, kv_rows_class(rows.num_positions)
        assert num_tokens <= self.shape.max_tokens and len(outputs) <= self.shape.max_outputs
        self.used_bytes = self._used(num_tokens, num_rows, len(outputs))
        positions = np.add.outer(rows.starts, np.arange(rows.tokens_each))
        self._positions[:num_tokens] = positions.ravel()
        self._kv_rows[:num_tokens] = (positions + np.arange(len(rows.starts))[:, None] * stride_rows).ravel()
        self._out_rows[: len(outputs)] = outputs
        for window, flat in self._masks:
            mask = flat[: num_tokens * num_rows].reshape(num_tokens, num_rows)
            for row, position in zip(mask, positions.ravel().tolist(), strict=True):
                # in place: an array of conditions would take three times the mask, outside any budget
                row[: position + 1] = 0
                row[position + 1 :] = -np.inf
                if window and position >= window:
                    row[: position + 1 - window] = -np.inf

    def _used(self, num_tokens: int, num_rows: int, num_outputs: int) -> dict[str, int]:
        s = self.shape
        return replace(s, max_tokens=num_tokens, num_kv_rows=num_rows, max_outputs=num_outputs).sizes

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
