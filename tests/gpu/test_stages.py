"""Whole stages of a Llama block on the device: attention, then the MLP on what it left, as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pipo.base.manifest import Extent, FileIdx, HyperParameters, Rope, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.models.blocks import lay_attention, lay_gated_mlp
from pipo.models.stage import KvGroup, ShapeClass, Stage, StageBuilder, StageKind
from tests.support.device_graphs import DeviceRig, fetch
from tests.support.graphs import Array, FloatArray, Lay, bind, built, floats, quantised

F32, F16, Q4_0, Q8_0 = TensorType.F32, TensorType.F16, TensorType.Q4_0, TensorType.Q8_0
HIDDEN, MLP, HEADS, KV_HEADS, HEAD, KV_ROWS, NUM_PAST, NUM_TOKENS = 256, 384, 4, 2, 64, 256, 100, 5
KV = KV_HEADS * HEAD
HYPER = HyperParameters(
    architecture="llama", hidden_size=HIDDEN, intermediate_size=MLP, num_layers=1, num_q_heads=HEADS,
    num_kv_heads=KV_HEADS, head_dim=HEAD, vocab_size=8, context_tokens=512, norm_epsilon=1e-5, rope=Rope(HEAD, 1e4),
)  # fmt: skip
SHAPE = ShapeClass(NUM_TOKENS, (KvGroup(NUM_TOKENS, KV_ROWS),), num_outputs=1, kv_type_k=F16, kv_type_v=F16)
MATRICES = {
    StageKind.ATTENTION: {"attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, KV), "attn_v": (HIDDEN, KV),
                          "attn_output": (HIDDEN, HIDDEN)},
    StageKind.MLP: {"ffn_gate": (HIDDEN, MLP), "ffn_up": (HIDDEN, MLP), "ffn_down": (MLP, HIDDEN)},
}  # fmt: skip
NORMS = {StageKind.ATTENTION: "attn_norm.weight", StageKind.MLP: "ffn_norm.weight"}
LAYS: dict[StageKind, Callable[[StageBuilder], None]] = {
    StageKind.ATTENTION: lay_attention,
    StageKind.MLP: lay_gated_mlp,
}


def spec(role: str, type_: TensorType, *shape: int) -> TensorSpec:
    return TensorSpec(role, type_, shape, Extent(FileIdx(0), 0, 1))


def stage(kind: StageKind, type_: TensorType) -> Stage:
    matrices = {f"{role}.weight": spec(role, type_, *shape) for role, shape in MATRICES[kind].items()}
    return Stage(kind, 0, matrices, {NORMS[kind]: spec("norm", F32, HIDDEN)}, LAYS[kind])


def lay(of: Stage) -> Lay:
    return lambda ops: of.lay(StageBuilder(ops, HYPER, SHAPE, of, lambda name: False))


def weights(lib: Library, of: Stage) -> dict[str, Array]:
    """Rows of norm one, so that every product keeps the size of its input."""
    raw = {
        role: quantised(lib, each.type, floats(each.shape[1], each.shape[0]) / np.float32(each.shape[0] ** 0.5))
        for role, each in of.matrices.items()
    }
    return {**raw, NORMS[of.kind]: 1 + floats(HIDDEN) / 8}


def inputs() -> dict[str, Array]:
    """A pass of NUM_TOKENS after NUM_PAST: caches with a past, a causal mask."""
    rows = np.arange(NUM_PAST, NUM_PAST + NUM_TOKENS)
    past = {name: floats(KV_ROWS, KV).astype(np.float16) for name in ("k_cache.0", "v_cache.0")}
    mask = np.where(np.arange(KV_ROWS) <= rows[:, None], 0, -np.inf).astype(np.float16)
    return {"hidden": floats(NUM_TOKENS, HIDDEN), "positions": rows.astype(np.int32),
            "kv_rows": rows.astype(np.int64), "mask": mask, **past}  # fmt: skip


def on_cpu(lib: Library, cpu: CpuBackend, of: Stage, arrays: dict[str, Array]) -> None:
    with built(lib, lay(of)) as graph:
        bind(graph, {name: arrays[name] for name in graph.leaf_names})
        graph.run(cpu)


def change(before: dict[str, Array], after: dict[str, Array], name: str = "hidden") -> FloatArray:
    return after[name].astype(np.float32) - before[name].astype(np.float32)


# What one product adds to the relative error of a whole vector. F32: nothing but order, yet attention on a device
# reads queries in f16. F16: activations rounded to it. Quantised: activations to 8 bits in blocks of 32, off by
# uniformly up to half a step of the block's largest, which of normal values is 2.1 times their root mean square on
# average: 2.1 / 127 / 2 / sqrt(3) = 2**-7.7, on either device.
STEP = {F32: 2**-11, F16: 2**-11, Q8_0: 2**-7.7 * 2**0.5, Q4_0: 2**-7.7 * 2**0.5}
# products on the way through a stage whose errors add: q and k (the scores), v, output · gate, up, down
NUM_PRODUCTS = {StageKind.ATTENTION: 4, StageKind.MLP: 3}
# the CPU sums values of an f16 cache in f16: as many roundings of random sign as there are rows
F16_SUMS = 2**-11 * (NUM_PAST + NUM_TOKENS) ** 0.5


def tolerance(kind: StageKind, type_: TensorType) -> float:
    """Of the difference, relative to what the stage adds to `hidden`."""
    return NUM_PRODUCTS[kind] * STEP[type_] + (F16_SUMS if kind is StageKind.ATTENTION else 0)


@pytest.mark.parametrize("type_", STEP, ids=lambda type_: type_.name)
def test_block_equals_that_of_the_cpu(lib: Library, gpu: DeviceRig, cpu: CpuBackend, type_: TensorType) -> None:
    given = inputs()
    for kind in (StageKind.ATTENTION, StageKind.MLP):
        of = stage(kind, type_)
        before = {**given, **weights(lib, of)}
        want, got = ({name: array.copy() for name, array in before.items()} for _ in range(2))
        on_cpu(lib, cpu, of, want)
        gpu.run_once(lay(of), **got)
        wanted, found = change(before, want), change(before, got)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < tolerance(kind, type_), kind
        for name in ("k_cache.0", "v_cache.0"):
            rows = np.any(change(before, got, name) != 0, axis=1)
            assert not rows[:NUM_PAST].any() and not rows[NUM_PAST + NUM_TOKENS :].any(), (
                "only the new rows are written"
            )
            np.testing.assert_allclose(got[name], want[name], atol=8 * STEP[type_])
        for name in before.keys() - {"hidden", "k_cache.0", "v_cache.0"}:
            np.testing.assert_array_equal(got[name], before[name], name)
        given["hidden"] = want["hidden"]


def test_stages_share_hidden_on_the_device(lib: Library, gpu: DeviceRig, cpu: CpuBackend) -> None:
    """Two stages in one workspace and one set of places, queued one after the other without a wait."""
    stages = [stage(kind, F32) for kind in (StageKind.ATTENTION, StageKind.MLP)]
    arrays = inputs()
    for of in stages:
        arrays.update(weights(lib, of))
    want = {name: array.copy() for name, array in arrays.items()}
    for of in stages:
        on_cpu(lib, cpu, of, want)
    places = gpu.place(arrays)
    for graph in [gpu.build(lay(of)) for of in stages]:
        graph.bind(graph.device_binding({name: places[name] for name in graph.leaf_names}))
        graph.run_async(gpu.queue)
    gpu.queue.synchronize()
    got = np.empty_like(arrays["hidden"])
    fetch(places["hidden"], got)
    wanted = change(arrays, want)
    error = np.linalg.norm(got - want["hidden"]) / np.linalg.norm(wanted)
    assert error < sum(tolerance(kind, F32) for kind in NUM_PRODUCTS)


@pytest.mark.parametrize("kv_type", [F32, F16, Q8_0, Q4_0], ids=lambda type_: type_.name)
def test_ops_of_every_kv_type_are_ones_the_device_computes(gpu: DeviceRig, kv_type: TensorType) -> None:
    """Building checks every op against the device."""
    of, shape = stage(StageKind.ATTENTION, Q4_0), replace(SHAPE, kv_type_k=kv_type, kv_type_v=kv_type)
    graph = gpu.build(lambda ops: of.lay(StageBuilder(ops, HYPER, shape, of, lambda name: False)))
    assert graph.device is gpu.device
