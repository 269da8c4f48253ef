"""How far logits may be from the truth because kernels round the activations that they multiply."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GgufType

_HALF_STEP = 1 / math.sqrt(12)  # deviation of a uniform error one step wide
_Q8_STEP = 2.1 / 127  # of a block of 32: the largest of them is near 2.1 deviations

# Relative root mean square error of one product: how the type's kernel rounds its activations.
PRODUCT_ERROR = {
    GgufType.F32: 2**-23 * math.sqrt(64),  # accumulation over the hidden size, not rounding of activations
    GgufType.F16: 2**-10 * _HALF_STEP,
    GgufType.BF16: 2**-7 * _HALF_STEP,
    GgufType.Q8_0: _Q8_STEP * _HALF_STEP,
    GgufType.Q4_0: _Q8_STEP * _HALF_STEP,
    GgufType.Q4_1: _Q8_STEP * _HALF_STEP,
    GgufType.Q5_0: _Q8_STEP * _HALF_STEP,
    GgufType.Q5_1: _Q8_STEP * _HALF_STEP,
    GgufType.MXFP4: _Q8_STEP * _HALF_STEP,
}


def logit_tolerance(num_layers: int, type: GgufType, want: npt.NDArray[np.float32]) -> float:
    """Of the root mean square difference from the truth.

    Independent errors of products in a row add as squares; attention, up and down per block, and the head. Three
    times that, for what the estimate leaves out (softmax, norms, correlated errors).
    """
    num_products = 3 * num_layers + 2
    return float(3 * want.std() * PRODUCT_ERROR[type] * math.sqrt(num_products))
