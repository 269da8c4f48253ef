"""compute.ggml: where libggml comes from, and which libraries are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipo.base.errors import LibraryError
from pipo.base.tensor_type import TensorType
from pipo.compute import ggml
from pipo.compute.ggml import ENV_FOLDER, Library, Provider, find_providers


def test_folder_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path / "gone"))
    with pytest.raises(LibraryError, match="gone is not a folder") as refused:
        find_providers()
    assert refused.value.hint is not None


def test_folder_without_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path))
    (provider,) = find_providers()
    assert provider == Provider(ENV_FOLDER, tmp_path)
    with pytest.raises(LibraryError, match=f"cannot load {tmp_path}.*from {ENV_FOLDER}"):
        Library(provider)


def test_file_that_is_no_library(lib: Library, tmp_path: Path) -> None:
    for path in lib.provider.folder.glob("*ggml*"):
        (tmp_path / path.name).write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="cannot load"):
        Library(Provider("broken", tmp_path))


def test_folder_comes_before_packages(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_providers()
    assert found and all((provider.folder).is_dir() for provider in found)
    monkeypatch.setenv(ENV_FOLDER, str(lib.provider.folder))
    (named,) = find_providers()
    assert Library(named).version_text == lib.version_text


def test_no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_providers", list)
    with pytest.raises(LibraryError, match="no libggml found"):
        ggml.load.__wrapped__()


@pytest.mark.parametrize("version", [b"0.14.9", b"0.9.4-dirty", b"0", b"unknown"])
def test_version_that_is_too_old(lib: Library, monkeypatch: pytest.MonkeyPatch, version: bytes) -> None:
    function = Library._function

    def of_another_version(self: Library, name: str, *rest: Any) -> object:
        return (lambda: version) if name == "ggml_version" else function(self, name, *rest)

    monkeypatch.setattr(Library, "_function", of_another_version)
    with pytest.raises(LibraryError, match=r"too old: 0\.15 or newer"):
        Library(lib.provider)


def test_function_that_is_missing(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ggml._SIGNATURES, "ggml_of_tomorrow", (None,))
    with pytest.raises(LibraryError, match=r"lacks ggml_of_tomorrow"):
        Library(lib.provider)


def test_function_that_has_no_signature(lib: Library) -> None:
    with pytest.raises(AttributeError, match="ggml_of_tomorrow has no signature"):
        lib.of_tomorrow()


def test_type_sizes_that_differ(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorType, "block_bytes", property(lambda self: 18))
    with pytest.raises(LibraryError, match="sizes F32 as"):
        Library(lib.provider)


def test_layout_that_differs(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml.GgmlTensor, "view_offs", ggml.GgmlTensor.data)
    with pytest.raises(LibraryError, match="lays ggml_tensor out"):
        Library(lib.provider)


def test_type_sizes_are_those_of_the_library(lib: Library) -> None:
    known = [type_ for type_ in TensorType if lib.computes(type_)]
    assert len(known) >= 34
    for type_ in known:
        assert (lib.blck_size(type_), lib.type_size(type_)) == (type_.block_elems, type_.block_bytes)


def test_types_that_have_a_product(lib: Library) -> None:
    without = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
    assert {t.name for t in TensorType if lib.computes(t) and not lib.multiplies(t)} == without
