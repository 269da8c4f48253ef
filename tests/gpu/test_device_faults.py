"""What goes wrong between disk, RAM and a device ends in a typed error, and both ledgers come back to zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench.random_model import write_random_model
from pipo.base.config import EngineConfig
from pipo.base.errors import Cancelled, ComputeError, OutOfDeviceMemory, OverBudget, ReadFailed
from pipo.compute.device import ComputeDevice, DeviceBuffer
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.ggml import Library
from pipo.pipeline import assembly
from pipo.planner.device_placement import DevicePlacement, place_on_device
from pipo.planner.placement import place, smallest_bytes
from pipo.transfer.disk import DiskTransfer
from pipo.transfer.null import Fault, faulty_preadv
from tests.gpu.conftest import first_gpu
from tests.support.rigs import Rig, transcript

PROMPT, CHUNK = list(range(5, 45)), 16


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    path = tmp_path_factory.mktemp("device") / "smoke.gguf"
    write_random_model(path, "smoke", "q8_0")
    with Rig(path, EngineConfig(threads=1, layout="plain", prefill_chunk=CHUNK)) as rig:
        yield rig


@pytest.fixture
def device(lib: Library) -> Iterator[ComputeDevice]:
    gpu = first_gpu()
    assert gpu is not None
    device = ComputeDevice(lib, gpu.name)
    yield device
    assert device.held_bytes == 0, "everything was given back"


def streaming(rig: Rig, device: ComputeDevice) -> DevicePlacement:
    """Half of the blocks pass through, and so do keys and values."""
    demand = rig.device_demand(device, 1 << 30, CHUNK)
    return next(p for p in place_on_device(demand) if p.moves_kv and sum(p.resident) * 2 < len(p.resident) + 2)


def answer(rig: Rig, device: ComputeDevice, placement: DevicePlacement) -> None:
    there = rig.on_device(device, placement)
    demand = there.demand(1 << 50)
    with there.running(place(replace(demand, limit_bytes=smallest_bytes(demand)))) as forward:
        transcript(forward, PROMPT, CHUNK, 3)


@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("nth", [*range(1, 12), 25, 40])
def test_nth_read_fails(
    rig: Rig, device: ComputeDevice, monkeypatch: pytest.MonkeyPatch, nth: int, for_ever: bool
) -> None:
    """Also the copy that waits for the read ends with the read's error."""
    preadv = faulty_preadv(Fault.FAIL, nth, for_ever=for_ever)
    monkeypatch.setattr(assembly, "DiskTransfer", lambda *a, **k: DiskTransfer(*a, **k, preadv=preadv))
    with pytest.raises(ReadFailed, match=r"smoke\.gguf"):
        answer(rig, device, streaming(rig, device))


@pytest.mark.parametrize("way", ["upload", "download"])
@pytest.mark.parametrize("nth", [1, 2, 5, 9, 14, 30])
def test_nth_copy_fails(rig: Rig, device: ComputeDevice, monkeypatch: pytest.MonkeyPatch, way: str, nth: int) -> None:
    real, calls = getattr(DeviceBuffer, way), 0

    def failing(self: DeviceBuffer, offset: int, address: int, num_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise ComputeError("the device is gone")
        real(self, offset, address, num_bytes)

    monkeypatch.setattr(DeviceBuffer, way, failing)
    with pytest.raises(ComputeError, match="the device is gone"):
        answer(rig, device, streaming(rig, device))


@pytest.mark.parametrize("nth", [1, 2, 7, 12])
def test_nth_stage_fails(rig: Rig, device: ComputeDevice, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """The engine goes down with transfers under way."""
    real, calls = DeviceBackend.compute, 0

    def failing(self: DeviceBackend, graph: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise ComputeError("status -1")
        real(self, graph)

    monkeypatch.setattr(DeviceBackend, "compute", failing)
    with pytest.raises(ComputeError, match="status -1"):
        answer(rig, device, streaming(rig, device))


def test_cancelled_while_it_waits_for_a_copy(rig: Rig, device: ComputeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(rig.blueprint), "is_aborted", lambda self: True)
    with pytest.raises(Cancelled):
        answer(rig, device, streaming(rig, device))


@pytest.mark.parametrize("nth", range(1, 7))
def test_device_runs_out_of_memory(rig: Rig, device: ComputeDevice, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Whichever buffer it refuses: what was taken before is given back."""
    placement, real, calls = streaming(rig, device), ComputeDevice.allocate, 0

    def failing(self: ComputeDevice, num_bytes: int) -> DeviceBuffer:
        nonlocal calls
        calls += 1
        if calls == nth:
            self.refuse(num_bytes, 0, "a buffer")
        return real(self, num_bytes)

    monkeypatch.setattr(ComputeDevice, "allocate", failing)
    with pytest.raises(OutOfDeviceMemory):
        answer(rig, device, placement)


def test_plan_is_what_is_taken(rig: Rig, device: ComputeDevice) -> None:
    """The device counts no more than the placement says; a byte less is refused by the ledger."""
    placement = streaming(rig, device)
    there = rig.on_device(device, placement)
    with there.running(there.all_resident()) as forward:
        transcript(forward, PROMPT, CHUNK, 2)
        assert placement.num_bytes * 0.95 <= device.held_bytes <= placement.num_bytes
    share = there.blueprint.device
    assert share is not None
    tight = replace(share, limit_bytes=placement.num_bytes * 94 // 100)
    there.blueprint = replace(there.blueprint, device=tight)
    with pytest.raises(OverBudget, match="--vram"), there.running(there.all_resident()):
        pass
