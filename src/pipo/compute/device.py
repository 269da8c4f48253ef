"""One device and its memory: buffers on it, pinned host memory beside it, which ops it computes.

A tensor lies on a device when its `buffer` names one of the device's buffers and its `data` an address in it. Such an
address means nothing to the host: Vulkan counts from 0x1000 in every buffer.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from ctypes import c_int64
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

from pipo.base.errors import ComputeError, OutOfDeviceMemory, UsageError
from pipo.base.tensor_type import TensorType
from pipo.base.units import PAGE_BYTES, format_size, round_up
from pipo.compute.devices import Device, DeviceKind, describe_device, find_device, first_gpu, list_devices
from pipo.compute.ggml import GgmlTensor, InitParams, Library


def choose_device(lib: Library, name: str) -> ComputeDevice | None:
    """What `--device` names: a device, "cpu" for none, "auto" for the first GPU if there is one. Raises UsageError."""
    if name == "auto":
        gpu = first_gpu(lib)
        return ComputeDevice(lib, gpu.name) if gpu else None
    if name.lower() == "cpu":
        return None
    known = [device.name for device in list_devices(lib) if device.kind is not DeviceKind.CPU]
    if name not in known:
        there = f"there are {', '.join(known)}" if known else "this libggml sees none besides the CPU"
        raise UsageError(f"no device is named {name!r:.80}: {there}", hint="`pipo doctor` lists devices; cpu uses none")
    return ComputeDevice(lib, name)


class ComputeDevice:
    """A device by its name, as `list_devices` tells it. Threads: any."""

    def __init__(self, lib: Library, name: str) -> None:
        self.lib = lib
        self.handle = find_device(lib, name)
        self.buffer_type: int = lib.backend_dev_buffer_type(self.handle)
        self.info = self.describe()
        self.alignment: int = lib.backend_buft_get_alignment(self.buffer_type)
        self._lock = threading.Lock()
        self._held_bytes = 0

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def max_buffer_bytes(self) -> int:
        """What libggml cuts intermediates into; a single buffer may be larger where the driver gives it."""
        return int(self.lib.backend_buft_get_max_size(self.buffer_type))

    def describe(self) -> Device:
        return describe_device(self.lib, self.handle)

    @property
    def held_bytes(self) -> int:
        """What this object has taken of the device: buffers and workspaces, not the driver's own scratch."""
        return self._held_bytes

    @property
    def free_bytes(self) -> int:
        """What the device says is free, and never more than it has beside what is held: some drivers do not count."""
        now = self.describe()
        return max(0, min(now.free_bytes, now.total_bytes - self._held_bytes))

    def tensor_bytes(self, type_: TensorType, shape: tuple[int, ...]) -> int:
        """What a tensor takes on this device: some, CUDA among them, read a padded end of the last row."""
        context = self.lib.init(InitParams(1 << 12, None, True))
        try:
            tensor = self.lib.new_tensor(context, int(type_), len(shape), (c_int64 * len(shape))(*shape))
            return int(self.lib.backend_buft_get_alloc_size(self.buffer_type, tensor))
        finally:
            self.lib.free(context)

    def check(self, graph: int) -> None:
        """Raises ComputeError for the first op that the device does not compute, where ggml would abort."""
        for i in range(self.lib.graph_n_nodes(graph)):
            node = self.lib.graph_node(graph, i)
            if not self.lib.backend_dev_supports_op(self.handle, node):
                raise ComputeError(f"{self.name} does not compute {self._describe_op(node)}")

    def _describe_op(self, node: int) -> str:
        struct = GgmlTensor.from_address(node)
        sources = (GgmlTensor.from_address(source) for source in struct.src if source)
        operands = ", ".join(f"{TensorType(each.type).name} {tuple(each.ne)}" for each in sources)
        return f"{self.lib.op_desc(node).decode()} of {operands} → {TensorType(struct.type).name} {tuple(struct.ne)}"

    def hold(self, num_bytes: int) -> None:
        """Count memory taken (or, below zero, given back) by somebody who asked libggml for it."""
        with self._lock:
            self._held_bytes += num_bytes

    def check_free(self, num_bytes: int, what: str) -> None:
        """Raises OutOfDeviceMemory when the device has less than this free."""
        free = self.free_bytes
        if num_bytes > free:
            self.refuse(num_bytes, free, what)

    def refuse(self, wanted: int, free: int, what: str) -> NoReturn:
        raise OutOfDeviceMemory(
            f"{self.name} cannot give {format_size(wanted)} for {what}: {format_size(free)} are free",
            wanted_bytes=wanted, free_bytes=free,
        )  # fmt: skip

    def allocate(self, num_bytes: int) -> DeviceBuffer:
        """Raises OutOfDeviceMemory."""
        return DeviceBuffer(self, num_bytes)

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        return HostBuffer(self, num_bytes)


class DeviceBuffer:
    """`num_bytes` of a device's memory. Raises OutOfDeviceMemory.

    Threads: any number may copy at once, and while a graph computes, as long as no two touch the same bytes. The
    bytes' order against graphs is the caller's: a blocking copy waits for none that was started with `compute_async`.
    """

    def __init__(self, device: ComputeDevice, num_bytes: int) -> None:
        if num_bytes <= 0:
            raise ComputeError(f"a device buffer of {num_bytes} bytes")
        device.check_free(num_bytes, "a buffer")
        self.device = device
        self.num_bytes = num_bytes
        self.handle: int = device.lib.backend_buft_alloc_buffer(device.buffer_type, num_bytes) or 0
        if not self.handle:
            device.refuse(num_bytes, device.free_bytes, "one buffer")
        device.hold(num_bytes)
        self.base: int = device.lib.backend_buffer_get_base(self.handle)
        self._bytes = _bytes_tensor(self.handle, self.base, num_bytes)

    @property
    def is_freed(self) -> bool:
        return not self.handle

    def upload(self, offset: int, source: int, num_bytes: int) -> None:
        """Copy from a host address to these bytes; returns when they are there.

        Cost: where the device's memory is not the host's, from memory that is not pinned, the driver's library copies
        through a staging buffer as large as the largest upload so far, which no budget knows of: cut large ones.
        """
        self.device.lib.backend_tensor_set(self.tensor(offset, num_bytes), source, offset, num_bytes)

    def download(self, offset: int, target: int, num_bytes: int) -> None:
        """Copy these bytes to a host address; returns when they are there."""
        self.device.lib.backend_tensor_get(self.tensor(offset, num_bytes), target, offset, num_bytes)

    def clear(self) -> None:
        """Fill with zeros; fresh memory holds whatever was there."""
        self.tensor(0, self.num_bytes)
        self.device.lib.backend_buffer_clear(self.handle, 0)

    def tensor(self, offset: int, num_bytes: int) -> int:
        """Address of the tensor that is the whole buffer. Raises ComputeError when the range is not in it."""
        if self.is_freed or offset < 0 or num_bytes < 0 or offset + num_bytes > self.num_bytes:
            state = "freed" if self.is_freed else f"of {self.num_bytes}"
            raise ComputeError(f"bytes {offset} to {offset + num_bytes} of a device buffer {state}")
        return ctypes.addressof(self._bytes)

    def place(self, offset: int) -> DevicePlace:
        return DevicePlace(self, offset)

    def free(self) -> None:
        """Give the memory back. Freeing again does nothing.

        Close the queues that used it first: Mesa's software driver 22.3 looks up every entry of a descriptor set,
        those left from earlier graphs too, and crashes on one whose buffer is gone.
        """
        if self.handle:
            self.device.lib.backend_buffer_free(self.handle)
            self.device.hold(-self.num_bytes)
            self.handle = 0

    def __enter__(self) -> DeviceBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()


@dataclass(frozen=True, slots=True)
class DevicePlace:
    """Where a tensor begins: `offset` bytes into a device buffer, a multiple of the device's alignment."""

    buffer: DeviceBuffer
    offset: int

    @property
    def address(self) -> int:
        return self.buffer.base + self.offset

    def check(self, name: str, num_bytes: int) -> None:
        """Raises ComputeError when a tensor of this many bytes cannot lie here: ggml would abort or write beyond."""
        alignment = self.buffer.device.alignment
        if self.address % alignment:
            raise ComputeError(f"{name} at offset {self.offset} of a device buffer, not a multiple of {alignment}")
        self.buffer.tensor(self.offset, num_bytes)


class HostBuffer:
    """Host memory that the device copies from without staging, or plain memory where it has none to give.

    `address` is a multiple of the page size, as direct reads want. `is_pinned` says which it is.
    """

    def __init__(self, device: ComputeDevice, num_bytes: int) -> None:
        assert num_bytes > 0
        self._lib = device.lib
        self.num_bytes = num_bytes
        self._handle = self._allocate_pinned(device) if device.info.caps.has_host_buffer else 0
        self.is_pinned = bool(self._handle)
        self._map = None if self.is_pinned else mmap.mmap(-1, num_bytes)
        base = self._lib.backend_buffer_get_base(self._handle) if self._map is None else _address_of(self._map)
        self.address: int = round_up(base, PAGE_BYTES)

    def _allocate_pinned(self, device: ComputeDevice) -> int:
        """Vulkan hands out plain memory when it cannot pin: that is given back, and counts as none."""
        pinned_type = self._lib.backend_dev_host_buffer_type(device.handle)
        handle: int = self._lib.backend_buft_alloc_buffer(pinned_type, self.num_bytes + PAGE_BYTES) or 0
        if handle and self._lib.backend_buffer_get_type(handle) != pinned_type:
            self._lib.backend_buffer_free(handle)
            return 0
        return handle

    def free(self) -> None:
        """Freeing again does nothing."""
        if self._handle:
            self._lib.backend_buffer_free(self._handle)
        self._handle, self._map = 0, None

    def __enter__(self) -> HostBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()


def _bytes_tensor(buffer: int, base: int, num_bytes: int) -> GgmlTensor:
    """A row of I8 over a whole buffer: copies are cut from it by offset, and none of them changes it."""
    tensor = GgmlTensor()
    tensor.type, tensor.buffer, tensor.data = int(TensorType.I8), buffer, base
    tensor.ne[:] = (num_bytes, 1, 1, 1)
    tensor.nb[:] = (1, num_bytes, num_bytes, num_bytes)
    return tensor


def _address_of(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))
