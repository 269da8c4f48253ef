"""Small graphs over numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from pipo.base.tensor_type import TensorType
from pipo.compute.dequantise import Dequantiser
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.graphs import Builder, Graph, Workspace
from pipo.compute.repack import RepackBuffer

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]
Lay = Callable[[Builder], None]


@contextmanager
def built(lib: Library, lay: Lay, repack: RepackBuffer | None = None, max_nodes: int = 128) -> Iterator[Graph]:
    """A graph with a workspace of its own."""
    ops = Builder(lib, repack, max_nodes)
    lay(ops)
    workspace = Workspace(lib)
    graph = ops.build(workspace)
    try:
        yield graph
    finally:
        graph.free()
        workspace.close()


def bind(graph: Graph, arrays: Mapping[str, Array]) -> None:
    """Point leaves at arrays, which must outlive the run."""
    graph.bind(graph.binding({name: array.ctypes.data for name, array in arrays.items()}))


def run_once(lib: Library, backend: CpuBackend, lay: Lay, repack: RepackBuffer | None = None, **arrays: Array) -> None:
    with built(lib, lay, repack) as graph:
        bind(graph, arrays)
        graph.run(backend)


def quantised(lib: Library, type_: TensorType, values: FloatArray) -> npt.NDArray[np.uint8]:
    """Rows of a matrix as ggml stores them. Shapes: (rows, elements) → (rows, bytes)."""
    rows, num_elems = values.shape
    out = np.empty((rows, type_.row_bytes(num_elems)), np.uint8)
    if type_ is TensorType.F32:
        out[:] = values.view(np.uint8)
    else:
        source = np.ascontiguousarray(values)
        lib.quantize_chunk(int(type_), source.ctypes.data, out.ctypes.data, 0, rows, num_elems, None)
    return out


def repacked(repack: RepackBuffer, type_: TensorType, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The rows in the layout of the repacked kernels."""
    out = np.empty_like(raw)
    num_elems = raw.shape[1] // type_.block_bytes * type_.block_elems
    repack.repack_rows(type_, num_elems, raw.shape[0], raw.ctypes.data, out.ctypes.data)
    return out


def dequantised(lib: Library, type_: TensorType, raw: npt.NDArray[np.uint8]) -> FloatArray:
    """What the stored rows mean."""
    num_elems = raw.shape[1] // type_.block_bytes * type_.block_elems
    out = np.empty((raw.shape[0], num_elems), np.float32)
    Dequantiser(lib, type_).convert(raw.ctypes.data, out.ctypes.data, out.size)
    return out
