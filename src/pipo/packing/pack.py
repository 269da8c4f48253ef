"""Quantise a model into one GGUF laid out for streaming: tensor by tensor, within a budget, resumable, atomic.

Threads convert groups of rows; the caller's thread takes the results in order, hashes them and writes them past the
page cache. A tensor counts as done once its bytes are on the disk and the journal says so.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pipo.base.clock import Clock, RealClock
from pipo.base.errors import PipoError
from pipo.base.manifest import Manifest
from pipo.base.units import MIB
from pipo.compute.ggml import Library
from pipo.compute.repack import RepackBuffer
from pipo.hardware.memory import PeakSampler
from pipo.packing.checksums import Hash
from pipo.packing.convert import Converter, RowGroup, Workspace, groups_of
from pipo.packing.journal import Journal
from pipo.packing.layout import PackLayout
from pipo.packing.memory import PackMemory
from pipo.packing.part import PartFile, Pwrite, TensorWriter
from pipo.packing.plan import PackPlan
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.files import UncachedFile

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes of the source that are done, and all of them
SYNC_BYTES = 16 * MIB  # of the output: what a kill costs at most, besides the tensor it falls into


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a pack cost. `resumed` tensors were there already; `read_bytes` are those of the others."""

    path: Path
    num_bytes: int
    seconds: float
    read_bytes: int
    resumed: int
    peak_bytes: int


def pack(
    plan: PackPlan,
    path: Path,
    lib: Library,
    *,
    on_progress: Progress = lambda done, total: None,
    clock: Clock | None = None,
    pwrite: Pwrite = os.pwrite,
) -> PackReport:
    """Write the file, going on where an earlier run of the same pack was ended.

    Raises: OutputFailed, TransferError (FileChanged: the source is another file now), MalformedFile, UnsupportedModel.
    After any of them, and after a kill, nothing new is at `path`, and the same call continues.
    """
    clock = clock or RealClock()
    begin, peak = clock.now(), PeakSampler()
    with closing(PartFile(path, pwrite=pwrite)) as part:
        journal = Journal(path.with_name(f"{path.name}.part.journal"))
        checksums = _resumable(plan, part, journal)
        resumed = len(checksums)
        try:
            part.check_space(plan.layout.num_bytes)
            journal.begin(plan.identity, checksums)
            _write(_Job(plan, part, journal, checksums, peak, on_progress), lib)
            part.publish(plan.layout.num_bytes)
            journal.remove()
        except BaseException:
            if not checksums:  # nothing to go on from
                journal.remove()
                part.discard()
            raise
    read_bytes = sum(tensor.source_bytes for tensor in plan.layout.tensors[resumed:])
    return PackReport(path, plan.layout.num_bytes, clock.now() - begin, read_bytes, resumed, peak.peak_bytes)


@dataclass(frozen=True, slots=True)
class _Job:
    """One run of a pack. `checksums` are those of the finished tensors; they become more."""

    plan: PackPlan
    part: PartFile
    journal: Journal
    checksums: list[str]
    peak: PeakSampler
    on_progress: Progress


def _write(job: _Job, lib: Library) -> None:
    """Everything that is not finished yet, in a memory that the ledger counts, and the header at last."""
    plan, memory = job.plan, job.plan.memory
    with ExitStack() as resources:
        ledger = Ledger(plan.limit_bytes)
        for name in ("process", "header"):
            resources.enter_context(ledger.reserve(name, memory.breakdown[name]))
        arena = resources.enter_context(_arena(memory, ledger))
        files = [_opened(plan.manifest, idx, resources) for idx in range(len(plan.manifest.files))]
        writer = _Writer(job, arena.take(memory.staging_bytes))
        repack = _repack_buffer(plan, lib, resources)
        _convert_all(job, Converter(lib, files, plan.layout.tensors, repack), _workspaces(memory, arena), writer)
        for file in files:
            file.check_path()
        writer.write_header()
    job.peak.sample()


def _repack_buffer(plan: PackPlan, lib: Library, resources: ExitStack) -> RepackBuffer | None:
    """Where a tensor is to be repacked."""
    if not any(tensor.is_repacked for tensor in plan.layout.tensors):
        return None
    repack = RepackBuffer.find(lib)
    if repack is not None:
        resources.callback(repack.close)
    return repack


class _Writer:
    """Takes converted rows in file order: hashes, writes, and enters finished tensors into the journal."""

    def __init__(self, job: _Job, staging: Place) -> None:
        self._job, self._staging = job, staging
        self._num_entered = len(job.checksums)
        self._unsynced_bytes = 0
        self._hash, self._tensor = Hash(), self._begin()
        sizes = [tensor.source_bytes for tensor in job.plan.layout.tensors]
        self._total, self._done = sum(sizes), sum(sizes[: len(job.checksums)])

    def take(self, group: RowGroup, rows: memoryview) -> None:
        self._hash.update(rows)
        self._tensor.append(rows)
        self._unsynced_bytes += len(rows)
        self._done += group.num_rows * group.tensor.source_row_bytes
        if group.start + group.num_rows == group.tensor.num_rows:
            self._tensor.finish()
            self._job.checksums.append(self._hash.hexdigest())
            self._hash, self._tensor = Hash(), self._begin()
            if self._unsynced_bytes >= SYNC_BYTES:
                self.enter()
        self._job.peak.sample()
        self._job.on_progress(self._done, self._total)

    def enter(self) -> None:
        """What is finished is on the disk, then in the journal."""
        fresh = self._job.checksums[self._num_entered :]
        if not fresh:
            return
        self._job.part.sync()
        self._job.journal.append(self._num_entered, fresh)
        self._num_entered += len(fresh)
        self._unsynced_bytes = 0

    def write_header(self) -> None:
        header = self._job.plan.layout.header(self._job.checksums)
        target = TensorWriter(self._job.part, self._staging, 0)
        target.append(memoryview(header))
        target.finish()
        self._job.part.sync()

    def _begin(self) -> TensorWriter:
        offsets, idx = self._job.plan.layout.offsets, len(self._job.checksums)
        return TensorWriter(self._job.part, self._staging, offsets[idx] if idx < len(offsets) else 0)


def _resumable(plan: PackPlan, part: PartFile, journal: Journal) -> list[str]:
    """Checksums of the tensors that an earlier run of this pack has written; of another's nothing is kept."""
    checksums = journal.read(plan.identity)[: len(plan.layout.tensors)]
    while checksums and _end(plan.layout, len(checksums) - 1) > part.num_bytes:
        checksums.pop()  # the file was cut meanwhile
    if not checksums:
        if part.num_bytes:
            log.warning("part=%s action=restart reason=%r", part.part, "no finished tensor of this pack in it")
        part.empty()
    return checksums


def _end(layout: PackLayout, idx: int) -> int:
    return layout.offsets[idx] + layout.tensors[idx].num_bytes


def _arena(memory: PackMemory, ledger: Ledger) -> Arena:
    num_bytes = memory.staging_bytes + memory.num_workspaces * memory.workspace.num_bytes
    return Arena(num_bytes, name="rows", ledger=ledger)


def _workspaces(memory: PackMemory, arena: Arena) -> list[Workspace]:
    sizes = memory.workspace
    return [
        Workspace(arena.take(sizes.raw), arena.take(sizes.floats), arena.take(sizes.out))
        for _ in range(memory.num_workspaces)
    ]


def _opened(manifest: Manifest, idx: int, resources: ExitStack) -> UncachedFile:
    file = UncachedFile(manifest.files[idx], identity=manifest.identities[idx])
    resources.callback(file.close)
    return file


def _convert_all(job: _Job, converter: Converter, workspaces: Sequence[Workspace], writer: _Writer) -> None:
    """What is left, several groups at a time, handed over in order."""
    memory, left = job.plan.memory, job.plan.layout.tensors[len(job.checksums) :]
    groups = chain.from_iterable(groups_of(tensor, memory.group_bytes) for tensor in left)
    pool = ThreadPoolExecutor(memory.num_workers, thread_name_prefix="pipo pack")
    try:
        for group, rows in _in_order(pool, converter, groups, workspaces):
            writer.take(group, rows)
        writer.enter()
    except BaseException:
        with suppress(PipoError):  # why it ended matters more
            writer.enter()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, converter: Converter, groups: Iterator[RowGroup], workspaces: Sequence[Workspace]
) -> Iterator[tuple[RowGroup, memoryview]]:
    """Rows are valid until the next ones are asked for."""
    free = deque(workspaces)
    running: deque[tuple[RowGroup, Workspace, Future[memoryview]]] = deque()
    for group in groups:
        workspace = free.popleft()
        running.append((group, workspace, pool.submit(converter.convert, group, workspace)))
        if not free:
            yield from _oldest(running, free)
    while running:
        yield from _oldest(running, free)


def _oldest(
    running: deque[tuple[RowGroup, Workspace, Future[memoryview]]], free: deque[Workspace]
) -> Iterator[tuple[RowGroup, memoryview]]:
    group, workspace, future = running.popleft()
    yield group, future.result()
    free.append(workspace)
