"""A model's header without its weights: enough to plan with, and refused by what runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo.base.config import EngineConfig
from pipo.base.errors import MalformedFile, UsageError
from pipo.engine import Engine
from pipo.formats.gguf import open_gguf
from pipo.model_file import ModelFile
from tests.support.header_only import Header, sparse, write_header

SMALL = Header(2, 64, 96, 4, 2, 300, 256)


def test_the_length_is_checked_unless_the_header_is_all_that_is_wanted(tmp_path: Path) -> None:
    path = write_header(tmp_path, SMALL)
    with pytest.raises(MalformedFile, match="the file ends at"):
        open_gguf(path)
    assert len(open_gguf(path, header_only=True).tensors) == len(SMALL.shapes)


def test_a_header_that_is_cut_itself_is_refused(tmp_path: Path) -> None:
    path = write_header(tmp_path, SMALL)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(MalformedFile, match="incomplete"):
        open_gguf(path, header_only=True)


def test_no_engine_takes_a_header(tmp_path: Path) -> None:
    model = ModelFile(write_header(tmp_path, SMALL), header_only=True)
    with pytest.raises(UsageError, match="header alone"):
        Engine(model, EngineConfig())


def test_weights_are_there_or_not(tmp_path: Path, smollm2_path: Path) -> None:
    cut = write_header(tmp_path, SMALL)
    assert not ModelFile(cut, header_only=True).has_weights
    assert not ModelFile(sparse(cut, 1 << 20), header_only=True).has_weights
    assert ModelFile(smollm2_path, header_only=True).has_weights
