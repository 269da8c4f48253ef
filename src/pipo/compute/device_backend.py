"""Queues of work on a device, and the events that order one queue's work after another's."""

from __future__ import annotations

from types import TracebackType

from pipo.base.errors import ComputeError
from pipo.compute.device import ComputeDevice, DeviceBuffer
from pipo.compute.ggml import Library

_STATUS_SUCCESS = 0


class DeviceBackend:
    """One queue of a device: graphs and asynchronous copies run in the order in which they were given to it.

    A graph that was started runs to its end: ggml offers no abort on GPUs, so a stop takes effect between graphs.
    Threads: one at a time for each queue; two queues of a device may be used by two threads at once.
    """

    @classmethod
    def open(cls, lib: Library, name: str) -> DeviceBackend:
        """The first queue of the device of this name. Raises ComputeError."""
        return cls(ComputeDevice(lib, name))

    def __init__(self, device: ComputeDevice) -> None:
        self.device = device
        self._lib = device.lib
        self._backend: int = self._lib.backend_dev_init(device.handle, None) or 0
        if not self._backend:
            raise ComputeError(f"libggml could not start {device.name}")
        self._done = Event(device) if device.info.caps.has_events else None

    def open_copy_queue(self) -> DeviceBackend | None:
        """A second queue for copies beside compute; None where the device has no events to order the two by."""
        caps = self.device.info.caps
        return DeviceBackend(self.device) if caps.is_async and caps.has_events else None

    def compute(self, graph: int) -> None:
        """Run a graph that `ComputeDevice.check` has passed and wait for it. Raises ComputeError."""
        self.compute_async(graph)
        self.synchronize()

    def compute_async(self, graph: int) -> None:
        """Start a graph. It may not be bound elsewhere, nor its memory be written, before `synchronize`."""
        status = self._lib.backend_graph_compute_async(self._open(), graph)
        if status != _STATUS_SUCCESS:
            raise ComputeError(f"{self.device.name} could not compute a graph (status {status})")

    def synchronize(self) -> None:
        """Wait until all that was given to this queue is done.

        By an event, asleep: ggml's own wait for Vulkan spins. On a software device of two cores a step of one product
        and a 64 MiB copy on another thread took 9.9 ms so, and takes 7.3. What is left to ggml's wait is to tidy up.
        """
        backend = self._open()
        if self._done is not None:
            self._lib.backend_event_record(self._done.handle, backend)
            self._done.synchronize()
        self._lib.backend_synchronize(backend)

    def upload_async(self, buffer: DeviceBuffer, offset: int, source: int, num_bytes: int) -> None:
        """Queue a copy from a host address, which must stay as it is until the queue has come past it.

        Only from a pinned HostBuffer does it run behind the caller's back; other memory is copied before it returns.
        """
        self._lib.backend_tensor_set_async(self._open(), self._bytes(buffer, offset, num_bytes),
                                           source, offset, num_bytes)  # fmt: skip

    def download_async(self, buffer: DeviceBuffer, offset: int, target: int, num_bytes: int) -> None:
        """Queue a copy to a host address, to be read when the queue has come past it."""
        self._lib.backend_tensor_get_async(self._open(), self._bytes(buffer, offset, num_bytes),
                                           target, offset, num_bytes)  # fmt: skip

    def record(self, event: Event) -> None:
        """Mark in `event` that all given to this queue so far is done."""
        self._lib.backend_event_record(event.handle, self._open())

    def wait(self, event: Event) -> None:
        """Let what is given to this queue from now on begin after `event`, as it was last recorded. Does not block."""
        self._lib.backend_event_wait(self._open(), event.handle)

    def close(self) -> None:
        """Wait for the queue and give it back. Closing again does nothing."""
        if self._backend:
            self.synchronize()
            if self._done is not None:
                self._done.free()
            self._lib.backend_free(self._backend)
            self._backend = 0

    def reopen(self) -> None:
        """A fresh queue after `close`, which knows of no memory that was given back meanwhile. Raises ComputeError."""
        self.close()
        DeviceBackend.__init__(self, self.device)

    def __enter__(self) -> DeviceBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> int:
        if not self._backend:
            raise ComputeError(f"a queue of {self.device.name} that is closed")
        return self._backend

    def _bytes(self, buffer: DeviceBuffer, offset: int, num_bytes: int) -> int:
        if buffer.device.handle != self.device.handle:
            raise ComputeError(f"a buffer of {buffer.device.name} in a queue of {self.device.name}")
        return buffer.tensor(offset, num_bytes)


class Event:
    """A point in the work of a queue that others can wait for. Raises ComputeError where the device has none.

    Threads: libggml does not lock it. Record, wait and synchronise by turns; synchronise while the queue it was
    recorded in is not in use by another thread.
    """

    def __init__(self, device: ComputeDevice) -> None:
        self._device = device
        self._event: int = 0
        if device.info.caps.has_events:
            self._event = device.lib.backend_event_new(device.handle) or 0
        if not self._event:
            raise ComputeError(f"{device.name} has no events")

    @property
    def handle(self) -> int:
        if not self._event:
            raise ComputeError(f"an event of {self._device.name} that is freed")
        return self._event

    def synchronize(self) -> None:
        """Wait until the work it was last recorded after is done; at once when it never was."""
        self._device.lib.backend_event_synchronize(self.handle)

    def free(self) -> None:
        """No queue may still wait for it. Freeing again does nothing."""
        if self._event:
            self._device.lib.backend_event_free(self._event)
            self._event = 0
