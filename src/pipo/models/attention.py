"""Attention of a pass, group by group: tokens of one sequence, or one token each of several that lie side by side.

Leaves besides those of `blocks.py`, only where one attention does not give the rows of the pass in order: `mixed`
(head_dim * heads, T + 1) F32, where the groups' results come together, with a row for those of nobody · `mixed_rows`
(queries,) I64, where each query's result goes · `spread` (queries,) I32, which token each query is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from pipo.base.tensor_type import TensorType
from pipo.compute.views import Tensor
from pipo.models.stage import KvGroup, StageBuilder


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Queries (head_dim, heads, T), keys and values (head_dim * kv heads, T), and where they go and what they see."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    mask: Tensor
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a group begins among the groups, the tokens, the queries and the elements of the mask."""

    idx: int = 0
    token: int = 0
    query: int = 0
    mask: int = 0

    def after(self, group: KvGroup) -> _Place:
        return _Place(
            self.idx + 1, self.token + group.num_tokens, self.query + group.num_queries, self.mask + group.mask_size
        )


def mix(s: StageBuilder, q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
    """Attention over this pass's keys and values and those before: (head_dim * heads, T)."""
    ops, num_tokens = s.ops, s.shape.num_tokens
    mask_size = sum(group.mask_size for group in s.shape.groups)
    inputs = _Inputs(
        q,
        ops.reshape(k, s.hyper.head_dim * s.hyper.num_kv_heads, num_tokens),
        v,
        ops.leaf("kv_rows", TensorType.I64, num_tokens),
        ops.leaf(mask, TensorType.F16, mask_size),
        s.weight("attn_sinks.weight") if s.has("attn_sinks.weight") else None,
    )
    if s.shape.is_plain:
        return _attend(s, s.shape.groups[0], _Place(), inputs, _queries(s, s.shape.groups[0], _Place(), q))
    return _mix_groups(s, inputs)


def _mix_groups(s: StageBuilder, inputs: _Inputs) -> Tensor:
    """Each result goes to its rows of one array: whoever reads that depends on all of them."""
    ops, groups, num_tokens = s.ops, s.shape.groups, s.shape.num_tokens
    num_queries = sum(group.num_queries for group in groups)
    mixed = ops.leaf("mixed", TensorType.F32, s.hyper.head_dim * s.hyper.num_q_heads, num_tokens + 1)
    rows = ops.leaf("mixed_rows", TensorType.I64, num_queries)
    is_spread = any(group.is_spread for group in groups)
    spread = ops.leaf("spread", TensorType.I32, num_queries) if is_spread else None
    place = _Place()
    for group in groups:
        if group.is_spread and spread is not None:
            q = _spread_queries(s, group, inputs.q, ops.tokens(spread, place.query, group.num_queries))
        else:
            q = _queries(s, group, place, inputs.q)
        result = _attend(s, group, place, inputs, q)
        mixed = ops.set_rows(mixed, result, ops.tokens(rows, place.query, group.num_queries))
        place = place.after(group)
    return ops.tokens(mixed, 0, num_tokens)


def _queries(s: StageBuilder, group: KvGroup, place: _Place, q: Tensor) -> Tensor:
    """(head_dim, heads, tokens), of several sequences (head_dim, heads, 1, sequences)."""
    q = s.ops.tokens(q, place.token, group.num_tokens)
    return s.ops.apart(q) if group.num_sequences > 1 else q


def _spread_queries(s: StageBuilder, group: KvGroup, q: Tensor, which: Tensor) -> Tensor:
    """A row for each sequence of the group: any token's for those that have none."""
    chosen = s.ops.get_rows(s.ops.flat(q), which)
    return s.ops.reshape(chosen, s.hyper.head_dim, s.hyper.num_q_heads, 1, group.num_sequences)


def _attend(s: StageBuilder, group: KvGroup, place: _Place, inputs: _Inputs, q: Tensor) -> Tensor:
    """(head_dim * heads, queries)"""
    ops, h = s.ops, s.hyper
    keys, values = _store(s, group, place, inputs)
    each = (1, 1, group.num_sequences) if group.num_sequences > 1 else (group.num_tokens,)
    seen = ops.part(inputs.mask, place.mask, group.num_kv_rows, *each)
    scale = 1.0 / sqrt(h.head_dim) if h.attention_scale is None else h.attention_scale
    q = ops.permute(q, 0, 2, 1)
    mixed = ops.flash_attention(q, keys, values, seen, scale, h.attention_softcap, inputs.sinks)
    return ops.reshape(mixed, h.head_dim * h.num_q_heads, group.num_queries)


def _store(s: StageBuilder, group: KvGroup, place: _Place, inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Write new rows into the cache; the views returned depend on the writes, so no device may reorder them."""
    ops, h = s.ops, s.hyper
    rows = ops.tokens(inputs.rows, place.token, group.num_tokens)
    views = []
    for name, type_, new in (("k_cache", s.shape.kv_type_k, inputs.k), ("v_cache", s.shape.kv_type_v, inputs.v)):
        cache = ops.leaf(f"{name}.{place.idx}", type_, h.head_dim * h.num_kv_heads, group.num_cache_rows)
        stored = ops.set_rows(cache, ops.tokens(new, place.token, group.num_tokens), rows)
        sequences = group.num_sequences, group.stride_rows
        views.append(ops.heads_view(stored, h.head_dim, h.num_kv_heads, group.num_kv_rows, *sequences))
    return views[0], views[1]
