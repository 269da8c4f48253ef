"""Whether a GGUF file is what it should be: its header, its bounds, and every byte of its tensors.

A packed file has checksums to compare with. Of any other the values are decoded, and must be finite: that finds noise
in scales, not every flipped bit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pipo.base.clock import Clock, RealClock
from pipo.base.manifest import Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB, PAGE_BYTES, round_down, round_up
from pipo.compute.ggml import Library
from pipo.formats.gguf import Gguf, open_gguf
from pipo.packing.checksums import NO_CHECKSUM, NUM_DIGITS, Hash, Recorded, recorded_checksums
from pipo.packing.convert import Converter, Workspace, groups_of, row_not_finite, workspace_sizes
from pipo.packing.types import TensorPlan
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.files import UncachedFile

CHUNK_BYTES = 4 * MIB  # of a read, of a thread
HEADER = "the header"
Progress = Callable[[int, int], None]  # bytes that were read, and all of them


@dataclass(frozen=True, slots=True)
class Damage:
    """The first tensor, in file order, that is not as it should be. `offset` is its own, in `file`."""

    tensor: str
    file: Path
    offset: int
    num_bytes: int
    wanted: str
    found: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`has_checksums` False: only bounds and values could be looked at."""

    files: tuple[Path, ...]
    num_tensors: int
    num_bytes: int
    has_checksums: bool
    damage: Damage | None
    seconds: float


def verify(
    path: Path,
    lib: Library,
    *,
    num_threads: int,
    on_progress: Progress = lambda done, total: None,
    clock: Clock | None = None,
) -> Verdict:
    """Read the whole file, past the page cache. Stops at the first damage.

    Raises: MalformedFile and UnsupportedModel for a header that cannot be trusted, DamagedFile for checksums that do
    not belong to it, TransferError. Memory: some 5 MiB a thread, 20 where values are decoded.
    """
    clock = clock or RealClock()
    begin = clock.now()
    gguf = open_gguf(path)
    recorded = recorded_checksums(gguf)
    with ExitStack() as resources:
        reader = _Reader(gguf, lib, recorded, resources, num_threads, on_progress)
        damage = reader.look_at_header() or reader.first_damage()
    num_bytes = sum(spec.num_bytes for spec in gguf.tensors.values())
    return Verdict(gguf.files, len(gguf.tensors), num_bytes, recorded is not None, damage, clock.now() - begin)


class _Reader:
    """Reads tensors on several threads, each with a workspace of its own."""

    def __init__(
        self,
        gguf: Gguf,
        lib: Library,
        recorded: Recorded | None,
        resources: ExitStack,
        num_threads: int,
        on_progress: Progress,
    ) -> None:
        self._gguf, self._recorded = gguf, recorded
        self._specs = sorted(gguf.tensors.values(), key=lambda spec: (spec.extent.file_idx, spec.extent.offset))
        self._files = [_opened(gguf, idx, resources) for idx in range(len(gguf.files))]
        self._on_progress, self._lock = on_progress, threading.Lock()
        self._done, self._total = 0, sum(spec.num_bytes for spec in self._specs)
        plans = [] if recorded else [_decoded(spec) for spec in self._specs if lib.multiplies(spec.type)]
        self._plans = {plan.name: plan for plan in plans}
        self._converter = Converter(lib, self._files, plans)
        self._workspaces = _workspaces(plans, num_threads, resources)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pipo verify")
        resources.callback(self._pool.shutdown, wait=True, cancel_futures=True)

    def look_at_header(self) -> Damage | None:
        """Its own checksum covers all of it: keys, tokenizer, tensor table, and the checksums of the tensors."""
        recorded = self._recorded
        if recorded is None or not self._specs:
            return None
        end = self._specs[0].extent.offset
        hasher = Hash()
        for start, view in self._chunks(Extent(FileIdx(0), 0, end), self._workspaces[0].raw):
            hasher.update(_without(recorded, start, view))
        if hasher.hexdigest() == recorded.header:
            return None
        return Damage(HEADER, self._gguf.files[0], 0, end, recorded.header, hasher.hexdigest())

    def first_damage(self) -> Damage | None:
        free = deque(self._workspaces)
        running: deque[tuple[Workspace, Future[Damage | None]]] = deque()
        for spec in self._specs:
            if not free:
                workspace, future = running.popleft()
                if damage := future.result():
                    return damage
                free.append(workspace)
            workspace = free.popleft()
            running.append((workspace, self._pool.submit(self._look_at, spec, workspace)))
        return next(filter(None, (future.result() for _, future in running)), None)

    def _look_at(self, spec: TensorSpec, workspace: Workspace) -> Damage | None:
        if self._recorded is not None:
            found = self._checksum(spec, workspace.raw)
            wanted = self._recorded.by_tensor[spec.name]
            return None if found == wanted else self._damage(spec, wanted, found)
        plan = self._plans.get(spec.name)
        if plan is None:  # whole numbers are all right whatever they are
            self._advance(spec.num_bytes)
            return None
        return self._values(plan, workspace)

    def _checksum(self, spec: TensorSpec, place: Place) -> str:
        hasher = Hash()
        for _, view in self._chunks(spec.extent, place):
            hasher.update(view)
            self._advance(len(view))
        return hasher.hexdigest()

    def _values(self, plan: TensorPlan, workspace: Workspace) -> Damage | None:
        for group in groups_of(plan, CHUNK_BYTES):
            row = row_not_finite(group, self._converter.decode(group, workspace)[1])
            if row is not None:
                return self._damage(plan.source, "finite numbers", f"one that is not in row {row}")
            self._advance(group.num_rows * plan.source_row_bytes)
        return None

    def _damage(self, spec: TensorSpec, wanted: str, found: str) -> Damage:
        extent = spec.extent
        return Damage(spec.name, self._gguf.files[extent.file_idx], extent.offset, extent.num_bytes, wanted, found)

    def _chunks(self, extent: Extent, place: Place) -> Iterator[tuple[int, memoryview]]:
        """The extent in pieces, each with its offset in the file; valid until the next one."""
        file, offset = self._files[extent.file_idx], extent.offset
        while offset < extent.end:
            begin = round_down(offset, PAGE_BYTES)
            end = min(begin + CHUNK_BYTES, extent.end)
            file.read(place.view[: round_up(end - begin, PAGE_BYTES)], begin, end - begin)
            yield offset, place.view[offset - begin : end - begin]
            offset = end

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._on_progress(self._done, self._total)


def _decoded(spec: TensorSpec) -> TensorPlan:
    """As if to float32, where its values are looked at."""
    return TensorPlan(spec, TensorType.F32, TensorType.F32)


def _without(recorded: Recorded, start: int, view: memoryview) -> bytes:
    """The header's bytes with zeros where its own checksum stands."""
    raw = bytearray(view)
    for i in range(NUM_DIGITS):
        at = recorded.header_offset + i - start
        if 0 <= at < len(raw):
            raw[at] = ord(NO_CHECKSUM[i])
    return bytes(raw)


def _workspaces(plans: Sequence[TensorPlan], num_threads: int, resources: ExitStack) -> list[Workspace]:
    sizes = workspace_sizes(plans, CHUNK_BYTES)
    raw_bytes = max(sizes.raw, CHUNK_BYTES)
    each = raw_bytes + sizes.floats + sizes.out
    num_bytes = (num_threads + 1) * each
    arena = resources.enter_context(Arena(num_bytes, name="rows", ledger=Ledger(num_bytes)))
    return [
        Workspace(arena.take(raw_bytes), arena.take(sizes.floats), arena.take(sizes.out))
        for _ in range(num_threads + 1)
    ]


def _opened(gguf: Gguf, idx: int, resources: ExitStack) -> UncachedFile:
    file = UncachedFile(gguf.files[idx], identity=gguf.identities[idx])
    resources.callback(file.close)
    return file
