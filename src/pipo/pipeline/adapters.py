"""The adapters of a running engine: always in RAM, with the scales of each pass's rows beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from pipo.base.adapter import ADAPTERS, Adapter, AdapterId, NamedAdapter
from pipo.base.manifest import Manifest, RopeLayout, TensorSpec
from pipo.base.units import PAGE_BYTES, round_up
from pipo.models.adapters import corrections_of, heads_to_reorder
from pipo.models.stage import Corrections, Stage
from pipo.pipeline.spans import PassRows
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.files import UncachedFile

_ALIGNMENT = 128
Weights = Mapping[AdapterId, float]  # how much of which adapters a sequence has


def scale_bytes(max_tokens: int) -> int:
    """Of one factor's scales, a row each."""
    return round_up(max_tokens * 4, _ALIGNMENT)


def adapter_bytes(adapter: Adapter, max_tokens: int) -> int:
    """What an adapter takes in RAM, where a pass has so many tokens at most."""
    tensors = sum(round_up(spec.num_bytes, _ALIGNMENT) for spec in specs_of(adapter))
    return round_up(tensors + len(adapter.factors) * scale_bytes(max_tokens), PAGE_BYTES)


def specs_of(adapter: Adapter) -> Iterator[TensorSpec]:
    return (spec for part in adapter.parts.values() for spec in (part.a, part.b))


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter and its memory. `scales[k]` are what rows of the pass have of its kth factor, times that."""

    named: NamedAdapter
    arena: Arena
    scales: tuple[npt.NDArray[np.float32], ...]
    factors: tuple[float, ...]
    addresses: Mapping[str, int]  # of its tensors and scales, by key

    @property
    def scale_keys(self) -> list[str]:
        return [scale_key(self.named.id, k) for k in range(len(self.scales))]


def tensor_key(adapter_id: AdapterId, tensor: str) -> str:
    return f"{adapter_id}:{tensor}"


def scale_key(adapter_id: AdapterId, factor_idx: int) -> str:
    return f"{adapter_id}:scale:{factor_idx}"


def _offsets(named: NamedAdapter, max_tokens: int) -> dict[str, int]:
    """Where in its memory each tensor and each factor's scales lie, by key."""
    sizes = {tensor_key(named.id, spec.name): round_up(spec.num_bytes, _ALIGNMENT) for spec in specs_of(named.adapter)}
    sizes |= {scale_key(named.id, k): scale_bytes(max_tokens) for k in range(len(named.adapter.factors))}
    return dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))


class ActiveAdapters:
    """Those that a pass has, in the order of their places in its graphs. The same object for the same ones."""

    def __init__(self, loaded: Sequence[LoadedAdapter]) -> None:
        self.loaded = tuple(loaded)
        self._corrections_of = corrections_of([each.named.adapter for each in loaded])
        self._corrections: dict[int, Corrections] = {}  # by the id of the stage, which outlives this
        self._leaves: dict[int, list[tuple[str, str]]] = {}

    def corrections(self, stage: Stage) -> Corrections:
        """What they add to the products of a stage."""
        if not self.loaded:
            return ()
        found = self._corrections.get(id(stage))
        if found is None:
            found = self._corrections[id(stage)] = self._corrections_of(stage)
        return found

    def keys_of_leaves(self, stage: Stage) -> Sequence[tuple[str, str]]:
        """Each leaf of the stage's corrections, and the key of what it is bound to."""
        if not self.loaded:
            return ()
        found = self._leaves.get(id(stage))
        if found is None:
            found = self._leaves[id(stage)] = list(self._keys_of_leaves(stage))
        return found

    def _keys_of_leaves(self, stage: Stage) -> Iterator[tuple[str, str]]:
        for each in self.corrections(stage):
            loaded = self.loaded[each.adapter]
            adapter_id = loaded.named.id
            part = loaded.named.adapter.parts[stage.matrices[f"{each.role}.weight"].name]
            yield each.leaf_a, tensor_key(adapter_id, part.a.name)
            yield each.leaf_b, tensor_key(adapter_id, part.b.name)
            yield each.scale, scale_key(adapter_id, loaded.factors.index(part.factor))


NO_ADAPTERS = ActiveAdapters(())


class AdapterStore:
    """Loads adapters into RAM, and says which of them a pass has. Threads: one at a time."""

    def __init__(self, manifest: Manifest, max_tokens: int, ledger: Ledger) -> None:
        self.addresses: dict[str, int] = {}  # by key, of all that are loaded
        self._manifest = manifest
        self._max_tokens = max_tokens
        self._ledger = ledger
        self._loaded: dict[AdapterId, LoadedAdapter] = {}
        self._active: dict[tuple[AdapterId, ...], ActiveAdapters] = {}

    @property
    def named(self) -> dict[AdapterId, NamedAdapter]:
        """In the order in which they came."""
        return {adapter_id: loaded.named for adapter_id, loaded in self._loaded.items()}

    def bytes_of(self, adapter: Adapter) -> int:
        """What it takes here."""
        return adapter_bytes(adapter, self._max_tokens)

    def load(self, named: NamedAdapter) -> LoadedAdapter:
        """Raises OverBudget, TransferError; then nothing has changed."""
        assert named.id not in self._loaded
        adapter = named.adapter
        arena = Arena(self.bytes_of(adapter), name=ADAPTERS, ledger=self._ledger)
        try:
            loaded = self._fill(named, arena)
        except BaseException:
            arena.close()
            raise
        self._loaded[named.id] = loaded
        self.addresses |= loaded.addresses
        return loaded

    def _fill(self, named: NamedAdapter, arena: Arena) -> LoadedAdapter:
        place, factors, offsets = arena.take(arena.num_bytes), named.adapter.factors, _offsets(named, self._max_tokens)
        self._read(named, place, offsets)
        starts = [offsets[scale_key(named.id, k)] for k in range(len(factors))]
        scales = tuple(np.frombuffer(place.view, np.float32, self._max_tokens, start) for start in starts)
        addresses = {key: place.address + offset for key, offset in offsets.items()}
        return LoadedAdapter(named, arena, scales, factors, addresses)

    def _read(self, named: NamedAdapter, place: Place, offsets: Mapping[str, int]) -> None:
        adapter = named.adapter
        with closing(UncachedFile(adapter.file, direct=False, identity=adapter.identity)) as file:
            for target, part in adapter.parts.items():
                for spec in (part.a, part.b):
                    start = offsets[tensor_key(named.id, spec.name)]
                    view = place.view[start : start + spec.num_bytes]
                    file.read(view, spec.extent.offset, spec.num_bytes)
                self._reorder(adapter, target, part.b, view)
            file.check_unchanged()

    def _reorder(self, adapter: Adapter, target: str, spec: TensorSpec, view: memoryview) -> None:
        """Rows of queries and keys, whose rotated pairs are neighbours in the model and halves of a head in the file,
        or the reverse.
        """
        num_heads = heads_to_reorder(adapter, target, self._manifest)
        if not num_heads:
            return
        rows = np.frombuffer(view, np.uint8).reshape(spec.shape[1], -1)
        split = (num_heads, 2, -1) if adapter.rows is RopeLayout.NEOX else (num_heads, -1, 2)
        rows[:] = np.moveaxis(rows.reshape(*split, rows.shape[1]), 1, 2).reshape(rows.shape).copy()

    def unload(self, adapter_id: AdapterId) -> None:
        """What was bound to it must not be computed any more."""
        loaded = self._loaded.pop(adapter_id)
        for key in loaded.addresses:
            del self.addresses[key]
        self._active.clear()
        loaded.arena.close()

    def take_rows(self, rows: PassRows, weights: Sequence[Weights]) -> ActiveAdapters:
        """Those that sequences of a pass have any of, with the scales of its rows set. `weights` by sequence."""
        spans = list(rows.spans)
        ours = [weights[span.sequence] for span in spans]
        ids = tuple(each for each in self._loaded if any(weight.get(each) for weight in ours))
        if not ids:
            return NO_ADAPTERS
        active = self._active.get(ids)
        if active is None:
            active = self._active[ids] = ActiveAdapters([self._loaded[each] for each in ids])
        for loaded in active.loaded:
            lengths = [span.num_tokens for span in spans]
            shares = np.repeat([weight.get(loaded.named.id, 0.0) for weight in ours], lengths)
            for scales, factor in zip(loaded.scales, loaded.factors, strict=True):
                scales[: rows.num_tokens] = shares * factor
        return active

    def close(self) -> None:
        """Closing again does nothing."""
        for adapter_id in list(self._loaded):
            self.unload(adapter_id)
