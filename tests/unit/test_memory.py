"""hardware.memory on made-up /proc and /sys trees, and on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipo.base.units import GIB, KIB, MIB
from pipo.hardware.memory import (
    PeakSampler,
    ProcessMemory,
    auto_budget_bytes,
    available_memory,
    process_memory,
    total_memory_bytes,
    tree_anonymous_bytes,
)
from pipo.tiers.ledger import Ledger
from pipo.tiers.ram import Arena

UNLIMITED_V1 = "9223372036854771712"


class Machine:
    """A /proc and a /sys/fs/cgroup to fill."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        self.write(self.proc / "meminfo", f"MemTotal: {16 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {12 * MIB} kB\n")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def in_cgroup(self, line: str) -> None:
        self.write(self.proc / "self" / "cgroup", f"1:cpu:/\n{line}\n")

    def v2(self, path: str, limit: str, used: int, stat: str = "", high: str = "max") -> None:
        folder = self.cgroups / path
        files = {"max": limit, "high": high, "current": str(used), "stat": stat}
        for name, text in files.items():
            self.write(folder / f"memory.{name}", text + "\n")

    def v1(self, path: str, limit: str, used: int, stat: str = "") -> None:
        folder = self.cgroups / "memory" / path
        files = {"limit_in_bytes": limit, "usage_in_bytes": str(used), "stat": stat}
        for name, text in files.items():
            self.write(folder / f"memory.{name}", text + "\n")

    def available(self) -> tuple[int, str]:
        found = available_memory(self.proc, self.cgroups)
        return found.limit_bytes, found.source


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_the_machine_limits(machine: Machine) -> None:
    assert machine.available() == (12 * GIB, "free memory of the machine")
    assert total_memory_bytes(machine.proc, machine.cgroups) == 16 * GIB


def test_v2_page_cache_counts_as_free(machine: Machine) -> None:
    machine.in_cgroup("0::/app")
    machine.v2("app", str(4 * GIB), 3 * GIB, f"anon 5\nactive_file {GIB}\ninactive_file {GIB}\nfile {3 * GIB}")
    assert machine.available() == (3 * GIB, f"control group {machine.cgroups / 'app'}")
    assert total_memory_bytes(machine.proc, machine.cgroups) == 4 * GIB


def test_v2_the_tightest_of_the_nested_groups_limits(machine: Machine) -> None:
    machine.in_cgroup("0::/outer/inner")
    machine.v2("outer/inner", "max", GIB)
    machine.v2("outer", str(2 * GIB), GIB)
    machine.v2("", str(8 * GIB), GIB)
    assert machine.available() == (GIB, f"control group {machine.cgroups / 'outer'}")


def test_v2_high_limits_too(machine: Machine) -> None:
    machine.in_cgroup("0::/app")
    machine.v2("app", str(4 * GIB), GIB, high=str(2 * GIB))
    assert machine.available()[0] == GIB


def test_v1_nested_and_unlimited(machine: Machine) -> None:
    machine.in_cgroup("4:memory:/docker/abc")
    machine.v1("docker/abc", str(3 * GIB), 2 * GIB, f"cache 1\ntotal_inactive_file {GIB}\ntotal_active_file 0")
    machine.v1("docker", UNLIMITED_V1, 9 * GIB)
    assert machine.available() == (2 * GIB, f"control group {machine.cgroups / 'memory/docker/abc'}")


def test_path_of_the_host_inside_a_container(machine: Machine) -> None:
    machine.in_cgroup("4:memory,hugetlb:/docker/not/visible/here")
    machine.v1("", str(2 * GIB), GIB)
    assert machine.available()[0] == GIB


def test_hybrid_mount(machine: Machine) -> None:
    machine.in_cgroup("4:memory:/app\n0::/")
    (machine.cgroups / "unified").mkdir(parents=True)
    machine.v1("app", str(2 * GIB), GIB)
    assert machine.available()[0] == GIB


def test_overdrawn_group_has_nothing_left(machine: Machine) -> None:
    machine.in_cgroup("0::/app")
    machine.v2("app", str(GIB), 2 * GIB)
    assert machine.available()[0] == 0
    assert auto_budget_bytes(machine.proc, machine.cgroups) == 0


@pytest.mark.parametrize(
    ("available_gib", "budget_gib"), [(100, 90), (12, 10.8), (10, 9), (4, 3), (2, 1), (1.5, 0.5), (0.5, 0)]
)
def test_auto_leaves_a_gigabyte_or_a_tenth(machine: Machine, available_gib: float, budget_gib: float) -> None:
    machine.write(machine.proc / "meminfo", f"MemTotal: {200 * MIB} kB\nMemAvailable: {int(available_gib * MIB)} kB\n")
    assert auto_budget_bytes(machine.proc, machine.cgroups) == pytest.approx(budget_gib * GIB, abs=2 * KIB)


def test_swapped_memory_counts_as_taken(machine: Machine) -> None:
    status = "Name:\tpython\nVmHWM:\t900 kB\nVmRSS:\t800 kB\nRssAnon:\t500 kB\nRssFile:\t300 kB\nVmSwap:\t70 kB\n"
    machine.write(machine.proc / "self" / "status", status)
    assert process_memory(machine.proc) == ProcessMemory(570 * KIB, 800 * KIB, 900 * KIB)


def test_without_proc_the_peak_stands_in(tmp_path: Path) -> None:
    found = process_memory(tmp_path)
    assert found.anonymous_bytes == found.peak_resident_bytes > MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_kept_after_the_memory_is_gone() -> None:
    sampler = PeakSampler()
    before = sampler.sample()
    with Arena(32 * MIB, name="slots", ledger=Ledger(32 * MIB)) as arena:
        place = arena.take(32 * MIB)
        place.view[:] = bytes(1) * place.num_bytes
        assert sampler.sample() - before > 30 * MIB
    assert sampler.sample() - before < 8 * MIB
    assert sampler.peak_bytes - before > 30 * MIB


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory().limit_bytes <= total_memory_bytes()


def test_memory_of_a_tree_is_the_sum_of_its_processes(tmp_path: Path) -> None:
    for process, anonymous, children in (("self", 100, "7 8"), ("7", 20, "9"), ("9", 3, ""), ("10", 1000, "")):
        task = tmp_path / process / "task" / "1"
        task.mkdir(parents=True)
        (tmp_path / process / "status").write_text(f"RssAnon: {anonymous} kB\nVmSwap: 1 kB\n")
        (task / "children").write_text(children)
    assert tree_anonymous_bytes(tmp_path) == 126 * 1024  # 8 has ended meanwhile, 10 is somebody else's


def test_memory_of_this_tree_is_no_less_than_of_this_process() -> None:
    assert tree_anonymous_bytes() >= process_memory().anonymous_bytes // 2
