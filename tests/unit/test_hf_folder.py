"""Which files of a folder are the model's: one refusal per way to be wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipo.base.errors import MalformedFile, ModelError, ModelNotFound, UnsupportedModel
from pipo.base.manifest import TensorSpec
from pipo.formats.checkpoint import open_checkpoint, open_weight_files
from pipo.model_file import ModelFile
from pipo.models.registry import stages_of
from tests.support.hf_bytes import arrays_of, weight_map_of, write_config, write_folder, write_index, write_sharded
from tests.support.safetensors_bytes import file_with

SHARD = "model-00002-of-00003.safetensors"


def bytes_of(folder: Path, name: str) -> bytes:
    """Of a tensor, as the manifest finds it."""
    manifest = open_checkpoint(folder).manifest
    spec: TensorSpec = manifest.tensors[name]
    return manifest.files[spec.extent.file_idx].read_bytes()[spec.extent.offset : spec.extent.end]


def test_a_folder_and_a_file_in_it_are_the_same_model(tmp_path: Path) -> None:
    write_folder(tmp_path)
    by_folder, by_file = (open_checkpoint(p).manifest for p in (tmp_path, tmp_path / "model.safetensors"))
    assert by_folder == by_file and by_folder.name == tmp_path.name
    assert stages_of(by_folder)
    assert by_folder.num_bytes == sum(array.nbytes for array in arrays_of().values())
    assert bytes_of(tmp_path, "blk.0.ffn_down.weight") == arrays_of()["model.layers.0.mlp.down_proj.weight"].tobytes()


def test_a_file_of_weights_that_is_not_the_models(tmp_path: Path) -> None:
    """Named by itself it is never passed over in silence."""
    folder = write_folder(tmp_path / "m")
    for name in ("other.safetensors", "nothing.safetensors"):
        if name == "other.safetensors":
            (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(ModelNotFound, match=f"{name}: is none of the model's files"):
            open_checkpoint(folder / name)


def test_shards_are_one_model(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    manifest = open_checkpoint(tmp_path / SHARD).manifest
    assert len(manifest.files) == len(manifest.identities) == 3
    assert stages_of(manifest)
    for name, ours in (("lm_head", "output"), ("model.norm", "output_norm")):
        assert bytes_of(tmp_path, f"{ours}.weight") == arrays_of()[f"{name}.weight"].tobytes()


def test_weight_files_of_a_model_that_pipo_does_not_run(tmp_path: Path) -> None:
    write_folder(tmp_path, model_type="bert")
    found = open_weight_files(tmp_path)
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert [type_.name for type_ in found.matrix_types] == ["F32"]


def test_no_config(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"is a folder without a model's config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"a safetensors file without a model's config\.json"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_no_weights(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(ModelNotFound, match=r"has neither model\.safetensors nor .*consolidated\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_gguf_beside_a_config_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"name a file in it: tiny\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"whatever"])
def test_pickles_are_never_read(name: str, start: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(start + bytes(100))
    with pytest.raises(UnsupportedModel, match="pickled weights are never read"):
        open_checkpoint(tmp_path)


def test_pickles_beside_safetensors_do_not_matter(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert open_checkpoint(tmp_path)


# Shards


def test_missing_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / SHARD).unlink()
    with pytest.raises(ModelNotFound, match=f"1 of its 3 shards are missing: {SHARD}"):
        open_checkpoint(tmp_path)


def test_a_truncated_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    os.truncate(tmp_path / SHARD, (tmp_path / SHARD).stat().st_size - 1)
    with pytest.raises(MalformedFile, match=f"{SHARD}: ends at byte"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path, header_only=True)
    assert not ModelFile(tmp_path, header_only=True).has_weights


def test_a_shard_of_another_model(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / SHARD).write_bytes(file_with({"model.layers.9.mlp.up_proj.weight": np.zeros((4, 4), np.float32)}))
    with pytest.raises(
        MalformedFile, match=f"{SHARD}: lacks .*, which model.safetensors.index.json puts there"
    ) as found:
        open_checkpoint(tmp_path)
    assert "of another model" in str(found.value)


def test_swapped_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    other = tmp_path / SHARD.replace("00002-of", "00003-of")
    (tmp_path / SHARD).rename(tmp_path / "aside")
    other.rename(tmp_path / SHARD)
    (tmp_path / "aside").rename(other)
    with pytest.raises(MalformedFile, match="lacks"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    where = weight_map_of(tmp_path)
    left_out = next(name for name, shard in where.items() if shard == SHARD)
    write_index(tmp_path, {name: shard for name, shard in where.items() if name != left_out})
    with pytest.raises(MalformedFile, match=f"{SHARD}: holds {left_out}, which .* does not put there"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "/etc/passwd", "/model.safetensors", "a/b.safetensors", "..", "", "model.bin",
        ".safetensors", "a\\b.safetensors", "a\0.safetensors", "./model.safetensors", 3, None, ["model.safetensors"],
    ],
)  # fmt: skip
def test_an_index_that_names_files_outside(name: object, tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, weight_map_of(tmp_path) | {"lm_head.weight": name})
    with pytest.raises(MalformedFile, match=r"puts 'lm_head.weight' into .*, wanted the name of a \.safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map(weight_map: object, tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(MalformedFile, match="has no 'weight_map'"):
        open_checkpoint(tmp_path)


# Links


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder, outside = write_folder(tmp_path / "folder"), tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(MalformedFile, match=f"{name}: leads out of the folder, to {outside}"):
        open_checkpoint(folder)


def test_a_link_within_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    (folder / "model.safetensors").rename(folder / "real")
    (folder / "model.safetensors").symlink_to("real")
    assert open_checkpoint(folder)


def test_a_link_to_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    (tmp_path / "link").symlink_to(folder)
    assert open_checkpoint(tmp_path / "link").manifest.name == "link"


@pytest.mark.parametrize("blobs", ["../../blobs", "../../../blobs/01"])
@pytest.mark.parametrize("links_to_links", [False, True])
def test_a_cache_of_the_hub(links_to_links: bool, blobs: str, tmp_path: Path) -> None:
    """Files there are links to blobs, of the repository or of all; nothing else outside is followed."""
    home = tmp_path / "models--some--model"
    folder = write_sharded(home / "snapshots" / "0123abc")
    (folder / blobs).mkdir(parents=True)
    for idx, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / blobs / f"blob{idx}")
        path.symlink_to(f"{blobs}/blob{idx}")
    if links_to_links:
        (tmp_path / "here").symlink_to(folder)
        folder = tmp_path / "here"
    opened = open_checkpoint(folder)
    assert stages_of(opened.manifest) and len(opened.manifest.files) == 3
    if not links_to_links:
        assert opened.manifest.name == "some/model"
    shutil.copy(folder / SHARD, tmp_path / "elsewhere")
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MalformedFile, match="leads out of the folder"):
        open_checkpoint(folder)


# Tensors


def changed(name: str, array: np.ndarray | None) -> dict[str, np.ndarray]:
    arrays = arrays_of()
    arrays.pop(name, None)
    return arrays if array is None else arrays | {name: array}


ZEROS = np.zeros((8, 32), np.float32)
WRONG = {
    "a shape that disagrees with config.json": (
        changed("model.layers.0.mlp.up_proj.weight", ZEROS),
        MalformedFile,
        r"ffn_up.weight has shape \(32, 8\), wanted \(32, 64\)",
    ),
    "a tensor that is missing": (
        changed("model.layers.0.mlp.up_proj.weight", None),
        MalformedFile,
        "ffn_up.weight is missing",
    ),
    "no head": (
        changed("lm_head.weight", None),
        MalformedFile,
        "'lm_head.weight' is missing, and config.json does not",
    ),
    "a tensor nobody knows": (
        changed("model.layers.0.mlp.extra.weight", ZEROS),
        UnsupportedModel,
        "has tensors pipo does not run: model.layers.0.mlp.extra.weight",
    ),
    "a block too many": (changed("model.layers.1.mlp.up_proj.weight", ZEROS), UnsupportedModel, "blk.1.ffn_up.weight"),
    "a block with no number": (changed("model.layers.x.mlp.up_proj.weight", ZEROS), UnsupportedModel, "layers.x.mlp"),
    "a bias that config.json does not name": (
        changed("model.layers.0.self_attn.q_proj.bias", np.zeros(32, np.float32)),
        MalformedFile,
        "blk.0.attn_q has a bias, config.json says none",
    ),
    "quantised weights": (
        changed("model.layers.0.mlp.up_proj.qweight", ZEROS),
        UnsupportedModel,
        "has quantised weights .*up_proj.qweight",
    ),
    "integers": (
        changed("model.layers.0.mlp.up_proj.weight", np.zeros((64, 32), np.int8)),
        UnsupportedModel,
        "ffn_up.weight is I8, wanted BF16, F16 or F32",
    ),
    "doubles": (
        changed("model.norm.weight", np.zeros(32, np.float64)),
        UnsupportedModel,
        "output_norm.weight is F64, wanted BF16, F16 or F32",
    ),
    "bytes": (
        changed("model.norm.weight", np.zeros(32, np.uint8)),
        UnsupportedModel,
        "'model.norm.weight' is U8, which pipo does not compute with",
    ),
    "two tensors for one": (
        changed("model.layers.0.block_sparse_moe.gate.weight", ZEROS) | {"model.layers.0.mlp.gate.weight": ZEROS},
        MalformedFile,
        "is a second tensor for blk.0.ffn_gate_inp.weight",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(case: str, tmp_path: Path) -> None:
    arrays, error, message = WRONG[case]
    write_folder(tmp_path, arrays)
    with pytest.raises(error, match=message):
        stages_of(open_checkpoint(tmp_path).manifest)


def test_a_table_of_frequencies_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, changed("model.layers.0.self_attn.rotary_emb.inv_freq", np.zeros(4, np.float32)))
    assert stages_of(open_checkpoint(tmp_path).manifest)


def test_a_tied_head_in_the_file_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, tie_word_embeddings=True)
    assert "output.weight" not in open_checkpoint(tmp_path).manifest.tensors


def test_a_missing_bias(tmp_path: Path) -> None:
    write_folder(tmp_path, attention_bias=True)
    with pytest.raises(MalformedFile, match=r"blk\.0\.attn_k lacks the bias that it should have"):
        open_checkpoint(tmp_path)


def test_config_of_another_size(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_config(tmp_path, num_hidden_layers=2)
    with pytest.raises(MalformedFile, match=r"blk\.1\.attn_q\.weight is missing"):
        stages_of(open_checkpoint(tmp_path).manifest)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "absent"])
def test_paths_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_checkpoint(tmp_path / name)


def test_a_folder_that_is_closed_to_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ModelNotFound, match=r"config\.json: cannot be opened: .*Permission denied"):
        open_checkpoint(tmp_path)


def test_a_link_in_a_circle(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(ModelNotFound, match="has neither"):
        open_checkpoint(tmp_path)
