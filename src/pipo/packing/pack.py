"""Quantise a model into one GGUF laid out for streaming: tensor by tensor, within a budget, resumable, atomic.

Threads convert groups of rows; the caller's thread takes the results in order, hashes them and writes them past the
page cache. A tensor counts as done once its bytes are on the disk and the journal says so.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pipo.base.clock import Clock, RealClock
from pipo.base.errors import PipoError, UsageError
from pipo.base.manifest import Manifest
from pipo.base.tensor_type import TensorType
from pipo.base.units import MIB
from pipo.compute.ggml import Library
from pipo.formats.checkpoint import Checkpoint
from pipo.formats.gguf_writer import copy_entries, spans_to_copy
from pipo.hardware.memory import PeakSampler
from pipo.models.registry import stages_of
from pipo.packing.checksums import OWN_PREFIX, Hash
from pipo.packing.convert import Converter, RowGroup, Workspace, groups_of
from pipo.packing.journal import Identity, Journal
from pipo.packing.layout import REPLACED_KEYS, PackLayout, lay_out
from pipo.packing.memory import PackMemory, fit_memory, process_bytes_now
from pipo.packing.part import PartFile, Pwrite, TensorWriter
from pipo.packing.types import TensorPlan, check_readable
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena, Place
from pipo.transfer.files import UncachedFile

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes of the source that are done, and all of them
SYNC_BYTES = 16 * MIB  # of the output: what a kill costs at most, besides the tensor it falls into


@dataclass(frozen=True, slots=True)
class PackPlan:
    """A pack before it begins: what the file will be, and the memory it is made in."""

    manifest: Manifest
    layout: PackLayout
    memory: PackMemory
    limit_bytes: int
    identity: Identity  # of the result: another source, type or library makes another file

    @property
    def fallbacks(self) -> list[TensorPlan]:
        return [tensor for tensor in self.layout.tensors if tensor.type is not tensor.wanted]

    @property
    def requantised(self) -> list[TensorPlan]:
        return [tensor for tensor in self.layout.tensors if tensor.is_requantised]

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Of the output, largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.layout.tensors:
            sizes[tensor.type.name] += tensor.num_bytes
        return dict(sizes.most_common())

    @property
    def bits_per_weight(self) -> float:
        num_elems = sum(tensor.num_elems for tensor in self.layout.tensors)
        return 8 * sum(tensor.num_bytes for tensor in self.layout.tensors) / max(num_elems, 1)


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a pack cost. `resumed` tensors were there already; `read_bytes` are those of the others."""

    path: Path
    num_bytes: int
    seconds: float
    read_bytes: int
    resumed: int
    peak_bytes: int


def plan_pack(checkpoint: Checkpoint, target: TensorType, lib: Library, limit_bytes: int, num_workers: int) -> PackPlan:
    """Decide everything from headers. Raises ModelError, OverBudget naming the smallest limit that works."""
    manifest = checkpoint.manifest
    stages = stages_of(manifest)
    spans = spans_to_copy(checkpoint.metadata, without=REPLACED_KEYS, prefix=OWN_PREFIX)
    bare = lay_out(manifest, stages, target, ())  # without what is copied: that takes memory
    check_readable(manifest, bare.tensors, [type_ for type_ in TensorType if lib.multiplies(type_)])
    header_bytes = bare.data_start + sum(size for _, size in spans)
    memory = fit_memory(bare.tensors, header_bytes, limit_bytes, num_workers, process_bytes_now())
    layout = lay_out(manifest, stages, target, copy_entries(checkpoint.metadata, spans))
    return PackPlan(manifest, layout, memory, limit_bytes, _identity(manifest, layout, lib))


def check_output(path: Path, manifest: Manifest, *, overwrite: bool) -> None:
    """Raises UsageError where the file would replace what it must not."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="name a file with -o")
    if not path.exists():
        return
    if any(path.samefile(file) for file in manifest.files):
        raise UsageError(f"{path} is the model itself", hint="name another file with -o")
    if not overwrite:
        raise UsageError(f"{path} is there already", hint="--overwrite replaces it, -o names another file")


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
    with ExitStack() as resources:
        part = PartFile(path, pwrite=pwrite)
        resources.callback(part.close)
        journal = Journal(path.with_name(f"{path.name}.part.journal"))
        checksums = _resumable(plan, part, journal)
        part.check_space(plan.layout.num_bytes)
        journal.begin(plan.identity, checksums)
        resumed = len(checksums)
        ledger = Ledger(plan.limit_bytes)
        for name in ("process", "header"):
            resources.enter_context(ledger.reserve(name, plan.memory.breakdown[name]))
        arena = resources.enter_context(_arena(plan.memory, ledger))
        files = [_opened(plan.manifest, idx, resources) for idx in range(len(plan.manifest.files))]
        converter = Converter(lib, files, plan.layout.tensors)
        writer = _Writer(plan, part, journal, arena.take(plan.memory.staging_bytes), checksums, peak, on_progress)
        _run(plan, converter, arena, writer, resumed)
        for file in files:
            file.check_path()
        _publish(plan, part, journal, writer)
        peak.sample()
    read_bytes = sum(tensor.source.num_bytes for tensor in plan.layout.tensors[resumed:])
    return PackReport(path, plan.layout.num_bytes, clock.now() - begin, read_bytes, resumed, peak.peak_bytes)


class _Writer:
    """Takes converted rows in file order: hashes, writes, and enters finished tensors into the journal."""

    def __init__(
        self,
        plan: PackPlan,
        part: PartFile,
        journal: Journal,
        staging: Place,
        checksums: list[str],
        peak: PeakSampler,
        on_progress: Progress,
    ) -> None:
        self.checksums = checksums
        self.staging = staging
        self._plan, self._part, self._journal = plan, part, journal
        self._peak, self._on_progress = peak, on_progress
        self._num_entered = len(checksums)
        self._unsynced_bytes = 0
        self._hash, self._tensor = Hash(), self._begin()
        self._total = sum(tensor.source.num_bytes for tensor in plan.layout.tensors)
        self._done = sum(tensor.source.num_bytes for tensor in plan.layout.tensors[: len(checksums)])

    def take(self, group: RowGroup, rows: memoryview) -> None:
        self._hash.update(rows)
        self._tensor.append(rows)
        self._unsynced_bytes += len(rows)
        self._done += group.num_rows * group.tensor.source_row_bytes
        if group.start + group.num_rows == group.tensor.num_rows:
            self._tensor.finish()
            self.checksums.append(self._hash.hexdigest())
            self._hash, self._tensor = Hash(), self._begin()
            if self._unsynced_bytes >= SYNC_BYTES:
                self.enter()
        self._peak.sample()
        self._on_progress(self._done, self._total)

    def enter(self) -> None:
        """What is finished is on the disk, then in the journal."""
        fresh = self.checksums[self._num_entered :]
        if not fresh:
            return
        self._part.sync()
        self._journal.append(self._num_entered, fresh)
        self._num_entered += len(fresh)
        self._unsynced_bytes = 0

    def _begin(self) -> TensorWriter:
        offsets = self._plan.layout.offsets
        idx = len(self.checksums)
        return TensorWriter(self._part, self.staging, offsets[idx] if idx < len(offsets) else 0)


def _identity(manifest: Manifest, layout: PackLayout, lib: Library) -> Identity:
    sources = [
        [str(file.resolve()), identity.inode, identity.num_bytes, identity.modified_ns]
        for file, identity in zip(manifest.files, manifest.identities, strict=True)
    ]
    return {"pipo_pack": 1, "sources": sources, "layout": layout.fingerprint, "libggml": lib.version_text}


def _resumable(plan: PackPlan, part: PartFile, journal: Journal) -> list[str]:
    """Checksums of the tensors that an earlier run of this pack has written; of another's nothing is kept."""
    checksums = journal.read(plan.identity)[: len(plan.layout.tensors)]
    while checksums and _end(plan.layout, len(checksums) - 1) > part.num_bytes:
        checksums.pop()  # the file was cut meanwhile
    if not checksums:
        if part.num_bytes:
            log.info("part=%s action=restart reason=%r", part.part, "of another pack, or nothing finished")
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


def _run(plan: PackPlan, converter: Converter, arena: Arena, writer: _Writer, first: int) -> None:
    """Convert what is left, several groups at a time, and hand them over in order."""
    groups = chain.from_iterable(groups_of(t, plan.memory.group_bytes) for t in plan.layout.tensors[first:])
    pool = ThreadPoolExecutor(plan.memory.num_workers, thread_name_prefix="pipo pack")
    try:
        for group, rows in _in_order(pool, converter, groups, _workspaces(plan.memory, arena)):
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


def _publish(plan: PackPlan, part: PartFile, journal: Journal, writer: _Writer) -> None:
    header = plan.layout.header(writer.checksums)
    target = TensorWriter(part, writer.staging, 0)
    target.append(memoryview(header))
    target.finish()
    part.sync()
    part.publish(plan.layout.num_bytes)
    journal.remove()
