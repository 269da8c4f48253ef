"""Settings and sizes from people: what is taken, and that the rest is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo.base.config import resolve_config
from pipo.base.errors import ModelNotFound, UsageError
from pipo.base.folders import cache_folder, config_folder
from pipo.base.units import parse_size
from pipo.store.library import resolve_model


def test_a_settings_file_need_not_exist(tmp_path: Path) -> None:
    assert resolve_config({}, {}, tmp_path / "none.toml") == resolve_config({}, {})


def test_a_settings_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b'ram = "4GB"  # gr\xfc\xdfe\n')
    with pytest.raises(UsageError, match=r"config\.toml: not UTF-8 text: byte 17 is 0xFC"):
        resolve_config({}, {}, file)


def test_a_settings_file_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        resolve_config({}, {}, tmp_path)


def test_a_settings_file_that_is_nested_too_deep(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("a = " + "[" * 100_000)
    with pytest.raises(UsageError, match="not valid TOML"):
        resolve_config({}, {}, file)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GB", "9" * 30, "9223372036854775808"])
def test_a_size_beyond_64_bits_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is more than any machine has") as caught:
        parse_size(text, what="--ram")
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("text", ["a" * 300, "a" * 300 + ".gguf", "./" + "a" * 300, "~" + "a" * 300])
def test_a_model_whose_name_no_path_can_have(text: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(text)
    assert len(caught.value.message) < 200 and caught.value.hint


def test_a_model_in_the_home_of_a_user_who_is_not_there() -> None:
    with pytest.raises(ModelNotFound, match="names no home folder"):
        resolve_model("~no-such-user/x.gguf")


@pytest.mark.parametrize("folder", [cache_folder, config_folder])
def test_a_user_without_a_home(folder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert callable(folder)
    with pytest.raises(UsageError, match="no home folder"):
        folder({"XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "relative"})
    absolute = {"XDG_CACHE_HOME": "/x", "XDG_CONFIG_HOME": "/x"}
    assert folder(absolute) == Path("/x/pipo")


def test_a_misspelt_environment_setting_is_refused() -> None:
    with pytest.raises(UsageError, match="environment: unknown setting 'PIPO_RAMM'") as caught:
        resolve_config({}, {"PIPO_RAMM": "1GB"})
    assert caught.value.hint is not None and "PIPO_RAM" in caught.value.hint.split(", ")


@pytest.mark.parametrize("name", ["PIPO_TRACE", "PIPO_MAX_OUTPUTS", "PIPO_", "PIPO_ram"])
def test_what_is_no_setting_is_refused_in_the_environment(name: str) -> None:
    with pytest.raises(UsageError, match="environment: unknown setting"):
        resolve_config({}, {name: "1"})


def test_the_environment_may_hold_what_others_read() -> None:
    environment = {"PIPO_GGML": "/x", "PIPO_TEST_MODEL": "/y", "HOME": "/z", "PIPO_THREADS": "3"}
    assert resolve_config({}, environment).threads == 3


@pytest.mark.parametrize("threads", [513, 20_000, 3_000_000_000])
def test_more_threads_than_ggml_takes_are_refused_wherever_they_stand(threads: int, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"threads = {threads}\n")
    for arguments, environment, given in (
        ({"threads": threads}, {}, None),
        ({}, {"PIPO_THREADS": str(threads)}, None),
        ({}, {}, file),
    ):
        with pytest.raises(UsageError, match=f"threads must be at most 512, found {threads}"):
            resolve_config(arguments, environment, given)
    assert resolve_config({"threads": 512}, {}).num_threads == 512
