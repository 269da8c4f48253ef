"""The whole engine on weights that nobody can compute with: not numbers, or of a type without a product."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pipo.base.errors import ComputeError, PipoError, UnsupportedModel
from pipo.base.tensor_type import TensorType
from pipo.formats.checkpoint import open_checkpoint
from tests.support.engines import start_engine
from tests.support.small_engine import answer
from tests.support.tiny_models import SPECS, make_model, write_gguf


def tiny(path: Path) -> Path:
    write_gguf(make_model(SPECS["llama"]), path)
    return path


def patch_tensor(path: Path, name: str, data: bytes) -> None:
    extent = open_checkpoint(path).manifest.tensors[name].extent
    with path.open("r+b") as stream:
        stream.seek(extent.offset)
        stream.write(data)


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output_norm.weight", "blk.0.attn_q.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(tmp_path: Path, name: str, value: float) -> None:
    """Sampling refuses what comes out, says what may be wrong, and goes on refusing."""
    path = tiny(tmp_path / "tiny.gguf")
    patch_tensor(path, name, struct.pack("<f", value) * 4)
    with start_engine(path) as engine:
        for _ in range(2):
            with pytest.raises(ComputeError, match="the model produced NaN") as failed:
                answer(engine)
            assert failed.value.hint is not None and "checksum" in failed.value.hint


@pytest.mark.parametrize("type_", [TensorType.I32, TensorType.F64, TensorType.I8])
def test_matrix_of_a_type_without_a_product(tmp_path: Path, type_: TensorType) -> None:
    """libggml would call a kernel that is not there."""
    path = tiny(tmp_path / "tiny.gguf")
    name = b"blk.1.attn_k.weight"
    data = bytearray(path.read_bytes())
    start_of_type = data.index(name) + len(name) + 4 + 2 * 8
    data[start_of_type : start_of_type + 4] = struct.pack("<I", type_)
    path.write_bytes(data)
    with pytest.raises(PipoError) as refused:
        start_engine(path)
    if type_ is TensorType.I32:  # as large as F32: the file is well formed
        assert isinstance(refused.value, UnsupportedModel)
        assert f"blk.1.attn_k.weight is {type_.name}" in str(refused.value)
