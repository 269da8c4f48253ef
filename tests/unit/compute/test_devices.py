"""compute.devices: what there is to compute on, and how a computation is cancelled."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from pipo.base.errors import Cancelled
from pipo.base.tensor_type import TensorType
from pipo.compute.devices import AbortFlag, CpuBackend, DeviceKind, cpu_features, list_devices
from pipo.compute.ggml import Library
from pipo.compute.graphs import Builder, WeightType
from pipo.compute.repack import RepackBuffer
from tests.support.graphs import bind, built, floats, product

F32 = TensorType.F32


def test_devices_and_features(lib: Library) -> None:
    cpu = next(device for device in list_devices(lib) if device.kind is DeviceKind.CPU)
    assert cpu.total_bytes >= cpu.free_bytes > 0 and cpu.name
    assert all(name.isupper() for name in cpu_features(lib))


def test_abort_flag() -> None:
    flag = AbortFlag()
    assert not flag.is_set
    flag.set()
    flag.set()
    assert flag.is_set
    flag.clear()
    assert not flag.is_set


@pytest.mark.parametrize("num_threads", [1, 2])
def test_cancelling_from_another_thread(lib: Library, num_threads: int) -> None:
    """Between two of 100 products of about 10 ms each. Afterwards the backend computes as before."""
    backend = CpuBackend(lib, num_threads)
    weight, x = floats(1024, 1024), floats(256, 1024)
    y = np.empty_like(x)

    def lay(ops: Builder) -> None:
        w, rows = ops.weight("w", WeightType(F32), 1024, 1024), ops.leaf("x", F32, 1024, 256)
        for _ in range(100):
            rows = ops.rms_norm(ops.mul_mat(w, rows), 1e-5)
        ops.expand(ops.output("y", ops.rms_norm(rows, 1e-5)))

    with built(lib, lay, max_nodes=256) as graph:
        bind(graph, {"w": weight, "x": x, "y": y})
        set_at: list[float] = []

        def set_flag() -> None:
            set_at.append(time.perf_counter())
            backend.abort.set()

        timer = threading.Timer(0.03, set_flag)
        timer.start()
        with pytest.raises(Cancelled):
            graph.run(backend)
        assert time.perf_counter() - set_at[0] < 0.3
        with pytest.raises(Cancelled):
            graph.run(backend)
    backend.abort.clear()
    assert product(lib, backend, F32, weight[:8].view(np.uint8), x[:1]).shape == (1, 8)
    backend.close()


def test_closing_twice_is_allowed(lib: Library) -> None:
    backend = CpuBackend(lib, 1)
    backend.close()
    backend.close()
    repack = RepackBuffer.find(lib)
    if repack is not None:
        repack.close()
        repack.close()
