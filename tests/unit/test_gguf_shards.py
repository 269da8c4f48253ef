"""formats.gguf on sharded models: any shard opens the set, and a set that does not belong together is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest

from pipo.base.errors import MalformedFile, ModelNotFound
from pipo.formats.gguf import open_gguf
from tests.support.gguf_bytes import GgufBytes, count_key, tensor, text_key, write
from tests.support.gguf_oracle import add_everything, assert_same_metadata, assert_same_tensors, write_gguf


def write_shards(folder: Path, *, small_first_shard: bool = False, name: str = "m.gguf") -> list[Path]:
    write_gguf(folder / name, add_everything, split_max_tensors=20, small_first_shard=small_first_shard)
    return sorted(folder.glob(f"{Path(name).stem}-*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_any_shard_opens_the_set(tmp_path: Path, small_first_shard: bool) -> None:
    paths = write_shards(tmp_path, small_first_shard=small_first_shard)
    oracles = [gguf.GGUFReader(path) for path in paths]
    assert len(paths) >= 2
    for path in paths:
        opened = open_gguf(path)
        assert opened.files == tuple(paths)
        assert_same_metadata(opened, oracles[0])
        assert_same_tensors(opened, oracles)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, small_first_shard=True)
    paths[0].unlink()
    with pytest.raises(ModelNotFound, match=f"1 of its 3 shards are missing: {paths[0].name}"):
        open_gguf(paths[1])


def split_keys(idx: int, count: int, num_tensors: int) -> list[bytes]:
    return [
        count_key("split.no", idx),
        count_key("split.count", count),
        count_key("split.tensors.count", num_tensors),
    ]


def write_pair(folder: Path, first: GgufBytes, second: GgufBytes) -> Path:
    write(folder, bytes(second), "m-00002-of-00002.gguf")
    return write(folder, bytes(first), "m-00001-of-00002.gguf")


def shard(keys: Sequence[bytes], name: str) -> GgufBytes:
    return GgufBytes(keys, [tensor(name, (8,))], bytes(32))


ONE, TWO = split_keys(0, 2, 2), split_keys(1, 2, 2)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (shard(split_keys(0, 2, 2), "b"), "wanted shard 2 of 2 with 2 tensors in all, found shard 1 of 2"),
        (shard(split_keys(1, 3, 2), "b"), "wanted shard 2 of 2 with 2 tensors in all, found shard 2 of 3"),
        (shard(split_keys(1, 2, 9), "b"), "wanted shard 2 of 2 with 2 tensors in all, found shard 2 of 2 with 9"),
        (shard(TWO, "a"), "tensor 'a' is also in an earlier shard"),
        (GgufBytes(TWO), "its 2 shards hold 1 tensors, split.tensors.count says 2"),
        (
            shard([*TWO, text_key("general.name", "Y")], "b"),
            "key 'general.name' is 'Y', m-00001-of-00002.gguf says 'X'",
        ),
        (shard([], "b"), "m-00002-of-00002.gguf: is named shard 00002 of 00002, key 'split.count' is None"),
    ],
)
def test_a_shard_of_another_model_is_refused(tmp_path: Path, second: GgufBytes, message: str) -> None:
    first = shard([*ONE, text_key("general.name", "X")], "a")
    with pytest.raises(MalformedFile, match=message):
        open_gguf(write_pair(tmp_path, first, second))


def test_a_shard_opened_under_another_number_is_refused(tmp_path: Path) -> None:
    path = write_pair(tmp_path, shard(TWO, "a"), shard(TWO, "b"))
    with pytest.raises(MalformedFile, match=r"holds shard 2 of 2, so its name must end in -00002-of-00002.gguf"):
        open_gguf(path)


def test_a_renamed_shard_is_refused_with_the_name_it_needs(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(shard(ONE, "a")), "renamed.gguf")
    with pytest.raises(MalformedFile, match=r"must end in -00001-of-00002.gguf"):
        open_gguf(path)


@pytest.mark.parametrize(("idx", "count"), [(2, 2), (0, 5000)])
def test_impossible_shard_numbers(tmp_path: Path, idx: int, count: int) -> None:
    path = write(tmp_path, bytes(shard(split_keys(idx, count, 1), "a")))
    with pytest.raises(MalformedFile, match=f"split.no {idx}, split.count {count}"):
        open_gguf(path)


def test_one_shard_of_one_is_a_file_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(shard(split_keys(0, 1, 1), "a")), "m-00001-of-00001.gguf")
    assert open_gguf(path).files == (path,)
