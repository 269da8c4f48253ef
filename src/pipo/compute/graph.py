"""A built graph, whose leaves are pointed at memory before every run, and the memory of its intermediates."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipo.base.errors import ComputeError
from pipo.compute.device import ComputeDevice, DevicePlace
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import GgmlTensor, Library

Binding = list[tuple[ctypes.c_uint64, int]]
_FROM_DATA_TO_BUFFER = GgmlTensor.buffer.offset - GgmlTensor.data.offset


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor whose memory the caller binds by name."""

    name: str
    address: int


class Graph:
    """A built graph. Bind every leaf, then run it; bind again and run again.

    Threads: one at a time.
    """

    def __init__(self, lib: Library, context: int, graph: int, leaves: Sequence[Leaf]) -> None:
        self._lib = lib
        self._context = context
        self.address = graph
        self.device: ComputeDevice | None = None  # where its workspace is; None for the CPU
        self._bound: Binding | None = None
        self._checked: Binding | None = None
        self._leaves = {leaf.name: leaf.address for leaf in leaves}
        owners = {leaf.address: leaf.name for leaf in leaves}
        self._pointers: dict[str, list[tuple[ctypes.c_uint64, int]]] = {leaf.name: [] for leaf in leaves}
        for struct in _tensors(lib, context):
            name = owners.get(ctypes.addressof(struct)) or owners.get(struct.view_src or 0)
            if name is not None:
                self._pointers[name].append((_data_field(struct), struct.view_offs))

    @property
    def leaf_names(self) -> Iterable[str]:
        return self._pointers.keys()

    def leaf_bytes(self, name: str) -> int:
        """What the leaf takes in plain layout."""
        return int(self._lib.nbytes(self._leaves[name]))

    def pointers(self, name: str) -> Binding:
        """Where a leaf's address is written, and what is added to it each time: for those that bind by themselves."""
        return self._pointers[name]

    def binding(self, addresses: Mapping[str, int]) -> Binding:
        """What `bind` writes to point these leaves, and every view of them, at memory. Keep it and bind it often."""
        return [
            (field, address + offset) for name, address in addresses.items() for field, offset in self._pointers[name]
        ]

    def device_binding(self, places: Mapping[str, DevicePlace]) -> Binding:
        """The same for leaves on a device. Raises ComputeError where one does not lie as the device wants it.

        A view keeps its own `data`, but Vulkan takes its base from the leaf it views: both are written, and `buffer`.
        """
        binding = []
        for name, place in places.items():
            self._check_place(name, place)
            for field, offset in self._pointers[name]:
                binding.append((field, place.address + offset))
                binding.append((_buffer_field(field), place.buffer.handle))
        return binding

    def _check_place(self, name: str, place: DevicePlace) -> None:
        struct = GgmlTensor.from_address(self._leaves[name])
        if self.device is None or place.buffer.device.handle != self.device.handle:
            where = "the CPU" if self.device is None else self.device.name
            raise ComputeError(f"{name} on {place.buffer.device.name}, its graph on {where}")
        if struct.extra:
            raise ComputeError(f"{name} is repacked for the CPU and cannot lie on {self.device.name}")
        place.check(name, self._lib.nbytes(self._leaves[name]))

    def bind(self, binding: Binding) -> None:
        """Point leaves at memory that outlives the next run. Cost: about 60 ns per tensor, nothing where they are so
        already.
        """
        if binding is self._bound:
            return
        self._bound = binding
        for field, address in binding:
            field.value = address

    def work_bytes(self, num_threads: int) -> int:
        """Scratch the CPU backend takes to run this graph."""
        return int(self._lib.graph_plan(self.address, num_threads, None).work_size)

    def run(self, backend: CpuBackend | DeviceBackend) -> None:
        """Compute and wait. Raises Cancelled when the CPU backend's abort flag was set, ComputeError otherwise."""
        if self.device is not None:
            self._check_runs_on(backend)
        backend.compute(self.address)

    def run_async(self, backend: DeviceBackend) -> None:
        """Start on a device's queue. Do not bind it again before that queue was synchronised."""
        self._check_runs_on(backend)
        backend.compute_async(self.address)

    def _check_runs_on(self, backend: CpuBackend | DeviceBackend) -> None:
        """Raises ComputeError where ggml would follow a null pointer."""
        device = backend.device if isinstance(backend, DeviceBackend) else None
        if self.device is None or device is None or device.handle != self.device.handle:
            where = "the CPU" if self.device is None else self.device.name
            raise ComputeError(f"a graph whose workspace is on {where} runs only there")
        if self._checked is not self._bound or self._bound is None:
            unbound = [name for name, leaf in self._leaves.items() if not GgmlTensor.from_address(leaf).buffer]
            if unbound:
                raise ComputeError(f"nothing is bound to {', '.join(unbound)}")
            self._checked = self._bound

    @property
    def is_freed(self) -> bool:
        return not self._context

    def free(self) -> None:
        if self._context:
            self._lib.free(self._context)
            self._context = 0


class Workspace:
    """The memory of intermediate tensors, shared by all graphs because only one runs at a time: the host's memory, or
    that of `device`.

    Growing it would leave the graphs placed before pointing at freed memory: `reserve` for the largest graphs first,
    then `place`, which refuses to grow it.
    """

    def __init__(self, lib: Library, device: ComputeDevice | None = None) -> None:
        self._lib = lib
        self._device = device
        self._buffer_type: int = lib.backend_cpu_buffer_type() if device is None else device.buffer_type
        self._allocator = lib.gallocr_new(self._buffer_type)
        self._num_placed = 0
        self._held_bytes = 0  # as the device counts them

    @property
    def num_bytes(self) -> int:
        return int(self._lib.gallocr_get_buffer_size(self._allocator, 0))

    def measure(self, graph: Graph) -> int:
        """Bytes of intermediates this graph needs; allocates nothing.

        With an allocator of its own: one that has measured a graph takes it for reserved and would place it nowhere.
        """
        size, allocator = ctypes.c_size_t(0), self._lib.gallocr_new(self._buffer_type)
        self._lib.gallocr_reserve_n_size(allocator, graph.address, None, None, ctypes.byref(size))
        self._lib.gallocr_free(allocator)
        return int(size.value)

    def reserve(self, graph: Graph) -> None:
        """Raises OutOfDeviceMemory, ComputeError."""
        assert self._num_placed == 0, "reserve before the first graph is placed"
        self._check_device(graph)
        if not self._lib.gallocr_reserve(self._allocator, graph.address):
            raise ComputeError("ggml could not allocate memory for intermediate results")
        self._count()

    def place(self, graph: Graph) -> None:
        """Raises OutOfDeviceMemory, and ComputeError when the device does not compute one of the graph's ops."""
        before = self.num_bytes
        self._check_device(graph)
        if not self._lib.gallocr_alloc_graph(self._allocator, graph.address):
            raise ComputeError(f"ggml could not place a graph in a workspace of {before} bytes")
        assert self._num_placed == 0 or self.num_bytes == before, "reserve for the largest graph first"
        self._num_placed += 1
        graph.device = self._device
        self._count()

    def _check_device(self, graph: Graph) -> None:
        if self._device is not None:
            self._device.check(graph.address)
            self._device.check_free(max(0, self.measure(graph) - self._held_bytes), "intermediate results")

    def _count(self) -> None:
        if self._device is not None:
            taken = self.num_bytes
            self._device.hold(taken - self._held_bytes)
            self._held_bytes = taken

    def close(self) -> None:
        if self._allocator:
            self._lib.gallocr_free(self._allocator)
            self._allocator = 0
            if self._device is not None:
                self._device.hold(-self._held_bytes)
                self._held_bytes = 0


def _tensors(lib: Library, context: int) -> Iterable[GgmlTensor]:
    address = lib.get_first_tensor(context)
    while address:
        yield GgmlTensor.from_address(address)
        address = lib.get_next_tensor(context, address)


def _data_field(struct: GgmlTensor) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(ctypes.addressof(struct) + GgmlTensor.data.offset)


def _buffer_field(data_field: ctypes.c_uint64) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(ctypes.addressof(data_field) + _FROM_DATA_TO_BUFFER)
