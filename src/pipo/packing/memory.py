"""How a pack keeps its budget: as many threads and as large groups of rows as the limit has room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipo.base.errors import OverBudget
from pipo.base.units import KIB, MIB, format_size, round_up
from pipo.hardware.memory import process_memory
from pipo.packing.convert import WorkspaceSizes, workspace_sizes
from pipo.packing.types import TensorPlan
from pipo.planner.placement import smallest_ram_text

# What the process takes besides its buffers, by declaration, so that the smallest budget is the same on every run: 24
# MiB measured with everything imported. One that measures more, as with a long table of tensors, is charged for it.
PROCESS_BYTES = 36 * MIB
_PROCESS_GROWTH, _PROCESS_STEP = 6 * MIB, 4 * MIB
# Of float32. Larger ones gain nothing: reads of 1 MiB and more are as fast, and a group takes a thread some 10 ms.
_GROUP_BYTES = (8 * MIB, 4 * MIB, 2 * MIB, MIB, 512 * KIB, 256 * KIB)
_LEAST_GROUP_BYTES = 64 * KIB
_LEAST_STAGING, _MOST_STAGING = 256 * KIB, 4 * MIB
_HEADER_COPIES = 3  # its entries, the header made of them, and the one with its own checksum


@dataclass(frozen=True, slots=True)
class PackMemory:
    """Who holds how much. There is a workspace for each thread, and one whose rows are being written."""

    num_workers: int
    group_bytes: int
    workspace: WorkspaceSizes
    staging_bytes: int
    header_bytes: int
    process_bytes: int

    @property
    def num_workspaces(self) -> int:
        return self.num_workers + 1

    @property
    def breakdown(self) -> dict[str, int]:
        return {
            "process": self.process_bytes,
            "rows": self.num_workspaces * self.workspace.num_bytes,
            "header": self.header_bytes,
            "staging": self.staging_bytes,
        }

    @property
    def num_bytes(self) -> int:
        return sum(self.breakdown.values())


def fit_memory(
    tensors: Sequence[TensorPlan], header_bytes: int, limit_bytes: int, num_workers: int, process_bytes: int
) -> PackMemory:
    """The roomiest that fits. Raises OverBudget naming the smallest limit that works."""
    for workers, group_bytes in _ways(num_workers):
        staging = min(max(group_bytes // 2, _LEAST_STAGING), _MOST_STAGING)
        sizes = workspace_sizes(tensors, group_bytes)
        memory = PackMemory(workers, group_bytes, sizes, staging, _HEADER_COPIES * header_bytes, process_bytes)
        if memory.num_bytes <= limit_bytes:
            return memory
    raise _over_budget(memory, limit_bytes)


def process_bytes_now() -> int:
    """What this process takes, with room to grow a little."""
    return max(PROCESS_BYTES, round_up(process_memory().anonymous_bytes + _PROCESS_GROWTH, _PROCESS_STEP))


def _ways(num_workers: int) -> Iterator[tuple[int, int]]:
    """Smaller groups before fewer threads; the last one is the smallest."""
    yield from ((num_workers, group_bytes) for group_bytes in _GROUP_BYTES)
    yield from ((workers, _GROUP_BYTES[-1]) for workers in range(num_workers - 1, 0, -1))
    yield 1, _LEAST_GROUP_BYTES


def _over_budget(smallest: PackMemory, limit_bytes: int) -> OverBudget:
    parts = sorted(smallest.breakdown.items(), key=lambda part: -part[1])
    line = " · ".join(f"{name} {format_size(size)}" for name, size in parts if size)
    return OverBudget(
        f"needs {format_size(smallest.num_bytes)} of RAM at least, the limit is {format_size(limit_bytes)}\n  {line}",
        smallest_bytes=smallest.num_bytes,
        hint=f"the smallest --ram that works is {smallest_ram_text(smallest.num_bytes)}",
    )
