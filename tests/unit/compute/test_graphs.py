"""compute.graphs: graphs that are built once, bound to memory, and placed in one workspace."""

from __future__ import annotations

import numpy as np
import pytest

from pipo.base.tensor_type import TensorType
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.graphs import Builder, Workspace
from tests.support.graphs import Lay, bind, built, floats, linear

F32, Q4_0, Q8_0 = TensorType.F32, TensorType.Q4_0, TensorType.Q8_0


def test_binding_points_leaves_and_their_views(lib: Library, backend: CpuBackend) -> None:
    """A view of a leaf, and a result in place of a leaf, follow it to other memory; bound memory alone is touched."""

    def lay(ops: Builder) -> None:
        rows = ops.leaf("rows", F32, 8, 4)
        heads = ops.heads_view(rows, 4, 2, 3)  # (4, 3, 2): the first 3 rows
        ops.expand(ops.output("sum", ops.add(heads, ops.leaf("one", F32, 4))))
        ops.expand(ops.add_inplace(ops.leaf("total", F32, 4), ops.leaf("step", F32, 4)))

    one, step = np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    with built(lib, lay) as graph:
        assert set(graph.leaf_names) == {"rows", "one", "sum", "total", "step"}
        for _ in range(2):
            rows, total, out = floats(4, 8), floats(4), np.zeros((2, 3, 4), np.float32)
            want = total + step
            bind(graph, {"rows": rows, "one": one, "sum": out, "total": total, "step": step})
            graph.run(backend)
            np.testing.assert_array_equal(out, rows[:3].reshape(3, 2, 4).transpose(1, 0, 2) + 1)
            np.testing.assert_array_equal(total, want)


def test_graph_reports_its_scratch(lib: Library) -> None:
    with built(lib, linear(Q4_0, 256, 64, 32)) as graph:
        assert graph.work_bytes(1) >= 32 * Q8_0.row_bytes(256), "activations rounded to Q8_0"


def chain(size: int, num_nodes: int = 3) -> Lay:
    """Results that need memory of their own, one after another."""

    def lay(ops: Builder) -> None:
        x = ops.leaf("x", F32, size)
        for _ in range(num_nodes):
            x = ops.rms_norm(x, 1e-5)
        ops.expand(ops.output("y", ops.rms_norm(x, 1e-5)))

    return lay


def test_workspace_is_measured_then_reserved(lib: Library) -> None:
    workspace = Workspace(lib)
    builders = [Builder(lib) for _ in range(3)]
    for ops, size in zip(builders, (1 << 16, 1 << 10, 1 << 14), strict=True):
        chain(size)(ops)
    largest, *others = (ops.finish() for ops in builders)
    needed = workspace.measure(largest)
    assert workspace.num_bytes == 0 and needed >= 4 << 16
    workspace.reserve(largest)
    assert workspace.num_bytes == needed
    for graph in (*others, largest):
        workspace.place(graph)
    assert workspace.num_bytes == needed
    with pytest.raises(AssertionError, match="reserve before the first graph"):
        workspace.reserve(largest)
    for graph in (largest, *others):
        graph.free()
    workspace.close()


def test_workspace_refuses_to_grow(lib: Library) -> None:
    workspace = Workspace(lib)
    small, large = Builder(lib), Builder(lib)
    chain(1 << 10)(small)
    chain(1 << 16)(large)
    graphs = [small.build(workspace)]
    with pytest.raises(AssertionError, match="reserve for the largest graph first"):
        graphs.append(large.build(workspace))
    for graph in graphs:
        graph.free()
    workspace.close()


def test_builder_counts_its_nodes(lib: Library) -> None:
    ops = Builder(lib, max_nodes=4)
    with pytest.raises(AssertionError, match="max_nodes"):
        chain(16, num_nodes=4)(ops)
    ops.free()
