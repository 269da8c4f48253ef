"""Folders from strangers: whatever stands in a file, opening it ends in a model or a ModelError, soon."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.base.errors import MalformedFile, ModelError
from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.hf_families import FAMILIES
from pipo.formats.hf_text import HfText
from pipo.formats.json_object import MAX_VALUES, JsonSize, parse_object, read_object
from pipo.models.registry import stages_of
from pipo.text.hf_tokenizer import HfTokenizer
from tests.support.hf_bytes import CONFIG, weight_map_of, write_config, write_index, write_sharded

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus" / "folder"
FILES = (
    "config.json",
    "model.safetensors.index.json",
    "model-00001-of-00003.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("hostile") / "model")


def explore(folder: Path) -> None:
    opened = open_checkpoint(folder)
    stages_of(opened.manifest)
    assert isinstance(opened.metadata, HfText)
    HfTokenizer.from_files(opened.metadata)


def test_the_base_of_all_these_is_valid(folder: Path) -> None:
    explore(folder)


def test_what_fuzzing_found_once(folder: Path) -> None:
    for finding in CORPUS.glob("*/*.bin"):
        path = folder / finding.parent.name
        kept = path.read_bytes()
        path.write_bytes(finding.read_bytes())
        try:
            with pytest.raises(ModelError):
                explore(folder)
        finally:
            path.write_bytes(kept)


@st.composite
def mutated(draw: st.DrawFn, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(min(len(changed), 4000) - 1, 0)))
        part = bytes(changed[at : at + draw(st.integers(1, 40))])
        change = draw(st.sampled_from(("byte", "remove", "repeat", "insert", "cut")))
        if change == "cut":
            del changed[at:]
        else:
            new = {"byte": draw(st.binary(min_size=1, max_size=1)), "remove": b"", "repeat": part * 2}
            changed[at : at + len(part)] = new.get(change, draw(st.binary(max_size=9)) + part)
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=120, deadline=4000)
@given(data=st.data())
def test_mutations_parse_or_raise_a_model_error(folder: Path, name: str, data: st.DataObject) -> None:
    path = folder / name
    kept = path.read_bytes()
    try:
        path.write_bytes(data.draw(mutated(kept)))
        explore(folder)
    except ModelError:
        pass
    finally:
        path.write_bytes(kept)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
FIELDS = st.sampled_from(
    [*CONFIG, "head_dim", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window", "layer_types",
     "attention_bias", "mlp_bias", "quantization_config", "num_experts", "num_local_experts", "num_experts_per_tok",
     "moe_intermediate_size", "shared_expert_intermediate_size", "no_rope_layers", "query_pre_attn_scalar",
     "attn_logit_softcapping", "ffn_dim", "original_max_position_embeddings", "text_config"]
)  # fmt: skip


@settings(max_examples=300, deadline=4000)
@given(changes=st.dictionaries(FIELDS, JSON, max_size=4), family=st.sampled_from(sorted(FAMILIES)))
def test_any_config(folder: Path, changes: dict[str, Any], family: str) -> None:
    kept = (folder / "config.json").read_text()
    try:
        write_config(folder, **{"model_type": family, "architectures": [FAMILIES[family].class_name], **changes})
        explore(folder)
    except ModelError as error:
        assert len(str(error)) < 2000
    finally:
        (folder / "config.json").write_text(kept)


ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "yarn", "llama3", "longrope", "dynamic"]) | JSON,
        **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "mscale"), JSON),
        **dict.fromkeys(("original_max_position_embeddings", "short_factor", "long_factor", "rope_theta"), JSON),
    },
)


@settings(max_examples=200, deadline=4000)
@given(rope=ROPES, is_new=st.booleans())
def test_any_rope(folder: Path, rope: dict[str, Any], is_new: bool) -> None:
    kept = (folder / "config.json").read_text()
    try:
        write_config(folder, **{"rope_parameters" if is_new else "rope_scaling": rope})
        explore(folder)
    except ModelError:
        pass
    finally:
        (folder / "config.json").write_text(kept)


@settings(max_examples=150, deadline=4000)
@given(changes=st.dictionaries(st.text(max_size=5) | st.just("lm_head.weight"), JSON, max_size=3))
def test_any_index(folder: Path, changes: dict[str, Any]) -> None:
    kept = weight_map_of(folder)
    try:
        write_index(folder, kept | changes)
        explore(folder)
    except ModelError:
        pass
    finally:
        write_index(folder, kept)


# JSON


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"[]", "is JSON, but list in place of an object"),
        (b"3", "is JSON, but int"),
        (b"{", "is not JSON"),
        (b'{"a": NaN}', "is not JSON: NaN"),
        (b'{"a": Infinity}', "is not JSON: Infinity"),
        (b'{"a": 1, "a": 2}', "has 'a' twice"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 7"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON"),
        (b'{"a": [' + b"0," * MAX_VALUES + b"0]}", f"has {MAX_VALUES + 2} values, at most"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ],
    ids=range(11),
)
def test_objects_that_are_none(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(MalformedFile, match=message) as found:
        read_object(path)
    assert str(path) in str(found.value)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(MalformedFile, match="at most 100 B can be"):
        read_object(path, 100)


@settings(max_examples=200)
@given(table=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_what_is_written_is_read(table: dict[str, Any]) -> None:
    raw = json.dumps(table).encode()
    assert parse_object(raw, 1000) == json.loads(raw)


def test_a_size_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    raw = b'{"a": [1, 2], "b": "c:d,e"}' + b" " * (20 << 20)
    path.write_bytes(raw)
    tracemalloc.start()
    size = JsonSize.of(path, 32 << 20)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == JsonSize(len(raw), 3, 3, 1)
    assert peak_bytes < 4 << 20
