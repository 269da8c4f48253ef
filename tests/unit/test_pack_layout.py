"""packing.layout: order, places and header of a packed file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType

from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.gguf import open_gguf
from pipo.models.registry import stages_of
from pipo.packing import plan as pack_plan
from pipo.store.index import layout_unit
from tests.support.packs import left_beside, pack_file, plan_of, stored_bytes
from tests.support.tiny_models import SPECS, make_model, write_gguf


@pytest.fixture(scope="module", params=["llama", "llama-tied", "llama-llama3", "qwen2moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layout") / f"{request.param}.gguf"
    write_gguf(make_model(SPECS[request.param]), path)
    return path


def fields(path: Path) -> dict[str, object]:
    found = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in found.items() if not name.startswith("GGUF.")}


def test_a_pass_reads_the_file_from_front_to_back(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    pack_file(source, "q8_0", out)
    manifest = open_checkpoint(out).manifest
    units = [stage.specs for stage in stages_of(manifest) if stage.specs]
    starts = [min(spec.extent.offset for spec in unit) for unit in units]
    assert starts == sorted(starts)
    for unit, after in zip(units, [*starts[1:], out.stat().st_size], strict=True):
        assert max(spec.extent.end for spec in unit) <= after
        assert len(layout_unit(unit).reads) == 1  # one run of bytes
    vectors = {spec.name: spec for stage in stages_of(manifest) for spec in stage.vectors.values()}
    assert max(spec.extent.end for spec in vectors.values()) <= starts[0]


def test_every_tensor_begins_on_a_page_and_llama_cpps_sum_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    pack_file(source, "q4_0", out)
    tensors = list(open_gguf(out).tensors.values())
    assert all(spec.extent.offset % 4096 == 0 for spec in tensors)
    for before, after in pairwise(tensors):  # what gguf.cpp demands
        assert after.extent.offset == before.extent.offset + -(-before.num_bytes // 4096) * 4096
    assert out.stat().st_size == -(-tensors[-1].extent.end // 4096) * 4096


def test_metadata_is_copied_as_it_is(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    pack_file(source, "q4_0", out)
    before, after = fields(source), fields(out)
    own = {"general.alignment": 4096, "general.file_type": 2, "general.quantization_version": 2}
    copied = {name: value for name, value in after.items() if name not in own and not name.startswith("pipo.")}
    assert copied == {name: value for name, value in before.items() if name not in own}
    assert {name: after[name] for name in own} == own
    types = {name: field.types for name, field in gguf.GGUFReader(source).fields.items()}
    assert all(types[name] == field.types for name, field in gguf.GGUFReader(out).fields.items() if name in copied)


def test_a_packed_file_can_be_packed_again(source: Path, tmp_path: Path) -> None:
    once, twice, direct = (tmp_path / name for name in ("once.gguf", "twice.gguf", "direct.gguf"))
    pack_file(source, "f32", once)
    pack_file(once, "q8_0", twice)
    pack_file(source, "q8_0", direct)
    assert fields(twice).keys() == fields(direct).keys()
    assert stored_bytes(twice).keys() == stored_bytes(direct).keys()
    assert all(np.array_equal(data, stored_bytes(direct)[name]) for name, data in stored_bytes(twice).items())


def test_shards_become_one_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(make_model(SPECS["llama"]), whole)
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=8)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = min(tmp_path.glob("m-00001-of-*.gguf"))
    from_shards, from_whole = tmp_path / "a.gguf", tmp_path / "b.gguf"
    pack_file(first, "q8_0", from_shards)
    pack_file(whole, "q8_0", from_whole)
    assert not any(name.startswith("split.") for name in fields(from_shards))
    found, wanted = stored_bytes(from_shards), stored_bytes(from_whole)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_the_same_model_gives_the_same_bytes_whatever_the_memory_and_threads(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_plan, "process_bytes_now", lambda: 36 << 20)  # this process grows from test to test
    smallest = plan_of(source, "q8_0").memory
    tight = smallest.process_bytes + smallest.header_bytes + 700_000
    ways = [{"limit_bytes": tight, "threads": 1}, {"limit_bytes": tight, "threads": 3}, {"threads": 1}, {"threads": 4}]
    files = []
    for number, way in enumerate(ways):
        out = tmp_path / f"{number}.gguf"
        pack_file(source, "q8_0", out, **way)
        assert left_beside(out) == []
        files.append(out.read_bytes())
    assert files.count(files[0]) == len(ways)


def test_file_types_without_tables(tmp_path: Path) -> None:
    source, out = tmp_path / "bf16.gguf", tmp_path / "out.gguf"
    write_gguf(make_model(SPECS["llama"]), source, GgufType.BF16)
    pack_file(source, "f16", out)
    assert fields(out)["general.file_type"] == 1
