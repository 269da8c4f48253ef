"""base.cores on made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo.base.cores import available_cores

MASK = 16


class Groups:
    """A /proc and a /sys/fs/cgroup to fill, for a process that may run on 16 cores."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.root = folder / "proc", folder / "cgroup"

    def write(self, path: str, text: str) -> None:
        file = self.root.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def v1(self, folder: str, quota: int, period: int = 100_000) -> None:
        self.write(f"cgroup/{folder}/cpu.cfs_quota_us", str(quota))
        self.write(f"cgroup/{folder}/cpu.cfs_period_us", str(period))

    @property
    def cores(self) -> int:
        return available_cores(self.proc, self.root)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(MASK)), raising=False)
    return Groups(tmp_path)


def test_without_groups_the_affinity_mask_limits(groups: Groups) -> None:
    assert groups.cores == MASK


@pytest.mark.parametrize(
    ("line", "cores"),
    [("max 100000", MASK), ("200000 100000", 2), ("250000 100000", 3), ("1000 100000", 1), ("9900000 100000", MASK)],
)
def test_v2_share_is_rounded_up(groups: Groups, line: str, cores: int) -> None:
    groups.write("proc/self/cgroup", "0::/app")
    groups.write("cgroup/app/cpu.max", line)
    assert groups.cores == cores


def test_v2_the_tightest_of_the_nested_groups_limits(groups: Groups) -> None:
    groups.write("proc/self/cgroup", "0::/outer/inner")
    groups.write("cgroup/outer/inner/cpu.max", "800000 100000")
    groups.write("cgroup/outer/cpu.max", "300000 100000")
    assert groups.cores == 3


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_v1(groups: Groups, mount: str) -> None:
    groups.write("proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc")
    groups.v1(f"{mount}/docker/abc", 150_000)
    groups.v1(mount, -1)
    assert groups.cores == 2


def test_v1_without_a_limit(groups: Groups) -> None:
    groups.write("proc/self/cgroup", "3:cpu:/")
    groups.v1("cpu", -1)
    assert groups.cores == MASK


@pytest.mark.parametrize("line", ["", "100000", "max", "many 100000", "100000 0"])
def test_what_cannot_be_read_limits_nothing(groups: Groups, line: str) -> None:
    groups.write("proc/self/cgroup", "0::/")
    groups.write("cgroup/cpu.max", line)
    assert groups.cores == MASK
