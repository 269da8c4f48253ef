"""A product on the device is that of the CPU, up to what each of them rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipo.base.tensor_type import TensorType
from pipo.compute.device import ComputeDevice
from pipo.compute.device_backend import DeviceBackend
from pipo.compute.devices import CpuBackend
from pipo.compute.ggml import Library
from tests.support.device_graphs import run_once_on
from tests.support.graphs import FloatArray, dequantised, floats, linear, product, quantised

NUM_IN, NUM_OUT = 512, 96
F16_STEP, INT8_STEPS = 2**-11, 127


def rounding(weight: FloatArray, x: FloatArray) -> FloatArray:
    """Most that two devices differ in an element. Shapes: (out, in), (tokens, in) → (tokens, out).

    The CPU rounds activations to 8 bits, half a step of the largest of 32 (here: of all); a GPU may do so too. It may
    also round weights and activations to f16, and keep sums of many tokens in f16: `NUM_IN` roundings of random sign.
    """
    to_int8 = 2 * np.abs(x).max(axis=1, keepdims=True) / (2 * INT8_STEPS) * np.abs(weight).sum(axis=1)
    to_f16 = (2 + math.sqrt(NUM_IN)) * F16_STEP * (np.abs(x) @ np.abs(weight).T)
    return to_int8 + to_f16


@pytest.mark.parametrize("num_tokens", [1, 33])
@pytest.mark.parametrize("type_", [TensorType.Q4_0, TensorType.Q8_0, TensorType.F16], ids=lambda type_: type_.name)
def test_product_equals_that_of_the_cpu(
    lib: Library, gpu: DeviceBackend, device: ComputeDevice, cpu: CpuBackend, type_: TensorType, num_tokens: int
) -> None:
    raw, x = quantised(lib, type_, floats(NUM_OUT, NUM_IN)), floats(num_tokens, NUM_IN)
    y = np.full((num_tokens, NUM_OUT), np.nan, np.float32)
    run_once_on(gpu, linear(type_, NUM_IN, NUM_OUT, num_tokens), x=x, w=raw, y=y)
    weight = dequantised(lib, type_, raw)
    assert (np.abs(y - product(lib, cpu, type_, raw, x)) <= rounding(weight, x)).all()
    # most elements are much closer: a wrong block scale or a row in another's place is not
    error = np.linalg.norm(y - x @ weight.T) / np.linalg.norm(x @ weight.T)
    assert error < 2**-6
