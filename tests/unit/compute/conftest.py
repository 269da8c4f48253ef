"""For every test of compute: the library, and what it computes with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipo.base.tensor_type import TensorType
from pipo.compute import ggml
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from pipo.compute.graphs import Builder
from pipo.compute.repack import RepackBuffer


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
    if repack is None or not repack.supports(TensorType.Q4_0, (64, 64)):
        pytest.skip("no repacked kernels on this CPU")
    yield repack
    repack.close()
