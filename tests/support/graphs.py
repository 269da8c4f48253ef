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
from pipo.compute.graph import Graph, Workspace
from pipo.compute.graphs import Builder, WeightType
from pipo.compute.repack import RepackBuffer

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]
Lay = Callable[[Builder], None]
_RNG = np.random.default_rng(0)


def floats(*shape: int) -> FloatArray:
    return _RNG.standard_normal(shape).astype(np.float32)


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


def linear(type_: TensorType, num_in: int, num_out: int, num_tokens: int, is_repacked: bool = False) -> Lay:
    """y = w x"""

    def lay(ops: Builder) -> None:
        x = ops.leaf("x", TensorType.F32, num_in, num_tokens)
        weight = ops.weight("w", WeightType(type_, is_repacked), num_in, num_out)
        ops.expand(ops.output("y", ops.mul_mat(weight, x)))

    return lay


def product(
    lib: Library,
    backend: CpuBackend,
    type_: TensorType,
    raw: npt.NDArray[np.uint8],
    x: FloatArray,
    repack: RepackBuffer | None = None,
) -> FloatArray:
    """x times the stored weight. Shapes: (rows, bytes), (tokens, elements) → (tokens, rows)."""
    y = np.empty((x.shape[0], raw.shape[0]), np.float32)
    lay = linear(type_, x.shape[1], raw.shape[0], x.shape[0], is_repacked=repack is not None)
    run_once(lib, backend, lay, repack, x=x, w=raw, y=y)
    return y
