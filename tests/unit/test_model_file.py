"""A model is refused for what its header says before its tokenizer takes memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipo.base.errors import OverBudget, UnsupportedModel
from pipo.base.units import MIB
from pipo.formats.checkpoint import open_checkpoint
from pipo.model_file import ModelFile, tokenizer_build_bytes
from pipo.text.tokenizer import Tokenizer
from tests.support.vocabularies import byte_pair_metadata, write_model

NUM_TOKENS = 200_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary that takes over 50 MiB to build."""
    path = tmp_path_factory.mktemp("model") / "many-tokens.gguf"
    tokens = byte_pair_metadata().strings("tokenizer.ggml.tokens")
    tokens += [f"<t{i}>" for i in range(NUM_TOKENS - len(tokens))]
    write_model(path, byte_pair_metadata(tokens=tokens, token_type=None))
    return path


@pytest.fixture
def _never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "from_metadata", lambda metadata: pytest.fail("the tokenizer was built"))


@pytest.mark.usefixtures("_never_built")
def test_a_tokenizer_over_the_budget_is_refused_and_the_number_named_is_enough(path: Path) -> None:
    with pytest.raises(OverBudget, match=f"building a tokenizer of {NUM_TOKENS} tokens") as refused:
        ModelFile(path, 70 * MIB)
    assert refused.value.smallest_bytes is not None
    assert refused.value.hint and "smallest --ram" in refused.value.hint
    with pytest.raises(pytest.fail.Exception, match="was built"):
        ModelFile(path, refused.value.smallest_bytes)


@pytest.mark.usefixtures("_never_built")
def test_more_tokens_than_the_model_has_rows_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(path)
    object.__setattr__(checkpoint.manifest.hyper, "vocab_size", NUM_TOKENS - 1)
    monkeypatch.setattr("pipo.model_file.open_checkpoint", lambda path, check, header_only: checkpoint)
    monkeypatch.setattr("pipo.model_file.stages_of", lambda manifest: [])
    with pytest.raises(UnsupportedModel, match=f"the tokenizer has {NUM_TOKENS} tokens, the model {NUM_TOKENS - 1}"):
        ModelFile(path)


_CHILD = """
import sys
from pathlib import Path
from pipo.model_file import ModelFile
from pipo.hardware.memory import process_memory
Path("/proc/self/clear_refs").write_text("5")
before = process_memory().resident_bytes
ModelFile(Path(sys.argv[1]))
print(process_memory().peak_resident_bytes - before)
"""


@pytest.mark.parametrize("which", ["path", "smollm2_path"])
def test_building_takes_no_more_than_estimated(which: str, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(which)
    taken = subprocess.run([sys.executable, "-c", _CHILD, str(model)], check=True, capture_output=True, text=True)
    assert int(taken.stdout) <= tokenizer_build_bytes(open_checkpoint(model).metadata) + 4 * MIB
