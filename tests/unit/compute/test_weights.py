"""compute.repack and compute.dequantise: however weights are stored, cut or repacked, the product is the same."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from pipo.base.errors import ComputeError
from pipo.base.tensor_type import TensorType
from pipo.compute.dequantise import Dequantiser
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.repack import RepackBuffer
from tests.support.graphs import dequantised, floats, product, quantised, repacked

F32, F16, Q4_0, Q8_0 = TensorType.F32, TensorType.F16, TensorType.Q4_0, TensorType.Q8_0
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
        Dequantiser(lib, TensorType.I32)


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
