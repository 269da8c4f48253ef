"""Weights that a file has repacked for this CPU: the same logits, bit for bit, as when they are repacked while read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import bench.random_mixture
import bench.random_model
from bench.random_mixture import MixtureShape, write_random_mixture
from bench.random_model import SHAPES, write_random_model
from pipo.base.tensor_type import TensorType
from pipo.compute import ggml
from pipo.formats.checkpoint import open_checkpoint
from pipo.packing import types
from pipo.packing.native import native_output, plan_native
from pipo.packing.pack import pack
from pipo.packing.verify import verify
from tests.support.engines import smallest_ram_bytes, start_engine
from tests.support.packs import PLENTY, pack_file, without_kernels
from tests.support.rigs import FloatArray

PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, SHAPES["smoke"].vocab_size, 21)]
SETTINGS = {"prefill_chunk": 8, "max_outputs": 8, "context_tokens": 64}
pytestmark = without_kernels(TensorType.Q4_K)

HEAD = "output.weight"
MIXTURE = MixtureShape(2, 256, 256, 8, 2, 4, 2, 64, 1024, 2048)


def write_native(path: Path) -> Path:
    checkpoint = open_checkpoint(path)
    out = native_output(checkpoint)
    pack(plan_native(checkpoint, ggml.load(), PLENTY, 2), out, ggml.load())
    return out


@pytest.fixture(scope="module", params=["dense", "tied", "mixture"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every matrix is Q4_K, but for the heads: only the tied one's, which is the embedding table, is Q4_K too."""
    folder = tmp_path_factory.mktemp(request.param)
    source, out = folder / "source.gguf", folder / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "mixture":
            patch.setattr(bench.random_mixture, "SHAPES", {"tiny": MIXTURE})
            write_random_mixture(source, "tiny")
        elif request.param == "tied":
            untied = bench.random_model.plan_tensors
            patch.setattr(bench.random_model, "plan_tensors", lambda *of: [t for t in untied(*of) if t.name != HEAD])
            patch.setattr(types, "TABLES", frozenset())
            write_random_model(source, "smoke", "f16")
        else:
            write_random_model(source, "smoke", "f16")
        pack_file(source, "q4_k", out)
    source.unlink()
    return out


def logits(path: Path, layout: str, **settings: object) -> FloatArray:
    with start_engine(path, layout=layout, **{**SETTINGS, **settings}) as engine:
        assert engine.plan is not None
        assert (engine.plan.native_file is not None) is (layout == "native")
        assert engine.plan.repacked_types == ("Q4_K",)
        return engine.logits(PROMPT)


def test_the_same_bits_at_every_budget(path: Path, tmp_path: Path) -> None:
    bare = shutil.copy(path, tmp_path / "bare.gguf")
    write_native(path)
    wanted = logits(Path(bare), "repacked")
    assert np.isfinite(wanted).all() and wanted.std() > 0.1
    smallest = smallest_ram_bytes(path, layout="native", **SETTINGS)
    for ram_bytes in (smallest, smallest * 5 // 4, PLENTY):
        found = logits(path, "native", ram_bytes=ram_bytes)
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


def test_its_checksums_hold(path: Path) -> None:
    out = write_native(path)
    verdict = verify(out, ggml.load(), num_threads=1)
    assert verdict.has_checksums and verdict.damage is None
    with out.open("r+b") as stream:
        stream.seek(out.stat().st_size - 5000)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
    damage = verify(out, ggml.load(), num_threads=1).damage
    assert damage is not None and damage.tensor in open_checkpoint(path).manifest.tensors
