"""Small tensors on their way from the file to memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipo.base.errors import ReadFailed
from pipo.base.manifest import Conversion, Extent, FileIdx, TensorSpec
from pipo.base.tensor_type import TensorType
from pipo.pipeline.vectors import vector_data

EXTENT = Extent(FileIdx(0), 64, 12)
VALUES = torch.tensor([1.0, -2.5, 3e-3, 65504.0, 1 / 3, 0.0])
DTYPES = {TensorType.F32: torch.float32, TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}


def spec(conversion: Conversion | None = None, values: tuple[float, ...] = ()) -> TensorSpec:
    return TensorSpec("v", TensorType.F32, (len(VALUES),), EXTENT, conversion, values)


def stored(dtype: torch.dtype) -> bytes:
    return VALUES.to(dtype).view(torch.uint8).numpy().tobytes()


def test_as_it_is() -> None:
    assert vector_data(spec(), lambda extent: b"whatever" if extent == EXTENT else b"") == b"whatever"


@pytest.mark.parametrize("added", [0.0, 1.0])
@pytest.mark.parametrize("type_", DTYPES)
def test_converted(type_: TensorType, added: float) -> None:
    dtype = DTYPES[type_]
    got = np.frombuffer(vector_data(spec(Conversion(type_, added)), lambda extent: stored(dtype)), np.float32)
    np.testing.assert_array_equal(got, (VALUES.to(dtype).float() + added).numpy())


def test_every_bfloat16() -> None:
    raw = np.arange(1 << 16, dtype=np.uint16)
    got = np.frombuffer(vector_data(spec(Conversion(TensorType.BF16)), lambda extent: raw.tobytes()), np.float32)
    want = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(got.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
    assert np.isnan(got[np.isnan(want)]).all()


def test_computed_ones_read_nothing() -> None:
    values = tuple(float(v) for v in VALUES)
    got = vector_data(spec(values=values), lambda extent: pytest.fail("read"))
    assert got == VALUES.numpy().tobytes()


def test_what_a_read_raises_comes_through() -> None:
    def broken(extent: Extent) -> bytes:
        raise ReadFailed("no", path="x", offset=0, wanted_bytes=1, got_bytes=0)

    with pytest.raises(ReadFailed):
        vector_data(spec(Conversion(TensorType.BF16)), broken)


def test_sizes_are_those_in_memory() -> None:
    assert spec(Conversion(TensorType.BF16)).num_bytes == 4 * len(VALUES) != EXTENT.num_bytes


def test_matrices_that_lie_apart() -> None:
    slices = tuple(Extent(FileIdx(i % 2), 100 * i, 2 * 3 * 4) for i in (3, 0, 7))
    apart = TensorSpec("e", TensorType.F32, (2, 3, 3), slices[0], slices=slices)
    assert apart.num_bytes == 3 * 24 and apart.extents == slices
    assert [apart.matrix(i).extent for i in range(3)] == list(slices)
    assert (apart.matrix(2).name, apart.matrix(2).shape, apart.matrix(2).extents) == ("e[2]", (2, 3), (slices[2],))
    together = TensorSpec("e", TensorType.F32, (2, 3, 3), Extent(FileIdx(1), 50, 72))
    assert [together.matrix(i).extent.offset for i in range(3)] == [50, 74, 98]
