"""Devices libggml offers, and the CPU backend that computes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from pipo.base.errors import Cancelled, ComputeError
from pipo.compute.ggml import DeviceProperties, Library

_STATUS_SUCCESS, _STATUS_ABORTED = 0, 1


class DeviceKind(Enum):
    CPU = 0
    GPU = 1
    INTEGRATED_GPU = 2
    ACCELERATOR = 3
    OTHER = -1


@dataclass(frozen=True, slots=True)
class DeviceCaps:
    """What a device can do beyond computing: copies behind the caller's back, pinned host memory, events."""

    is_async: bool
    has_host_buffer: bool
    has_events: bool


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    description: str
    kind: DeviceKind
    free_bytes: int
    total_bytes: int
    caps: DeviceCaps


def list_devices(lib: Library) -> list[Device]:
    """All devices of all backends, in libggml's order."""
    return [describe_device(lib, handle) for handle in _handles(lib)]


def find_device(lib: Library, name: str) -> int:
    """libggml's handle of the device of this name. Raises ComputeError that lists the names there are."""
    names = {lib.backend_dev_name(handle).decode(): handle for handle in _handles(lib)}
    if name not in names:
        raise ComputeError(f"there is no device {name!r}, only {', '.join(names)}")
    return names[name]


def first_gpu(lib: Library) -> Device | None:
    """The first discrete GPU, else the first that shares the host's memory."""
    devices = list_devices(lib)
    kinds = (DeviceKind.GPU, DeviceKind.INTEGRATED_GPU)
    return next((device for kind in kinds for device in devices if device.kind is kind), None)


def _handles(lib: Library) -> list[int]:
    return [lib.backend_dev_get(i) for i in range(lib.backend_dev_count())]


def describe_device(lib: Library, handle: int) -> Device:
    """What the device says of itself now: `free_bytes` changes."""
    props = DeviceProperties()
    lib.backend_dev_get_props(handle, ctypes.byref(props))
    return Device(
        name=props.name.decode(),
        description=props.description.decode(),
        kind=DeviceKind(props.type) if props.type in {k.value for k in DeviceKind} else DeviceKind.OTHER,
        free_bytes=props.memory_free,
        total_bytes=props.memory_total,
        caps=DeviceCaps(props.is_async, props.has_host_buffer, props.has_events),
    )


def cpu_features(lib: Library) -> list[str]:
    """Instruction sets this build of the CPU backend uses on this machine: AVX2, AVX512, LLAMAFILE, REPACK, …"""
    features, names = lib.backend_get_features(lib.cpu_registry), []
    for feature in features:
        if feature.name is None:
            break
        if feature.value == b"1":
            names.append(feature.name.decode())
    return names


class AbortFlag:
    """A flag that ggml reads between graph nodes without entering Python.

    ggml calls back `bool abort(void *data)`. A Python callback would take the GIL at every node, so the callback is
    libc's `strlen` and the data a two-byte string: empty means go on, one character means stop.
    Threads: `set` may be called from any thread or signal handler.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)
        libc = ctypes.CDLL("msvcrt") if hasattr(ctypes, "WinDLL") else ctypes.CDLL(None)
        self.callback: int = ctypes.cast(libc.strlen, ctypes.c_void_p).value or 0
        self.data: int = ctypes.addressof(self._text)

    def set(self) -> None:
        self._text[0] = b"x"

    def clear(self) -> None:
        self._text[0] = b"\0"

    @property
    def is_set(self) -> bool:
        return self._text[0] != b"\0"


class CpuBackend:
    """ggml's CPU backend with a thread count and an abort flag. Threads: compute on one thread at a time."""

    def __init__(self, lib: Library, num_threads: int) -> None:
        self._lib = lib
        self.num_threads = self._count = num_threads
        self.abort = AbortFlag()
        self._backend = lib.backend_dev_init(lib.cpu_device, None)
        if not self._backend:
            raise ComputeError("libggml could not start its CPU backend")
        lib.backend_set_n_threads(self._backend, num_threads)
        lib.backend_set_abort_callback(self._backend, self.abort.callback, self.abort.data)

    def use_threads(self, count: int) -> None:
        """From now on, `num_threads` at most: what graphs need is counted for that many."""
        assert 0 < count <= self.num_threads
        if count != self._count:
            self._count = count
            self._lib.backend_set_n_threads(self._backend, count)

    @contextmanager
    def fewer_threads(self, count: int) -> Iterator[None]:
        """Inside the block."""
        before = self._count
        self.use_threads(count)
        try:
            yield
        finally:
            self.use_threads(before)

    def compute(self, graph: int) -> None:
        status = self._lib.backend_graph_compute(self._backend, graph)
        if status == _STATUS_SUCCESS:
            return
        if status == _STATUS_ABORTED:
            raise Cancelled("stopped while computing")
        raise ComputeError(f"ggml could not compute a graph (status {status})")

    def close(self) -> None:
        if self._backend:
            self._lib.backend_free(self._backend)
            self._backend = 0
