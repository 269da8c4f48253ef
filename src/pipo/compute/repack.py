"""Weights in the layout of ggml's repacked kernels, in memory that is ours.

ggml keeps such weights in buffers of type CPU_REPACK. A tensor that was initialised in one keeps the kernel in its
`extra` field, and its `data` may then point anywhere; the size does not change. Rows are interleaved in groups, so any
whole number of groups can be repacked on its own, straight after it was read.
Source: ggml-cpu/repack.cpp.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from ctypes import c_int64

from pipo.base.errors import LibraryError
from pipo.base.tensor_type import ROWS_PER_GROUP, TensorType
from pipo.compute.ggml import GgmlTensor, InitParams, Library

_BUFFER_TYPE_NAME = b"CPU_REPACK"
# repacking costs more than it saves while weights stream, except where it runs at several GB/s a thread
FAST_TO_REPACK = frozenset({TensorType.Q4_0, TensorType.IQ4_NL})
SAMPLE_BLOCKS = 4  # of a row of a sample


class RepackBuffer:
    """Turns tensors into repacked ones and repacks rows. `find` returns None where libggml has no such kernels.

    Threads: `repack_rows` may run on many threads at once.
    """

    @classmethod
    def find(cls, lib: Library) -> RepackBuffer | None:
        types = lib.backend_dev_get_extra_bufts(lib.cpu_device)
        i = 0
        while types and types[i]:
            if lib.backend_buft_name(types[i]) == _BUFFER_TYPE_NAME:
                return cls(lib, types[i])
            i += 1
        return None

    def __init__(self, lib: Library, buffer_type: int) -> None:
        self._lib = lib
        self._buffer = lib.backend_buft_alloc_buffer(buffer_type, 64)
        if not self._buffer:
            raise LibraryError("libggml could not allocate a repack buffer")
        self._local = threading.local()

    def adopt(self, tensor: int) -> None:
        """Make a graph's weight tensor use the repacked kernel; its data must then be repacked bytes."""
        struct = GgmlTensor.from_address(tensor)
        struct.buffer = self._buffer
        self._lib.backend_buffer_init_tensor(self._buffer, tensor)
        assert struct.extra, "check `supports` before adopting"

    def supports(self, type_: TensorType, shape: tuple[int, ...]) -> bool:
        """True when this CPU has a repacked kernel for a weight of this type and shape (in, out)."""
        if len(shape) != 2 or shape[1] % ROWS_PER_GROUP or shape[0] % type_.block_elems:
            return False
        context = self._lib.init(InitParams(1 << 12, None, True))
        try:
            struct = GgmlTensor.from_address(self._new(context, type_, shape))
            self._lib.backend_buffer_init_tensor(self._buffer, ctypes.addressof(struct))
            return bool(struct.extra)
        finally:
            self._lib.free(context)

    def sample_digest(self, type_: TensorType) -> str:
        """Equal wherever the kernels of a type want the same bytes: of a sample as this CPU's have it, 32 digits.
        Empty where it has none.
        """
        row_elems = SAMPLE_BLOCKS * type_.block_elems
        if not self.supports(type_, (row_elems, ROWS_PER_GROUP)):
            return ""
        num_bytes = ROWS_PER_GROUP * type_.row_bytes(row_elems)
        source = (ctypes.c_uint8 * num_bytes)(*(idx * idx * 7 + idx & 255 for idx in range(num_bytes)))
        target = (ctypes.c_uint8 * num_bytes)()
        self.repack_rows(type_, row_elems, ROWS_PER_GROUP, ctypes.addressof(source), ctypes.addressof(target))
        return hashlib.blake2b(target, digest_size=16).hexdigest()

    def repack_rows(self, type_: TensorType, row_elems: int, num_rows: int, source: int, target: int) -> None:
        """Repack `num_rows` (whole groups) of `row_elems` elements from `source` to `target`, both addresses.

        Cost: 7 GB/s a thread for Q4_0, 2 GB/s for Q4_K on one Zen 5 core.
        """
        assert num_rows % ROWS_PER_GROUP == 0
        struct = self._rows_tensor(type_, row_elems)
        num_bytes = num_rows * type_.row_bytes(row_elems)
        struct.ne[1] = num_rows
        struct.nb[2] = struct.nb[3] = num_bytes
        struct.data = target
        self._lib.backend_tensor_set(ctypes.addressof(struct), source, 0, num_bytes)

    def _rows_tensor(self, type_: TensorType, row_elems: int) -> GgmlTensor:
        """This thread's tensor of one type and row length; its row count is set per call."""
        cache: dict[tuple[TensorType, int], GgmlTensor] = self._local.__dict__.setdefault("tensors", {})
        struct = cache.get((type_, row_elems))
        if struct is None:
            context = self._lib.init(InitParams(1 << 12, None, True))
            built = GgmlTensor.from_address(self._new(context, type_, (row_elems, ROWS_PER_GROUP)))
            self.adopt(ctypes.addressof(built))
            struct = GgmlTensor.from_buffer_copy(built)  # outlives the context
            self._lib.free(context)
            cache[type_, row_elems] = struct
        return struct

    def _new(self, context: int, type_: TensorType, shape: tuple[int, ...]) -> int:
        struct_address = int(self._lib.new_tensor(context, int(type_), len(shape), (c_int64 * len(shape))(*shape)))
        GgmlTensor.from_address(struct_address).buffer = self._buffer
        return struct_address

    def close(self) -> None:
        if self._buffer:
            self._lib.backend_buffer_free(self._buffer)
            self._buffer = 0
