"""packing.verify: damage is found wherever it lies, and what cannot be compared is said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgufType

from bench.page_cache import cached_bytes
from pipo.base.errors import DamagedFile, MalformedFile, ModelError, UnsupportedModel
from pipo.compute import ggml
from pipo.formats.gguf import entry_spans, open_gguf
from pipo.packing.verify import HEADER, Verdict, verify
from tests.support.gguf_bytes import rich_llama, write
from tests.support.packs import pack_file
from tests.support.tiny_models import SPECS, make_model, write_gguf


def look(path: Path, **settings: int) -> Verdict:
    return verify(path, ggml.load(), **{"num_threads": 2, **settings})


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "m.gguf"
    write_gguf(make_model(SPECS["mixtral"]), path, GgufType.Q4_0)
    return path


@pytest.fixture(scope="module")
def packed_bytes(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("verify") / "packed.gguf"
    pack_file(unpacked, "q8_0", out)
    return out.read_bytes()


@pytest.fixture
def packed(packed_bytes: bytes, tmp_path: Path) -> Path:
    return write(tmp_path, packed_bytes)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1 << bit]))


def test_intact(packed: Path) -> None:
    heard: list[tuple[int, int]] = []
    verdict = verify(packed, ggml.load(), num_threads=2, on_progress=lambda *done: heard.append(done))
    assert verdict.has_checksums and verdict.damage is None
    assert heard[-1] == (verdict.num_bytes, verdict.num_bytes)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_checksums_are_those_of_b2sum(packed: Path) -> None:
    reader = gguf.GGUFReader(packed)
    sums = reader.fields["pipo.checksum.tensors"].contents()
    for tensor, wanted in zip(reader.tensors, sums, strict=True):
        raw = packed.read_bytes()[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
        assert hashlib.blake2b(raw, digest_size=32).hexdigest() == wanted


def test_a_flipped_bit_in_any_tensor_is_found_with_its_name(packed: Path, packed_bytes: bytes) -> None:
    for spec in open_gguf(packed).tensors.values():
        for offset in (spec.extent.offset, spec.extent.end - 1):
            flip(packed, offset, 6)
            damage = look(packed).damage
            assert damage is not None
            assert (damage.tensor, damage.offset, damage.num_bytes) == (spec.name, spec.extent.offset, spec.num_bytes)
            raw = packed.read_bytes()[spec.extent.offset : spec.extent.end]
            assert damage.found == hashlib.blake2b(raw, digest_size=32).hexdigest() != damage.wanted
            flip(packed, offset, 6)
    assert packed.read_bytes() == packed_bytes


def test_a_flipped_bit_anywhere_in_the_header_is_found(packed: Path, packed_bytes: bytes) -> None:
    """Whatever it makes of the header: one that cannot be read, one whose checksums are gone, or a wrong one."""
    end = min(spec.extent.offset for spec in open_gguf(packed).tensors.values())
    found: set[str] = set()
    for offset in np.random.default_rng(0).permutation(end)[:400]:
        flip(packed, int(offset), int(offset) % 8)
        try:
            verdict = look(packed)
            assert verdict.has_checksums and verdict.damage is not None, offset
            found.add(verdict.damage.tensor)
        except ModelError as error:
            found.add(type(error).__name__)
        flip(packed, int(offset), int(offset) % 8)
    assert HEADER in found
    assert packed.read_bytes() == packed_bytes


def test_the_first_of_several_is_named(packed: Path) -> None:
    specs = sorted(open_gguf(packed).tensors.values(), key=lambda spec: spec.extent.offset)
    for spec in (specs[-1], specs[7], specs[9]):
        flip(packed, spec.extent.offset + 5)
    damage = look(packed, num_threads=4).damage
    assert damage is not None and damage.tensor == specs[7].name


def test_a_truncated_file_is_refused_with_the_tensor(packed: Path, packed_bytes: bytes) -> None:
    packed.write_bytes(packed_bytes[: len(packed_bytes) // 2])
    with pytest.raises(MalformedFile, match="the file ends at"):
        look(packed)


def test_no_checksums_is_no_praise(unpacked: Path) -> None:
    verdict = look(unpacked)
    assert not verdict.has_checksums and verdict.damage is None


def test_without_checksums_a_value_that_is_no_number_is_found(unpacked: Path, tmp_path: Path) -> None:
    broken = write(tmp_path, unpacked.read_bytes())
    (spec,) = (s for s in open_gguf(broken).tensors.values() if s.name == "blk.1.attn_q.weight")
    at = spec.extent.offset + 5 * spec.type.row_bytes(spec.shape[0])
    with broken.open("r+b") as stream:
        stream.seek(at)
        stream.write(np.float16(np.nan).tobytes())  # a block's scale
    damage = look(broken).damage
    assert damage is not None
    assert (damage.tensor, damage.offset, damage.found) == (spec.name, spec.extent.offset, "one that is not in row 5")


def test_any_gguf_can_be_looked_at(tmp_path: Path) -> None:
    verdict = look(write(tmp_path, bytes(rich_llama())))  # whole numbers among its tensors
    assert (verdict.num_tensors, verdict.damage) == (3, None)


def entry_value(path: Path, key: str, from_end: int, change: Callable[[bytes], bytes]) -> None:
    start, size = entry_spans(open_gguf(path).metadata)[key]
    raw = path.read_bytes()
    at = start + size - from_end
    path.write_bytes(raw[:at] + change(raw[at : start + size]) + raw[start + size :])


def test_another_algorithm_is_refused_by_name(packed: Path) -> None:
    entry_value(packed, "pipo.checksum.algorithm", 3, lambda old: b"999")
    with pytest.raises(UnsupportedModel, match="blake2b-999"):
        look(packed)


def test_checksums_of_other_tensors_are_refused(packed: Path, unpacked: Path) -> None:
    start, size = entry_spans(open_gguf(packed).metadata)["pipo.checksum.tensors"]
    raw = bytearray(packed.read_bytes())
    end = start + size  # an array one shorter: its last string becomes part of nothing, so cut and count anew
    count_at = start + 8 + len("pipo.checksum.tensors") + 8
    count = int.from_bytes(raw[count_at : count_at + 8], "little")
    raw[count_at : count_at + 8] = (count - 1).to_bytes(8, "little")
    shorter = bytes(raw[: end - 72]) + bytes(raw[end:])
    head = shorter.index(b"\0" * 64, end)  # the padding before the data, which gives back what was cut
    packed.write_bytes(shorter[:head] + bytes(72) + shorter[head:])
    with pytest.raises(DamagedFile, match=f"{count - 1} checksums for {count} tensors"):
        look(packed)


def test_nothing_stays_in_the_page_cache(packed: Path) -> None:
    from pipo.base.page_cache import forget_cached

    with packed.open("rb") as stream:
        forget_cached(stream.fileno(), 0, packed.stat().st_size)
    look(packed)
    assert cached_bytes(packed) < packed.stat().st_size // 2
