"""compute: the façade over libggml, graphs that are built once, repacked weights, cancelling."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipo.base.errors import Cancelled, ComputeError, LibraryError
from pipo.base.manifest import Rope
from pipo.base.tensor_type import TensorType
from pipo.compute import ggml
from pipo.compute.dequantise import Dequantiser
from pipo.compute.devices import AbortFlag, CpuBackend, DeviceKind, cpu_features, list_devices
from pipo.compute.ggml import ENV_FOLDER, Library, Provider, find_providers
from pipo.compute.graphs import Builder, Tensor, WeightType, Workspace
from pipo.compute.repack import RepackBuffer
from tests.support.graphs import FloatArray, Lay, bind, built, dequantised, quantised, repacked, run_once

F32, F16, I32, I64, Q4_0, Q8_0 = (getattr(TensorType, n) for n in ("F32", "F16", "I32", "I64", "Q4_0", "Q8_0"))
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def lib() -> Library:
    return ggml.load()


@pytest.fixture
def backend(lib: Library) -> Iterator[CpuBackend]:
    backend = CpuBackend(lib, num_threads=1)
    yield backend
    backend.close()


@pytest.fixture
def ops(lib: Library) -> Iterator[Builder]:
    ops = Builder(lib)
    yield ops
    ops.free()


@pytest.fixture(scope="module")
def repack(lib: Library) -> Iterator[RepackBuffer]:
    repack = RepackBuffer.find(lib)
    if repack is None or not repack.supports(Q4_0, (64, 64)):
        pytest.skip("no repacked kernels on this CPU")
    yield repack
    repack.close()


def floats(*shape: int) -> FloatArray:
    return RNG.standard_normal(shape).astype(np.float32)


# providers


def test_folder_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path / "gone"))
    with pytest.raises(LibraryError, match="gone is not a folder") as refused:
        find_providers()
    assert refused.value.hint is not None


def test_folder_without_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path))
    (provider,) = find_providers()
    assert provider == Provider(ENV_FOLDER, tmp_path)
    with pytest.raises(LibraryError, match=f"cannot load {tmp_path}.*from {ENV_FOLDER}"):
        Library(provider)


def test_file_that_is_no_library(lib: Library, tmp_path: Path) -> None:
    for path in lib.provider.folder.glob("*ggml*"):
        (tmp_path / path.name).write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="cannot load"):
        Library(Provider("broken", tmp_path))


def test_folder_comes_before_packages(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_providers()
    assert found and all((provider.folder).is_dir() for provider in found)
    monkeypatch.setenv(ENV_FOLDER, str(lib.provider.folder))
    (named,) = find_providers()
    assert Library(named).version_text == lib.version_text


def test_no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_providers", list)
    with pytest.raises(LibraryError, match="no libggml found"):
        ggml.load.__wrapped__()


@pytest.mark.parametrize("version", [b"0.14.9", b"0.9.4-dirty", b"0", b"unknown"])
def test_version_that_is_too_old(lib: Library, monkeypatch: pytest.MonkeyPatch, version: bytes) -> None:
    function = Library._function

    def of_another_version(self: Library, name: str, *rest: object) -> object:
        return (lambda: version) if name == "ggml_version" else function(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Library, "_function", of_another_version)
    with pytest.raises(LibraryError, match=r"too old: 0\.15 or newer"):
        Library(lib.provider)


def test_function_that_is_missing(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ggml._SIGNATURES, "ggml_of_tomorrow", (None,))
    with pytest.raises(LibraryError, match=r"lacks ggml_of_tomorrow"):
        Library(lib.provider)


def test_function_that_has_no_signature(lib: Library) -> None:
    with pytest.raises(AttributeError, match="ggml_of_tomorrow has no signature"):
        lib.of_tomorrow()


def test_type_sizes_that_differ(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorType, "block_bytes", property(lambda self: 18))
    with pytest.raises(LibraryError, match="sizes F32 as"):
        Library(lib.provider)


def test_layout_that_differs(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml.GgmlTensor, "view_offs", ggml.GgmlTensor.data)
    with pytest.raises(LibraryError, match="lays ggml_tensor out"):
        Library(lib.provider)


def test_type_sizes_are_those_of_the_library(lib: Library) -> None:
    known = [type_ for type_ in TensorType if lib.computes(type_)]
    assert len(known) >= 34
    for type_ in known:
        assert (lib.blck_size(type_), lib.type_size(type_)) == (type_.block_elems, type_.block_bytes)


def test_types_that_have_a_product(lib: Library) -> None:
    without = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
    assert {t.name for t in TensorType if lib.computes(t) and not lib.multiplies(t)} == without


def test_devices_and_features(lib: Library) -> None:
    cpu = next(device for device in list_devices(lib) if device.kind is DeviceKind.CPU)
    assert cpu.total_bytes >= cpu.free_bytes > 0 and cpu.name
    assert all(name.isupper() for name in cpu_features(lib))


# what ggml would answer with abort()


def leaf(ops: Builder, *shape: int, type: TensorType = F32) -> Tensor:
    return ops.leaf(f"leaf {ops._num_tensors}", type, *shape)


def turned(ops: Builder, *shape: int) -> Tensor:
    """Of this shape, but the first dimension is not the one that lies side by side."""
    return ops.permute(leaf(ops, shape[1], shape[0], shape[2]), 1, 0, 2)


ROPE = Rope(num_dims=16, base=10000.0)


def attention(ops: Builder, **changes: tuple[int, ...] | Tensor) -> Tensor:
    """4 heads of 32 over 2 of KV, 3 tokens, 256 rows; one argument replaced."""
    shapes: dict[str, tuple[int, ...] | Tensor] = {"q": (32, 3, 4), "k": (32, 256, 2), "v": (32, 256, 2)}
    given = shapes | {"mask": leaf(ops, 256, 3, type=F16)} | changes
    q, k, v, mask = (each if isinstance(each, Tensor) else leaf(ops, *each) for each in given.values())
    return ops.flash_attention(q, k, v, mask, 0.1)


Call = Callable[[Builder], Tensor]

REFUSED: dict[str, Call] = {
    "leaf without a dimension": lambda ops: ops.leaf("x", F32),
    "leaf of five dimensions": lambda ops: ops.leaf("x", F32, 1, 1, 1, 1, 1),
    "leaf of nothing": lambda ops: ops.leaf("x", F32, 4, 0),
    "leaf of half a block": lambda ops: ops.leaf("x", Q4_0, 48, 2),
    "two leaves of one name": lambda ops: list(map(ops.leaf, "xx", (F32, F32), (1, 1)))[-1],
    "repacked weight without kernels": lambda ops: ops.weight("w", WeightType(Q4_0, True), 64, 64),
    "output that is a view": lambda ops: ops.output("y", ops.add_inplace(leaf(ops, 4), leaf(ops, 4))),
    "add of other widths": lambda ops: ops.add(leaf(ops, 4, 2), leaf(ops, 3)),
    "add of more dimensions": lambda ops: ops.add(leaf(ops, 4), leaf(ops, 4, 2)),
    "add of integers": lambda ops: ops.add(leaf(ops, 4, type=I32), leaf(ops, 4, type=I32)),
    "add of turned": lambda ops: ops.add(turned(ops, 4, 5, 6), leaf(ops, 4)),
    "add_inplace of other widths": lambda ops: ops.add_inplace(leaf(ops, 4), leaf(ops, 8)),
    "add_inplace of F16": lambda ops: ops.add_inplace(leaf(ops, 4, type=F16), leaf(ops, 4)),
    "mul of other lengths": lambda ops: ops.mul(leaf(ops, 4, 3), leaf(ops, 4, 2)),
    "mul by F16": lambda ops: ops.mul(leaf(ops, 4), leaf(ops, 4, type=F16)),
    "rms_norm of F16": lambda ops: ops.rms_norm(leaf(ops, 4, type=F16), 1e-5),
    "rms_norm of turned": lambda ops: ops.rms_norm(turned(ops, 4, 5, 6), 1e-5),
    "rms_norm with a negative epsilon": lambda ops: ops.rms_norm(leaf(ops, 4), -1.0),
    "rms_norm with NaN": lambda ops: ops.rms_norm(leaf(ops, 4), math.nan),
    "mul_mat of other widths": lambda ops: ops.mul_mat(leaf(ops, 64, 8), leaf(ops, 32, 2)),
    "mul_mat by a weight of three dimensions": lambda ops: ops.mul_mat(leaf(ops, 64, 8, 2), leaf(ops, 64, 2)),
    "mul_mat of F16 activations": lambda ops: ops.mul_mat(leaf(ops, 64, 8), leaf(ops, 64, 2, type=F16)),
    "mul_mat of turned activations": lambda ops: ops.mul_mat(leaf(ops, 4, 8), turned(ops, 4, 5, 6)),
    "mul_mat by integers": lambda ops: ops.mul_mat(leaf(ops, 64, 8, type=I32), leaf(ops, 64, 2)),
    "mul_mat by Q8_1": lambda ops: ops.mul_mat(leaf(ops, 64, 8, type=TensorType.Q8_1), leaf(ops, 64, 2)),
    "swiglu of other shapes": lambda ops: ops.swiglu(leaf(ops, 8, 2), leaf(ops, 8, 3)),
    "swiglu of other types": lambda ops: ops.swiglu(leaf(ops, 8), leaf(ops, 8, type=F16)),
    "swiglu of integers": lambda ops: ops.swiglu(leaf(ops, 8, type=I32), leaf(ops, 8, type=I32)),
    "swiglu with gaps": lambda ops: ops.swiglu(*[ops.permute(leaf(ops, 4, 5, 6), 0, 2, 1) for _ in range(2)]),
    "reshape to another size": lambda ops: ops.reshape(leaf(ops, 8), 3, 3),
    "reshape to one dimension": lambda ops: ops.reshape(leaf(ops, 4, 2), 8),
    "reshape of permuted": lambda ops: ops.reshape(ops.permute(leaf(ops, 4, 5, 6), 0, 2, 1), 24, 5),
    "permute of two dimensions": lambda ops: ops.permute(leaf(ops, 4, 5), 1, 0),
    "permute twice to one place": lambda ops: ops.permute(leaf(ops, 4, 5, 6), 0, 0, 1),
    "get_rows by floats": lambda ops: ops.get_rows(leaf(ops, 8, 4), leaf(ops, 2)),
    "get_rows of F16": lambda ops: ops.get_rows(leaf(ops, 8, 4, type=F16), leaf(ops, 2, type=I32)),
    "get_rows of three dimensions": lambda ops: ops.get_rows(leaf(ops, 8, 4, 2), leaf(ops, 2, type=I32)),
    "get_rows by a matrix": lambda ops: ops.get_rows(leaf(ops, 8, 4), leaf(ops, 2, 2, type=I32)),
    "set_rows of other widths": lambda ops: ops.set_rows(leaf(ops, 8, 4), leaf(ops, 4, 2), leaf(ops, 2, type=I64)),
    "set_rows at too few": lambda ops: ops.set_rows(leaf(ops, 8, 4), leaf(ops, 8, 3), leaf(ops, 2, type=I64)),
    "set_rows at I32": lambda ops: ops.set_rows(leaf(ops, 8, 4), leaf(ops, 8, 2), leaf(ops, 2, type=I32)),
    "set_rows of F16": lambda ops: ops.set_rows(leaf(ops, 8, 4), leaf(ops, 8, 2, type=F16), leaf(ops, 2, type=I64)),
    "set_rows into integers": lambda ops: ops.set_rows(
        leaf(ops, 8, 4, type=I32), leaf(ops, 8, 2), leaf(ops, 2, type=I64)
    ),
    "set_rows into three dimensions": lambda ops: ops.set_rows(
        leaf(ops, 8, 4, 2), leaf(ops, 8, 2), leaf(ops, 2, type=I64)
    ),
    "heads of other widths": lambda ops: ops.heads_view(leaf(ops, 64, 256), 16, 3, 256),
    "heads beyond the rows": lambda ops: ops.heads_view(leaf(ops, 64, 256), 16, 4, 257),
    "heads of half a block": lambda ops: ops.heads_view(leaf(ops, 64, 256, type=Q8_0), 16, 4, 256),
    "heads of one dimension": lambda ops: ops.heads_view(leaf(ops, 64), 16, 4, 1),
    "rope at other positions": lambda ops: ops.rope(leaf(ops, 16, 4, 3), leaf(ops, 2, type=I32), ROPE, None),
    "rope at floats": lambda ops: ops.rope(leaf(ops, 16, 4, 3), leaf(ops, 3), ROPE, None),
    "rope of too many dimensions": lambda ops: ops.rope(leaf(ops, 8, 4, 3), leaf(ops, 3, type=I32), ROPE, None),
    "rope of odd dimensions": lambda ops: ops.rope(
        leaf(ops, 16, 4, 3), leaf(ops, 3, type=I32), replace(ROPE, num_dims=15), None
    ),
    "rope of no dimensions": lambda ops: ops.rope(
        leaf(ops, 16, 4, 3), leaf(ops, 3, type=I32), replace(ROPE, num_dims=0), None
    ),
    "rope of a matrix": lambda ops: ops.rope(leaf(ops, 16, 4), leaf(ops, 4, type=I32), ROPE, None),
    "rope of four dimensions": lambda ops: ops.rope(leaf(ops, 16, 4, 3, 2), leaf(ops, 3, 2, type=I32), ROPE, None),
    "rope of integers": lambda ops: ops.rope(leaf(ops, 16, 4, 3, type=I32), leaf(ops, 3, type=I32), ROPE, None),
    "rope by too few factors": lambda ops: ops.rope(leaf(ops, 16, 4, 3), leaf(ops, 3, type=I32), ROPE, leaf(ops, 7)),
    "rope by F16 factors": lambda ops: ops.rope(
        leaf(ops, 16, 4, 3), leaf(ops, 3, type=I32), ROPE, leaf(ops, 8, type=F16)
    ),
    "attention of other widths": lambda ops: attention(ops, q=(16, 3, 4)),
    "attention of unlike keys and values": lambda ops: attention(ops, v=(32, 512, 2)),
    "attention of heads in no groups": lambda ops: attention(ops, q=(32, 3, 5)),
    "attention of a matrix": lambda ops: attention(ops, q=(32, 3)),
    "attention of another mask": lambda ops: attention(ops, mask=leaf(ops, 256, 4, type=F16)),
    "attention of an F32 mask": lambda ops: attention(ops, mask=(256, 3)),
    "attention of F16 queries": lambda ops: attention(ops, q=leaf(ops, 32, 3, 4, type=F16)),
    "attention of integer keys": lambda ops: attention(ops, k=leaf(ops, 32, 256, 2, type=I32)),
    "attention of turned queries": lambda ops: attention(ops, q=turned(ops, 32, 3, 4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_ops_are_refused(ops: Builder, name: str) -> None:
    with pytest.raises(ComputeError, match="cannot build the graph"):
        REFUSED[name](ops)


def test_those_ops_are_accepted_when_they_are_right(ops: Builder) -> None:
    """Every builder of REFUSED with arguments that fit: it is the fault that is refused, not the op."""
    rows, positions = leaf(ops, 2, type=I64), leaf(ops, 3, type=I32)
    results = [
        ops.add(leaf(ops, 4, 2), leaf(ops, 4)),
        ops.mul(leaf(ops, 4, 3), leaf(ops, 4)),
        ops.rms_norm(leaf(ops, 4), 1e-5),
        ops.mul_mat(leaf(ops, 64, 8, type=Q4_0), leaf(ops, 64, 2)),
        ops.swiglu(leaf(ops, 8, 2), leaf(ops, 8, 2)),
        ops.reshape(leaf(ops, 4, 2), 2, 2, 2),
        ops.get_rows(leaf(ops, 8, 4), leaf(ops, 2, type=I32)),
        ops.heads_view(ops.set_rows(leaf(ops, 64, 256, type=Q8_0), leaf(ops, 64, 2), rows), 32, 2, 256),
        ops.rope(leaf(ops, 16, 4, 3), positions, ROPE, leaf(ops, 8)),
        ops.permute(leaf(ops, 4, 5, 6), 0, 2, 1),
        attention(ops),
    ]
    for tensor in results:
        assert tuple(tensor.struct.ne)[: len(tensor.shape)] == tensor.shape, "shape as ggml sees it"
        assert tensor.struct.type == tensor.type


# graphs


def linear(type_: TensorType, num_in: int, num_out: int, num_tokens: int, is_repacked: bool = False) -> Lay:
    """y = w x"""

    def lay(ops: Builder) -> None:
        x = ops.leaf("x", F32, num_in, num_tokens)
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
    """(tokens, rows of the weight)"""
    y = np.empty((x.shape[0], raw.shape[0]), np.float32)
    lay = linear(type_, x.shape[1], raw.shape[0], x.shape[0], is_repacked=repack is not None)
    run_once(lib, backend, lay, repack, x=x, w=raw, y=y)
    return y


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


# weights


WEIGHT_TYPES = [F32, F16, TensorType.BF16, Q8_0, Q4_0, TensorType.Q4_1, TensorType.Q4_K, TensorType.Q6_K]
REPACKABLE = [Q4_0, TensorType.IQ4_NL, TensorType.Q4_K]


@pytest.mark.parametrize("type_", WEIGHT_TYPES, ids=lambda type_: type_.name)
def test_dequantised_rows_are_what_products_multiply(lib: Library, backend: CpuBackend, type_: TensorType) -> None:
    """A one among zeros picks a column: a block of activations is off by no more than its scale, an f16, is."""
    raw = quantised(lib, type_, floats(16, 256))
    picked, values = product(lib, backend, type_, raw, np.eye(256, dtype=np.float32)), dequantised(lib, type_, raw)
    assert np.abs(picked.T - values).max() < 2 * 2**-11 * np.abs(values).max()


def test_types_without_conversion(lib: Library) -> None:
    with pytest.raises(ComputeError, match="cannot convert I32"):
        Dequantiser(lib, I32)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 64])
@pytest.mark.parametrize("type_", WEIGHT_TYPES, ids=lambda type_: type_.name)
def test_cut_by_rows_is_the_whole_bit_for_bit(
    lib: Library, backend: CpuBackend, type_: TensorType, num_tokens: int
) -> None:
    """As the head is cut when it streams: groups of 8 rows, the last piece shorter."""
    raw, x = quantised(lib, type_, floats(104, 256)), floats(num_tokens, 256)
    whole = product(lib, backend, type_, raw, x)
    for rows in (8, 24, 40):
        pieces = [product(lib, backend, type_, np.ascontiguousarray(raw[i : i + rows]), x) for i in range(0, 104, rows)]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1).view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 16, 33])
@pytest.mark.parametrize("type_", REPACKABLE, ids=lambda type_: type_.name)
def test_repacked_product_is_the_plain_one(
    lib: Library, backend: CpuBackend, repack: RepackBuffer, type_: TensorType, num_tokens: int
) -> None:
    """Both round activations alike; sums of 512 terms in another order differ by a few float32 steps of the largest."""
    if not repack.supports(type_, (512, 64)):
        pytest.skip(f"no repacked kernel for {type_.name} on this CPU")
    raw, x = quantised(lib, type_, floats(64, 512)), floats(num_tokens, 512)
    plain = product(lib, backend, type_, raw, x)
    got = product(lib, backend, type_, repacked(repack, type_, raw), x, repack)
    assert np.abs(got - plain).max() < 2**-23 * math.sqrt(512) * 4 * np.abs(plain).max()


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 16, 33])
def test_repacked_cut_by_rows_is_the_whole_bit_for_bit(
    lib: Library, backend: CpuBackend, repack: RepackBuffer, num_tokens: int
) -> None:
    raw, x = quantised(lib, Q4_0, floats(96, 512)), floats(num_tokens, 512)
    whole = product(lib, backend, Q4_0, repacked(repack, Q4_0, raw), x, repack)
    for rows in (8, 40):
        parts = [np.ascontiguousarray(raw[i : i + rows]) for i in range(0, 96, rows)]
        pieces = [product(lib, backend, Q4_0, repacked(repack, Q4_0, part), x, repack) for part in parts]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1).view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("type_", REPACKABLE, ids=lambda type_: type_.name)
def test_repacking_slice_by_slice_is_repacking_at_once(lib: Library, repack: RepackBuffer, type_: TensorType) -> None:
    """On several threads too: each worker of the transfer repacks the slice it has read."""
    if not repack.supports(type_, (256, 64)):
        pytest.skip(f"no repacked kernel for {type_.name} on this CPU")
    raw = quantised(lib, type_, floats(64, 256))
    whole, slices = repacked(repack, type_, raw), np.empty_like(raw)

    def repack_slice(start: int) -> None:
        slices[start : start + 8] = repacked(repack, type_, np.ascontiguousarray(raw[start : start + 8]))

    threads = [threading.Thread(target=repack_slice, args=(start,)) for start in range(0, 64, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(slices, whole)
    assert (whole != raw).any()


def test_what_cannot_be_repacked(repack: RepackBuffer) -> None:
    assert repack.supports(Q4_0, (256, 64))
    assert not repack.supports(Q4_0, (256, 60)), "not whole groups"
    assert not repack.supports(Q4_0, (256,)) and not repack.supports(Q4_0, (256, 64, 2))
    assert not repack.supports(Q4_0, (250, 64)), "not whole blocks"
    assert not repack.supports(F32, (256, 64)) and not repack.supports(F16, (256, 64))


# cancelling


def test_abort_flag() -> None:
    flag = AbortFlag()
    assert not flag.is_set
    flag.set()
    flag.set()
    assert flag.is_set
    flag.clear()
    assert not flag.is_set


@pytest.mark.parametrize("num_threads", [1, 2])
def test_cancelling_from_another_thread(lib: Library, num_threads: int) -> None:
    """Between two of 100 products of about 10 ms each. Afterwards the backend computes as before."""
    backend = CpuBackend(lib, num_threads)
    weight, x = floats(1024, 1024), floats(256, 1024)
    y = np.empty_like(x)

    def lay(ops: Builder) -> None:
        w, rows = ops.weight("w", WeightType(F32), 1024, 1024), ops.leaf("x", F32, 1024, 256)
        for _ in range(100):
            rows = ops.rms_norm(ops.mul_mat(w, rows), 1e-5)
        ops.expand(ops.output("y", ops.rms_norm(rows, 1e-5)))

    with built(lib, lay, max_nodes=256) as graph:
        bind(graph, {"w": weight, "x": x, "y": y})
        set_at: list[float] = []

        def set_flag() -> None:
            set_at.append(time.perf_counter())
            backend.abort.set()

        timer = threading.Timer(0.03, set_flag)
        timer.start()
        with pytest.raises(Cancelled):
            graph.run(backend)
        assert time.perf_counter() - set_at[0] < 0.3
        with pytest.raises(Cancelled):
            graph.run(backend)
    backend.abort.clear()
    assert product(lib, backend, F32, weight[:8].view(np.uint8), x[:1]).shape == (1, 8)
    backend.close()


def test_closing_twice_is_allowed(lib: Library) -> None:
    backend = CpuBackend(lib, 1)
    backend.close()
    backend.close()
    repack = RepackBuffer.find(lib)
    if repack is not None:
        repack.close()
        repack.close()
