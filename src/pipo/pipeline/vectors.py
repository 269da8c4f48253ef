"""Small tensors that are always resident: norms, biases, rope factors, routers. From the file's bytes to F32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pipo.base.manifest import Conversion, Extent, TensorSpec
from pipo.base.tensor_type import TensorType

_BF16_SHIFT = 16  # BF16 is the upper half of F32


def vector_data(spec: TensorSpec, read: Callable[[Extent], bytes]) -> bytes:
    """What belongs in memory. Raises what `read` does. Cost: a converted one takes twice its size meanwhile."""
    if spec.values:
        return np.asarray(spec.values, np.float32).tobytes()
    raw = read(spec.extent)
    return raw if spec.conversion is None else _converted(raw, spec.conversion).tobytes()


def _converted(raw: bytes, conversion: Conversion) -> npt.NDArray[np.float32]:
    values = _as_float32(raw, conversion.stored)
    return values + np.float32(conversion.added) if conversion.added else values


def _as_float32(raw: bytes, stored: TensorType) -> npt.NDArray[np.float32]:
    if stored is TensorType.BF16:
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << _BF16_SHIFT).view(np.float32)
    if stored is TensorType.F16:
        return np.frombuffer(raw, np.float16).astype(np.float32)
    assert stored is TensorType.F32, "only floats are converted"
    return np.frombuffer(raw, np.float32)
