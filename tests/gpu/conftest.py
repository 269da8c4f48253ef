"""For tests that compute on a device. Without one they are skipped, and the last line says how many ran on which.

`make test-gpu` sets PIPO_NEEDS_GPU: then none having run is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pipo.base.errors import LibraryError
from pipo.compute import ggml
from pipo.compute.device import ComputeDevice
from pipo.compute.devices import CpuBackend, Device, DeviceKind, list_devices
from pipo.compute.ggml import Library
from tests.support.device_graphs import DeviceRig
from tests.support.software_device import scratch_comes_first

_GPU_KINDS = {DeviceKind.GPU, DeviceKind.INTEGRATED_GPU}
_HAS_RUN: set[str] = set()


def first_gpu() -> Device | None:
    try:
        return next((device for device in list_devices(ggml.load()) if device.kind in _GPU_KINDS), None)
    except LibraryError:
        return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)  # noqa: PTH120
    ours = [item for item in items if str(item.path).startswith(here)]
    missing = first_gpu() is None if ours else False
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if missing:
            item.add_marker(pytest.mark.skip(reason="libggml sees no GPU: `make test-gpu` brings a software one"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped and "tests/gpu/" in report.nodeid:
        _HAS_RUN.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("PIPO_NEEDS_GPU") and not _HAS_RUN:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    device = first_gpu()
    if device is None:
        terminalreporter.write_line("no test ran on a device: libggml sees none besides the CPU")
    else:
        terminalreporter.write_line(f"{len(_HAS_RUN)} tests ran on {device.name} ({device.description})")


@pytest.fixture(scope="session", autouse=True)
def scratch_first() -> Iterator[None]:
    with scratch_comes_first():
        yield


@pytest.fixture(scope="session")
def lib() -> Library:
    return ggml.load()


@pytest.fixture(scope="session")
def device(lib: Library) -> ComputeDevice:
    found = first_gpu()
    assert found is not None
    return ComputeDevice(lib, found.name)


@pytest.fixture
def gpu(lib: Library) -> Iterator[DeviceRig]:
    found = first_gpu()
    assert found is not None
    with DeviceRig(lib, found.name) as rig:
        yield rig


@pytest.fixture
def cpu(lib: Library) -> Iterator[CpuBackend]:
    backend = CpuBackend(lib, num_threads=1)
    yield backend
    backend.close()
