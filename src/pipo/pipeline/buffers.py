"""The memory a pass works in besides weights and KV: inputs, hidden state, logits. Allocated once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipo.base.units import round_up
from pipo.pipeline.spans import PassRows, SpanGroup
from pipo.tiers.ram import Place

_ALIGNMENT = 128
# up to which the results of a pass's experts are kept apart until all are there: some may be missing. With more tokens
# nearly all experts of a block are needed, and are added as they come
FEW_TOKENS = 16
# leaves of the stages: of all models, of a mixture, and where the head puts its pieces
INPUTS = ("hidden", "positions", "kv_rows", "mask", "out_rows", "normed")
LOCAL_MASK = "local_mask"  # of models with layers that slide
MIXED = ("mixed", "mixed_rows", "spread")  # where a pass may have tokens of several sequences
ROUTING = ("ffn_x", "router", "next_router")
ATTENTION_INPUTS = frozenset({"positions", "kv_rows", "mask", LOCAL_MASK, *MIXED[1:]})  # which it alone reads
STAGE_ARRAYS = frozenset({*INPUTS, LOCAL_MASK, *MIXED, *ROUTING, "logits"})


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
    slide see the `sliding_window` newest tokens; 0: none slides. What attention gives has `mixed_size` a token.
    """

    hidden_size: int
    vocab_size: int
    max_tokens: int
    num_kv_rows: int
    max_outputs: int
    experts: ExpertCounts | None = None
    sliding_window: int = 0
    num_sequences: int = 1
    mixed_size: int = 0

    @property
    def num_queries(self) -> int:
        """Rows of a mask: of several sequences those that have no token may have one."""
        return self.max_tokens + (self.num_sequences if self.num_sequences > 1 else 0)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each array."""
        t, out = self.max_tokens, self.max_outputs
        by_query = _query_sizes(self.num_queries, self.num_queries * self.num_kv_rows)
        return {
            "hidden": (t if self.experts is None else t + 1) * self.hidden_size * 4,
            "positions": t * 4,
            "kv_rows": t * 8,
            "mask": by_query["mask"],
            **({LOCAL_MASK: by_query[LOCAL_MASK]} if self.sliding_window else {}),
            **(self._mixed_sizes(by_query) if self.num_sequences > 1 else {}),
            "out_rows": out * 4,
            "normed": out * self.hidden_size * 4,
            "logits": out * self.vocab_size * 4,
            **({} if self.experts is None else self._expert_sizes(self.experts)),
        }

    @property
    def row_bytes(self) -> dict[str, int]:
        """Of a token's row of what stages hand on."""
        rows = {"hidden": self.hidden_size * 4}
        if self.experts is None:
            return rows
        scores = self.experts.num_experts * 4
        return rows | {"ffn_x": self.hidden_size * 4, "router": scores, "next_router": scores}

    def _mixed_sizes(self, by_query: dict[str, int]) -> dict[str, int]:
        mixed = {"mixed": (self.max_tokens + 1) * self.mixed_size * 4}
        return mixed | {name: by_query[name] for name in MIXED if name in by_query}

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


def _query_sizes(num_queries: int, mask_size: int) -> dict[str, int]:
    """Bytes of what queries have: `mask_size` elements of a mask, and each a place for its result."""
    return {"mask": mask_size * 2, LOCAL_MASK: mask_size * 2, "mixed_rows": num_queries * 8, "spread": num_queries * 4}


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
        self._mixed_rows, self._spread = None, np.empty(0, np.int32)
        if MIXED[0] in arrays:
            self._mixed_rows, self._spread = arrays["mixed_rows"].view(np.int64), arrays["spread"].view(np.int32)
        self._out_rows = arrays["out_rows"].view(np.int32)
        self._logits = arrays["logits"].view(np.float32)
        self.used_bytes: dict[str, int] = {}  # of the pass that was prepared last
        self.normed = arrays["normed"].view(np.float32).reshape(-1, shape.hidden_size)
        self.hidden = arrays["hidden"].view(np.float32).reshape(-1, shape.hidden_size)[: shape.max_tokens]
        self.arrays = arrays

    def prepare(self, rows: PassRows, outputs: npt.NDArray[np.int32], stride_rows: int = 0) -> None:
        """Positions, KV rows, causal masks, group by group. A sequence's rows begin `stride_rows` after those of the
        last one.
        """
        num_tokens, num_queries = rows.num_tokens, sum(group.num_queries for group in rows.groups)
        mask_size = sum(group.num_queries * group.num_kv_rows for group in rows.groups)
        assert num_tokens <= self.shape.max_tokens and len(outputs) <= self.shape.max_outputs
        assert mask_size <= self.shape.num_queries * self.shape.num_kv_rows
        self.used_bytes = self._used(num_tokens, num_queries, mask_size, len(outputs))
        self._out_rows[: len(outputs)] = outputs
        token = query = mask = 0
        for group in rows.groups:
            first = token
            for span in group.spans:
                end = token + span.num_tokens
                self._positions[token:end] = np.arange(span.start, span.end)
                self._kv_rows[token:end] = self._positions[token:end]
                self._kv_rows[token:end] += (span.sequence - group.first) * stride_rows
                token = end
            self._mask(group, mask, self._positions[first:token].tolist())
            if self._mixed_rows is not None:
                self._place(group, query, first, num_tokens)
            query, mask = query + group.num_queries, mask + group.num_queries * group.num_kv_rows

    def _mask(self, group: SpanGroup, begin: int, positions: list[int]) -> None:
        """From this element on. `positions` of its tokens; sequences without one see nothing."""
        num_rows, num_queries = group.num_kv_rows, group.num_queries
        for window, flat in self._masks:
            mask = flat[begin : begin + num_queries * num_rows].reshape(num_queries, num_rows)
            if group.is_spread:
                mask[:] = -np.inf
            seeing = (mask[query] for query in group.queries) if group.is_spread else mask
            for row, position in zip(seeing, positions, strict=True):
                # in place: an array of conditions would take three times the mask, outside any budget
                row[: position + 1] = 0
                row[position + 1 :] = -np.inf
                if window and position >= window:
                    row[: position + 1 - window] = -np.inf

    def _place(self, group: SpanGroup, query: int, token: int, num_tokens: int) -> None:
        """Where the results of the group's queries go, from the pass's query and token on."""
        assert self._mixed_rows is not None
        end = query + group.num_queries
        tokens = np.arange(token, token + group.num_tokens)
        if not group.is_spread:
            self._mixed_rows[query:end] = tokens
            return
        self._mixed_rows[query:end] = num_tokens  # the row of nobody
        self._spread[query:end] = token
        at = [query + each for each in group.queries]
        self._mixed_rows[at] = tokens
        self._spread[at] = tokens

    def _used(self, num_tokens: int, num_queries: int, mask_size: int, num_outputs: int) -> dict[str, int]:
        s = self.shape
        sizes = replace(s, max_tokens=num_tokens, num_kv_rows=1, max_outputs=num_outputs).sizes
        return sizes | {name: size for name, size in _query_sizes(num_queries, mask_size).items() if name in sizes}

    def logits(self, pieces: list[tuple[int, int]], num_outputs: int) -> npt.NDArray[np.float32]:
        """(outputs, vocabulary). A view for one output; a copy that joins the head's pieces for several."""
        if num_outputs == 1:
            return self._logits[: self.shape.vocab_size].reshape(1, -1)
        return np.concatenate(self._blocks(pieces, num_outputs), axis=1)

    def logit_rows(self, pieces: list[tuple[int, int]], num_outputs: int) -> Iterator[npt.NDArray[np.float32]]:
        """(vocabulary) of each output: a view where the head is in one piece, else a copy of this row alone."""
        blocks = self._blocks(pieces, num_outputs)
        for i in range(num_outputs):
            yield blocks[0][i] if len(blocks) == 1 else np.concatenate([block[i] for block in blocks])

    def _blocks(self, pieces: list[tuple[int, int]], num_outputs: int) -> list[npt.NDArray[np.float32]]:
        """(outputs, rows) of each piece of the head, where it put them."""
        return [
            self._logits[start * num_outputs : stop * num_outputs].reshape(num_outputs, stop - start)
            for start, stop in pieces
        ]

    @staticmethod
    def logits_offset(first_row: int, num_outputs: int) -> int:
        """Where in the logits the piece of the head that begins at `first_row` puts its (rows, outputs) results."""
        return first_row * num_outputs * 4
