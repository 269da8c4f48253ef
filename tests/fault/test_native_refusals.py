"""A file of repacked weights that does not belong here: named and left alone, never computed with."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bench.random_model
from bench.random_model import Shape, write_random_model
from pipo.base.errors import OutputFailed, UnsupportedModel, UsageError
from pipo.base.tensor_type import TensorType
from pipo.compute import ggml
from pipo.compute.repack import RepackBuffer
from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.native import native_path, open_native, source_of
from pipo.packing import native
from pipo.packing.native import is_current, native_output, plan_native
from pipo.packing.pack import pack
from tests.support.engines import start_engine
from tests.support.packs import PLENTY, pack_file, without_kernels

pytestmark = without_kernels(TensorType.Q4_K)

PROMPT = list(range(3, 20))
SETTINGS = {"prefill_chunk": 8, "max_outputs": 8, "context_tokens": 64}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Without checksums: of such a file, size and time are what tells two versions apart."""
    path = tmp_path / "model.gguf"
    write_random_model(path, "smoke", "q4_k")
    write_native(path)
    return path


def write_native(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    pack(plan_native(checkpoint, ggml.load(), PLENTY, 1), native_output(checkpoint), ggml.load())


def _of_another_version(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _for_other_kernels(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepackBuffer, "sample_digest", lambda self, type_: "0" * 32)
        patch.setattr(native, "made_by", lambda lib: "libggml 9.9 with SVE")
        write_native(path)


def _cut(path: Path) -> None:
    os.truncate(native_path(path), native_path(path).stat().st_size // 2)


def _noise(path: Path) -> None:
    native_path(path).write_bytes(os.urandom(4096))


def _a_model(path: Path) -> None:
    shutil.copy(path, native_path(path))


def _of_another_model(path: Path) -> None:
    """Its tensors are larger; its key says that it is this one's."""
    other, source = path.with_name("other.gguf"), source_of(open_checkpoint(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "source_of", lambda checkpoint: source)
        patch.setattr(bench.random_model, "SHAPES", {"other": Shape(4, 512, 768, 4, 2, 1024, 2048)})
        write_random_model(other, "other", "q4_k")
        write_native(other)
    native_path(other).rename(native_path(path))


STRANGERS: dict[Callable[[Path], None], str] = {
    _of_another_version: "was made of another version of the model",
    _for_other_kernels: "was made by libggml 9.9 with SVE, whose kernels want other bytes",
    _cut: "the file ends at",
    _noise: "is not a GGUF file",
    _a_model: "is no file of repacked weights",
    _of_another_model: "the model has",
}


@pytest.mark.parametrize("make_strange", STRANGERS)
def test_what_does_not_belong_is_said_and_not_used(
    path: Path, make_strange: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    with start_engine(path, layout="plain", **SETTINGS) as engine:
        wanted = engine.logits(PROMPT)
    make_strange(path)
    with caplog.at_level(logging.WARNING), start_engine(path, ram_bytes=17 << 20, **SETTINGS) as engine:
        assert engine.plan is not None and engine.plan.is_streaming and engine.plan.native_file is None
        found = engine.logits(PROMPT)
    assert STRANGERS[make_strange] in caplog.text
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(UsageError, match="--layout native") as refused:
        start_engine(path, layout="native")
    assert STRANGERS[make_strange] in refused.value.message
    assert f"pipo pack {path} --layout native" in (refused.value.hint or "")
    assert not is_current(open_checkpoint(path), ggml.load())


def test_where_there_is_none_the_flag_says_so(path: Path) -> None:
    native_path(path).unlink()
    assert open_native(open_checkpoint(path).manifest) is None
    with pytest.raises(UsageError, match=f"there is no {native_path(path)}"):
        start_engine(path, layout="native")


def test_a_pack_may_be_copied_with_it(path: Path, tmp_path: Path) -> None:
    """Its checksum tells which version it is, whatever its time."""
    packed, copy = tmp_path / "packed.gguf", tmp_path / "copy.gguf"
    pack_file(path, "q4_k", packed)
    write_native(packed)
    shutil.copyfile(packed, copy)
    shutil.copyfile(native_path(packed), native_path(copy))
    os.utime(copy, ns=(1, 1))
    with start_engine(copy, layout="native") as engine:
        assert engine.plan is not None and engine.plan.native_file == native_path(copy)


def test_nothing_to_gain_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q8.gguf"
    write_random_model(path, "smoke", "q4_0")
    with pytest.raises(UnsupportedModel, match="nothing to gain"):
        plan_native(open_checkpoint(path), ggml.load(), PLENTY, 1)


def test_the_cache_of_the_hub_is_left_alone(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    with pytest.raises(OutputFailed, match="cache of the hub"):
        native_output(open_checkpoint(Path(shutil.copy(path, folder / "model.gguf"))))
