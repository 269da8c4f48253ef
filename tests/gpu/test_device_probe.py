"""What a device does is measured like the CPU: figures of the right kind, and its memory given back."""

from __future__ import annotations

from pathlib import Path

from pipo.base.machine import ComputeProfile
from pipo.base.tensor_type import TensorType
from pipo.compute.device import ComputeDevice
from pipo.compute.ggml import Library
from pipo.hardware.compute_rates import SMALL
from pipo.hardware.probe import Scope, measure_device
from tests.gpu.conftest import first_gpu


def test_a_device_is_measured_and_left_as_it_was(lib: Library) -> None:
    gpu = first_gpu()
    assert gpu is not None
    device = ComputeDevice(lib, gpu.name)
    scope = Scope([Path("unread")], [TensorType.Q8_0], limit_bytes=32 << 20, compute_s=0.05, block=SMALL)
    profile = measure_device(device, scope)
    assert device.held_bytes == 0
    assert isinstance(profile, ComputeProfile) and not profile.is_cpu and profile.name == gpu.name
    assert profile.products.keys() == {"Q8_0"} and profile.attention.keys() == {"F16"}
    assert profile.from_host is not None and profile.to_host is not None
    assert profile.from_host.seconds(1 << 20) > profile.from_host.latency_s > 0
    assert profile.products["Q8_0"].seconds(1 << 20, 1) > 0
