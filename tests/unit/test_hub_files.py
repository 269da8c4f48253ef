"""Names of the hub, and which of a repository's files make the model that is meant."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.base.errors import MalformedFile, ModelNotFound, PipoError
from pipo.store.hub_files import (
    RepoFile,
    choose_variant,
    has_safetensors,
    is_plain,
    refuse_unusable,
    safetensors_set,
    shard_names,
    variants_of,
)
from pipo.store.hub_name import HubName

NAME = HubName("org/name")


def files(*paths: str) -> list[RepoFile]:
    return [RepoFile(path, 1000 + len(path)) for path in paths]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", NAME),
        ("org/name:Q4_K_M", HubName("org/name", "Q4_K_M")),
        ("a/b:sub/File-1.gguf", HubName("a/b", "sub/File-1.gguf")),
        ("Qwen/Qwen2.5-0.5B-Instruct-GGUF", HubName("Qwen/Qwen2.5-0.5B-Instruct-GGUF")),
        ("org/name.gguf", None),
        ("models/x.safetensors", None),
        ("name", None),
        ("name:Q4_0", None),
        ("./name", None),
        ("../name", None),
        ("/abs/name", None),
        ("a/b/c", None),
        ("a/b:", None),
        ("a--b/c", None),
        ("a/.b", None),
        ("a/b\n", None),
        ("a/" + "b" * 100, None),
        ("a/b:Q4\n", None),
    ],
)
def test_what_is_a_name(text: str, name: HubName | None) -> None:
    assert HubName.parse(text) == name


@given(st.text())
def test_a_name_says_itself(text: str) -> None:
    name = HubName.parse(text)
    assert name is None or (str(name) == text and name.repo.count("/") == 1 and ".." not in name.repo)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("Model-7B-Q4_K_M.gguf", "Q4_K_M"),
        ("model-7b.q4_0.gguf", "Q4_0"),
        ("model_q8_0.gguf", "Q8_0"),
        ("model-iq2_xxs.gguf", "IQ2_XXS"),
        ("Model-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Model-Q4_K_M_imat.gguf", "Q4_K_M"),
        ("Model-bf16.gguf", "BF16"),
        ("Model-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("Q5_K_S/model.gguf", "Q5_K_S"),
        ("Qwen3-4B-MXFP4.gguf", "MXFP4"),
        ("tiny.gguf", "tiny"),
        ("a/..gguf", "a"),
        ("Model-2Q4_0x.gguf", "Model-2Q4_0x"),
    ],
)
def test_the_quantisation_a_name_tells(path: str, label: str) -> None:
    (variant,) = variants_of(files(path))
    assert variant.label == label and variant.is_complete


def test_shards_are_one_model_in_order() -> None:
    paths = [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (3, 1, 2)]
    (variant,) = variants_of(files(*paths, "README.md", "mmproj-m-f16.gguf", "m-imatrix.gguf"))
    assert [file.path for file in variant.files] == sorted(paths)
    assert variant.is_complete and variant.label == "Q8_0"
    (partly,) = variants_of(files(*paths[:2]))
    assert not partly.is_complete


@pytest.mark.parametrize(
    ("quant", "found"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("q8_0", "m-Q8_0.gguf"),
        (None, "m-Q4_K_M.gguf"),
        ("m-Q8_0.gguf", "m-Q8_0.gguf"),
        ("m-q8_0", "m-Q8_0.gguf"),
        ("Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
    ],
)
def test_choice(quant: str | None, found: str) -> None:
    there = variants_of(files("m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_0.gguf", "m-UD-Q4_K_XL.gguf", "m-Q2_K.gguf"))
    assert choose_variant(there, HubName("org/name", quant)).files[0].path == found


def test_the_order_where_none_is_named() -> None:
    names = ["m-Q4_K_M.gguf", "m-Q4_0.gguf", "m-Q4_K_S.gguf", "m-IQ4_XS.gguf"]
    while names:
        there = variants_of(files(*names, "m-F16.gguf", "m-Q2_K.gguf"))
        assert choose_variant(there, NAME).files[0].path == names.pop(0)
    assert choose_variant(variants_of(files("only-F16.gguf")), NAME).label == "F16"


@pytest.mark.parametrize(
    ("paths", "quant", "message", "hint"),
    [
        (["m-Q2_K.gguf", "m-F16.gguf"], None, r"there are F16 1010 B, Q2_K 1011 B", "name one: org/name:F16"),
        (["m-Q2_K.gguf"], "Q4_0", r"has no 'Q4_0'; there is Q2_K 1011 B", "name one: org/name:Q2_K"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0", "may be any of a-Q4_0.gguf, b-Q4_0.gguf", "org/name:a-Q4_0.gguf"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], None, "may be any of", "name the file"),
    ],
)
def test_no_choice(paths: list[str], quant: str | None, message: str, hint: str) -> None:
    with pytest.raises(ModelNotFound, match=message) as caught:
        choose_variant(variants_of(files(*paths)), HubName("org/name", quant))
    assert caught.value.hint is not None and hint in caught.value.hint


def index_of(*names: object) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


def test_a_set_of_safetensors_is_config_tokenizer_and_weights() -> None:
    small = ["config.json", "tokenizer.json", "chat_template.jinja"]
    others = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "vocab.txt"]
    there = files(*small, *others, "model.safetensors")
    assert has_safetensors(there)
    assert {file.path for file in safetensors_set(there, None)} == {*small, "model.safetensors"}
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    there = files(*small, *others, *shards, "model.safetensors.index.json")
    found = {file.path for file in safetensors_set(there, index_of(*shards, shards[0]))}
    assert found == {*small, *shards, "model.safetensors.index.json"}
    with pytest.raises(ModelNotFound, match="names weights that are not there: model-00002-of-00002"):
        safetensors_set(files(*small, shards[0], "model.safetensors.index.json"), index_of(*shards))


@pytest.mark.parametrize(
    "index",
    [
        b"", b"{", b"[]", b"null", b'{"weight_map": {}}', b'{"weight_map": 3}', b'{"weight_map": {"a": ["b"]}}',
        b"[" * 100_000, index_of("../x.safetensors"), index_of("/x.safetensors"), index_of("a/b.safetensors"),
        index_of("pytorch_model.bin"), index_of(3), index_of("a\\b.safetensors"), b"\xff\xfe",
    ],
)  # fmt: skip
def test_an_index_that_is_none(index: bytes) -> None:
    with pytest.raises(MalformedFile, match=r"model\.safetensors\.index\.json"):
        shard_names(index)


def test_pickles_are_never_read() -> None:
    error = refuse_unusable(NAME, files("config.json", "pytorch_model.bin", "x.pt"))
    assert "pickled weights are never read" in error.message and "pytorch_model.bin" in error.message
    assert not has_safetensors(files("config.json", "pytorch_model.bin"))
    assert "neither a GGUF file" in refuse_unusable(NAME, files("README.md")).message


@pytest.mark.parametrize("path", ["../a", "a/../b", "/a", "a//b", "", "a\\b", "C:a", "a\nb", ".", "a/."])
def test_paths_that_would_not_stay(path: str) -> None:
    assert not is_plain(path)
    assert is_plain("a/b-1.gguf")


@given(st.lists(st.text(max_size=40).map(lambda text: text + ".gguf"), max_size=8), st.text(max_size=10))
def test_any_listing_gives_a_choice_or_an_error(paths: list[str], quant: str) -> None:
    there = variants_of([RepoFile(path, 1) for path in paths if is_plain(path)])
    try:
        assert choose_variant(there, HubName("org/name", quant or None)) in there
    except PipoError as error:
        assert error.message
