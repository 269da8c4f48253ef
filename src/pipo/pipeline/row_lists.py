"""Which rows of a pass each of its experts computes, in memory that graphs read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipo.pipeline.buffers import PassBuffers, row_class
from pipo.pipeline.routing import Routing


@dataclass(frozen=True, slots=True)
class RowList:
    """Of one expert: where it begins in the arrays, and its rows with those that fill its graph's size."""

    first: int
    num_rows: int


class RowLists:
    """`lists` of the routing that was laid last, by the expert's number in its block; ascending."""

    def __init__(self, buffers: PassBuffers) -> None:
        arrays = buffers.arrays
        self._tokens = arrays["expert_rows"].view(np.int32)
        self._out = arrays["expert_out_rows"].view(np.int64)
        self._weights = arrays["expert_weights"].view(np.float32)
        self._bases = [buffers.addresses[f"expert_{name}"] for name in ("rows", "out_rows", "weights")]
        self.lists: dict[int, RowList] = {}
        self._is_of_one = False
        self._single: list[RowList] = []

    def lay(self, routing: Routing, unused_row: int, *, in_order: bool) -> None:
        """A row's result goes to the row of its token where results are added `in_order`, else to its own, token by
        token. What fills up a list has no weight and goes to `unused_row`.
        """
        self._is_of_one = False
        per_token = len(routing.experts[0])
        experts = np.asarray(routing.experts).ravel()
        pairs = np.argsort(experts, kind="stable")
        numbers, counts = np.unique(experts, return_counts=True)
        weights = np.asarray(routing.weights).ravel()[pairs]
        tokens = pairs // per_token
        out = tokens if in_order else pairs
        self.lists = {}
        begin = first = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            num_rows = row_class(count)
            end, stop = first + count, first + num_rows
            self._tokens[first:end], self._tokens[end:stop] = tokens[begin : begin + count], 0
            self._weights[first:end], self._weights[end:stop] = weights[begin : begin + count], 0
            self._out[first:end], self._out[end:stop] = out[begin : begin + count], unused_row
            self.lists[number] = RowList(first, num_rows)
            begin, first = begin + count, stop

    def lay_one(self, routing: Routing) -> None:
        """Of one token: each of its experts has a row for itself."""
        experts, weights = routing.experts[0], routing.weights[0]
        if not self._is_of_one:
            self._tokens[: len(experts)] = 0
            self._out[: len(experts)] = range(len(experts))
            self._single = [RowList(i, 1) for i in range(len(experts))]
            self._is_of_one = True
        self._weights[: len(experts)] = weights
        self.lists = dict(zip(experts, self._single, strict=True))

    def addresses(self, expert: int) -> tuple[int, int, int]:
        """Of the expert's tokens, the rows for its results, and their weights."""
        first = self.lists[expert].first
        return self._bases[0] + first * 4, self._bases[1] + first * 8, self._bases[2] + first * 4
