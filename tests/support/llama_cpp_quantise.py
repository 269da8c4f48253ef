"""The quantiser inside the xllamacpp wheel: llama.cpp's own build of ggml, called past its Python bindings."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xllamacpp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


def llama_cpp_quantize(values: npt.NDArray[np.float32], type_: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """All rows, without an importance matrix, as one run of bytes."""
    values = np.ascontiguousarray(values, np.float32)
    row_elems = values.shape[-1]
    num_rows = values.size // row_elems
    block_elems, block_bytes = GGML_QUANT_SIZES[type_]
    out = np.empty(values.size // block_elems * block_bytes, np.uint8)
    written = _quantize_chunk()(int(type_), values.ctypes.data, out.ctypes.data, 0, num_rows, row_elems, None)
    assert written == out.size
    return out


@functools.cache
def _quantize_chunk() -> Any:
    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return function
