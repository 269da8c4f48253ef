"""Rows of any ggml type to float32, with libggml's own reference routine. For embedding rows."""

from __future__ import annotations

import ctypes

from pipo.base.errors import ComputeError
from pipo.base.tensor_type import TensorType
from pipo.compute.ggml import Library, ToFloat


class Dequantiser:
    """Converts `num_elems` elements at an address to float32 at another. Raises ComputeError for types without."""

    def __init__(self, lib: Library, type_: TensorType) -> None:
        self._to_float = None
        if type_ is TensorType.F32:
            return
        address = lib.get_type_traits(int(type_)).contents.to_float
        if not address:
            raise ComputeError(f"libggml cannot convert {type_.name} to float32")
        self._to_float = ToFloat(address)

    def convert(self, source: int, target: int, num_elems: int) -> None:
        if self._to_float is None:
            ctypes.memmove(target, source, num_elems * 4)
        else:
            self._to_float(source, target, num_elems)
