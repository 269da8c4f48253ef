"""hardware.probe and the profiles kept by hardware.cache. Structure and signs; never how fast something was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipo.base.errors import Cancelled, UsageError
from pipo.base.machine import LayoutRates, MachineProfile, ProductRate
from pipo.base.tensor_type import TensorType
from pipo.base.units import GIB, MIB
from pipo.compute import ggml
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.repack import RepackBuffer
from pipo.hardware.cache import known_profile, profile_file, profile_key
from pipo.hardware.compute_rates import ATTENTION_TOKENS, PRODUCT_TOKENS, BlockShape
from pipo.hardware.load import OtherLoad
from pipo.hardware.memory import machine_name, physical_memory_bytes, process_memory
from pipo.hardware.meter import typical_s
from pipo.hardware.probe import PROBE_BYTES, WEIGHTS_BYTES, Scope, probe
from tests.support.machines import MACHINE
from tests.support.transfers import deadline

Q4_0, Q6_K, F16 = TensorType.Q4_0, TensorType.Q6_K, TensorType.F16
TINY_BLOCK = BlockShape(hidden_size=256, intermediate_size=512, num_heads=4, num_positions=256)


@pytest.fixture(scope="module")
def lib() -> Library:
    return ggml.load()


@pytest.fixture
def backend(lib: Library) -> Iterator[CpuBackend]:
    backend = CpuBackend(lib, 1)
    yield backend
    backend.close()


@pytest.fixture
def repack(lib: Library) -> Iterator[RepackBuffer | None]:
    repack = RepackBuffer.find(lib)
    yield repack
    if repack is not None:
        repack.close()


def small_scope(model: Path, *types: TensorType) -> Scope:
    return Scope([model], types or (Q4_0,), limit_bytes=20 * MIB, drive_s=0.05, compute_s=0.05, block=TINY_BLOCK)


def test_a_probe_fills_a_profile(lib: Library, backend: CpuBackend, repack: RepackBuffer | None, model: Path) -> None:
    heard: list[tuple[str, float]] = []
    with deadline(60):
        profile = probe(lib, backend, repack, small_scope(model), lambda *step: heard.append(step))
    assert MachineProfile.from_json(profile.to_json()) == profile, "every figure is positive and finite"
    assert profile.name == machine_name() and profile.source.startswith("measured 20")
    assert lib.version_text in profile.libggml
    assert profile.drive in profile.drive_ways
    assert profile.drive.latency_s > 0
    assert [device.is_cpu for device in profile.devices] == [True]
    cpu = profile.cpu
    assert (cpu.num_threads, cpu.memory_bytes) == (1, physical_memory_bytes())
    assert list(cpu.products) == ["Q4_0"] and list(cpu.attention) == ["F16"]
    assert [n for n, _ in cpu.products["Q4_0"].plain.points] == list(PRODUCT_TOKENS)
    assert [n for n, _ in cpu.attention["F16"].points] == list(ATTENTION_TOKENS)
    assert cpu.products["Q4_0"].plain_start is not None, "small matrices were measured too"
    is_repackable = repack is not None and repack.supports(Q4_0, (256, 256))
    assert (cpu.products["Q4_0"].repacked is not None) is is_repackable
    assert list(profile.repack) == ["Q4_0"] * is_repackable
    fractions = [fraction for _, fraction in heard]
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] <= 1
    assert {"drive", "Q4_0 plain"} <= {step for step, _ in heard}
    assert [use.num_threads for use in profile.shared_uses] == [1]


def test_what_compute_and_the_drive_leave_each_other_is_measured_with_a_thread_less_too(
    lib: Library, model: Path
) -> None:
    double = CpuBackend(lib, 2)
    try:
        with deadline(60):
            shared_uses = probe(lib, double, None, small_scope(model)).shared_uses
    finally:
        double.close()
    assert [use.num_threads for use in shared_uses] == [2, 1]
    assert all(0 < use.read_share <= 1 and use.compute_share > 0 for use in shared_uses)


def test_each_type_has_its_rates(lib: Library, backend: CpuBackend, model: Path) -> None:
    scope = small_scope(model, Q6_K, TensorType.F32, F16)
    with deadline(60):
        profile = probe(lib, backend, None, scope)
    assert list(profile.cpu.products) == ["Q6_K", "F32", "F16"]
    assert profile.repack == {}, "without repacked kernels nothing is repacked"


def test_a_file_too_small_for_a_row_still_measures(
    lib: Library, backend: CpuBackend, repack: RepackBuffer | None, tmp_path: Path
) -> None:
    (tmp_path / "tiny").write_bytes(bytes(100))
    with deadline(60):
        profile = probe(lib, backend, repack, small_scope(tmp_path / "tiny"))
    assert profile.repack == {} and profile.drive.bytes_per_s > 0


def test_memory_stays_below_the_limit(lib: Library, backend: CpuBackend, model: Path) -> None:
    before, peaks = process_memory().anonymous_bytes, [0]
    scope = replace(small_scope(model, F16), limit_bytes=40 * MIB)
    probe(lib, backend, None, scope, lambda step, fraction: peaks.append(process_memory().anonymous_bytes))
    assert max(peaks) - before < scope.limit_bytes + 24 * MIB, "threads and their stacks come on top"


def test_what_a_limit_leaves_out() -> None:
    assert len(Scope([Path()]).combos) == 10
    assert Scope([Path()]).weights_bytes == WEIGHTS_BYTES <= PROBE_BYTES - BlockShape().activation_bytes
    narrow = Scope([Path()], limit_bytes=Scope([Path()]).least_bytes)
    assert len(narrow.combos) < 10
    largest = 4096 * F16.row_bytes(4096)
    assert largest <= narrow.weights_bytes <= largest + MIB, "one matrix of every type has room"
    with pytest.raises(UsageError, match="memory"):
        Scope([Path()], limit_bytes=MIB)


def test_a_probe_can_be_stopped(lib: Library, backend: CpuBackend, model: Path) -> None:
    def stop(step: str, fraction: float) -> None:
        if step.startswith("Q4_0"):
            raise Cancelled("enough")

    with deadline(30), pytest.raises(Cancelled):
        probe(lib, backend, None, small_scope(model), stop)


def test_typical_run() -> None:
    seen: list[int] = []
    assert typical_s(seen.append, 0.0) > 0
    assert seen == [0, 1]


def test_the_load_of_others(tmp_path: Path) -> None:
    assert OtherLoad(tmp_path / "nowhere").share() == 0.0
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 0 1000 0 0 0 0 0 0\ncpu0 1 2 3\n")
    load = OtherLoad(tmp_path)
    assert load.share() == 0.0
    stat.write_text("cpu  200000 0 0 201000 0 0 0 0 0 0\n")
    assert load.share() == pytest.approx(0.5, abs=0.01)


# what is kept


class Probe:
    """Stands in for the real one."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, types: Sequence[TensorType]) -> MachineProfile:
        self.asked.append([type_.name for type_ in types])
        rates = {type_.name: LayoutRates(ProductRate(((1, 1e-11),))) for type_ in types}
        return replace(MACHINE, devices=(replace(MACHINE.cpu, products=rates),))


def test_measured_once(lib: Library, large: Path, tmp_path: Path) -> None:
    file, measure = tmp_path / "deep" / "machine.json", Probe()
    first = known_profile([large], lib, 2, [Q4_0], measure, file=file)
    again = known_profile([large], lib, 2, [Q4_0], measure, file=file)
    assert (first.is_new, again.is_new) == (True, False) and first.profile == again.profile
    assert first.why == "nothing was measured before"
    assert measure.asked == [["Q4_0"]]
    assert list(file.parent.iterdir()) == [file], "nothing is left beside it"


def test_measured_again_when_asked_or_when_a_type_is_missing(lib: Library, large: Path, tmp_path: Path) -> None:
    file, measure = tmp_path / "machine.json", Probe()
    known_profile([large], lib, 2, [Q4_0], measure, file=file)
    more = known_profile([large], lib, 2, [Q6_K], measure, file=file)
    assert "lacks a type" in more.why
    assert not known_profile([large], lib, 2, [Q4_0], measure, file=file).is_new, "what was known still is"
    assert "asked for" in known_profile([large], lib, 2, [Q6_K], measure, file=file, fresh=True).why
    assert measure.asked == [["Q4_0"], ["Q4_0", "Q6_K"], ["Q6_K"]]


def test_another_machine_has_a_profile_of_its_own(
    lib: Library, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, measure = tmp_path / "machine.json", Probe()
    known_profile([large], lib, 2, [Q4_0], measure, file=file)
    for where, name, value in (
        ("pipo.hardware.cache.machine_name", "machine", lambda: "another"),
        ("pipo.hardware.cache.physical_memory_bytes", "memory", lambda: 7 * GIB),
        ("pipo.hardware.cache.drive_key", "drive", lambda path: "another"),
        ("pipo.hardware.cache.cpu_features", "libggml", lambda lib: ["NONE"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, value)
            assert "another machine" in known_profile([large], lib, 2, [Q4_0], measure, file=file).why, name
    assert known_profile([large], lib, 1, [Q4_0], measure, file=file).is_new, "one thread is another machine too"
    assert not known_profile([large], lib, 2, [Q4_0], measure, file=file).is_new
    assert len(json.loads(file.read_text())) == 6


@pytest.mark.parametrize("text", ["{", "[]", '{"KEY": 5}', '{"KEY": {}}', '{"KEY": {"name": NaN}}', "\xff", "BAD RATE"])
def test_a_broken_file_is_measured_again_and_said_once(
    lib: Library, large: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    file, measure, key = tmp_path / "machine.json", Probe(), profile_key(large, lib, 2)
    bad_rate = json.dumps({key: json.loads(re.sub(r'"bytes_per_s": [0-9.e]+', '"bytes_per_s": 0', MACHINE.to_json()))})
    file.write_text(bad_rate if text == "BAD RATE" else text.replace("KEY", key), encoding="latin-1")
    assert known_profile([large], lib, 2, [Q4_0], measure, file=file).is_new
    assert len(measure.asked) == 1
    (line,) = caplog.messages
    assert "action=measure" in line and "\n" not in line
    assert not known_profile([large], lib, 2, [Q4_0], measure, file=file).is_new


def test_what_a_small_file_gives_is_not_kept(lib: Library, model: Path, tmp_path: Path) -> None:
    file, measure = tmp_path / "machine.json", Probe()
    for _ in range(2):
        assert known_profile([model], lib, 2, [Q4_0], measure, file=file).is_new
    assert not file.exists()


def test_where_profiles_are() -> None:
    assert profile_file({"XDG_CACHE_HOME": "/x"}) == Path("/x/pipo/machine.json")
