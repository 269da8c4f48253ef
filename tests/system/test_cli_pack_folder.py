"""`pipo pack FOLDER` as a user runs it: packed, verified, run, refused, within its budget."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from pipo.base.units import MIB
from pipo.cli.pack import default_name
from pipo.formats.checkpoint import open_checkpoint
from pipo.formats.gguf import open_gguf
from tests.support.cgroup import memory_group
from tests.support.command_line import CommandLine
from tests.support.hf_bytes import SHAPES, VOCAB, arrays_of, write_folder
from tests.support.hf_folders import edit_json, save_folder, unigram_engine
from tests.support.tiny_models import SPECS, make_model
from tests.support.tokenizer_files import qwen_like, smollm2_json

ASKED = ("a b c", "--temp", "0", "-n", "12", "--ignore-eos", "--json")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SLACK_BYTES = 48 * MIB  # the kernel charges page tables and the file pages of libraries too


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries and keys in halves, a chat template, shards."""
    path = tmp_path_factory.mktemp("folder") / "tiny-F16"
    save_folder(make_model(SPECS["llama-bias"]), path, max_shard_size="60KB")
    edit_json(path / "tokenizer_config.json", chat_template=TEMPLATE)
    return path


@pytest.mark.parametrize("named", ["", "config.json", "model.safetensors.index.json"])
def test_packed_verified_and_run(pipo: CommandLine, folder: Path, tmp_path: Path, named: str) -> None:
    out = str(tmp_path / "out.gguf")
    packed = pipo("pack", str(folder / named), "--type", "f32", "-o", out)
    assert (packed.code, packed.out) == (0, f"{out}\n"), packed.err
    assert "warning" not in packed.err and "32.00 bits per weight" in packed.err
    assert pipo("verify", out).out.startswith("intact: 35 tensors")
    ours, theirs = pipo("run", out, *ASKED), pipo("run", str(folder), *ASKED)
    assert ours.code == theirs.code == 0, ours.err + theirs.err
    assert ours.json["text"] == theirs.json["text"] and ours.json["usage"] == theirs.json["usage"]


def test_the_name_of_the_file_is_that_of_the_model(folder: Path, tmp_path: Path) -> None:
    assert default_name(open_checkpoint(folder).manifest, "Q8_0") == "tiny.Q8_0.gguf"
    cached = write_folder(tmp_path / "models--Some--Thing-bf16" / "snapshots" / "0123456789abcdef")
    assert default_name(open_checkpoint(cached).manifest, "Q8_0") == "Thing.Q8_0.gguf"


def test_json(pipo: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    found = pipo("pack", str(folder), "--type", "q8_0", "-o", str(out), "--json", "-q").json
    assert found["bytes"] == out.stat().st_size and found["resumed_tensors"] == 0
    assert found["requantised_tensors"] == 0 and found["bytes_by_type"].keys() == {"Q8_0", "F32"}


def large_folder(home: Path, smollm2_path: Path) -> Path:
    """A vocabulary of 49152 tokens, and heads of a size that is read in parts."""
    sizes = {VOCAB: 49152, 32: 256, 64: 512, 16: 128}
    shapes = {name: tuple(sizes[n] for n in shape) for name, shape in SHAPES.items()}
    path = write_folder(home / "large", arrays_of(shapes), vocab_size=49152, hidden_size=256, intermediate_size=512)
    (path / "tokenizer.json").write_text(smollm2_json(open_gguf(smollm2_path).metadata))
    return path


def test_the_smallest_budget_is_named_and_kept(pipo: CommandLine, smollm2_path: Path, tmp_path: Path) -> None:
    folder, out = large_folder(tmp_path, smollm2_path), str(tmp_path / "out.gguf")
    limit, told = "10MB", ""
    for _ in range(4):  # building the tokenizer is refused before there is a plan
        packed = pipo("pack", str(folder), "--type", "q8_0", "-o", out, "--ram", limit, "--json")
        if packed.code == 0:
            break
        assert packed.code == 2 and "of RAM at least, the limit is" in packed.err and "Traceback" not in packed.err
        limit, told = packed.err.rpartition("the smallest --ram that ")[2].split()[-1], packed.err
    assert packed.code == 0 and "building a tokenizer of 49152 tokens takes" in told
    assert 0 < packed.json["peak_bytes"] <= packed.json["limit_bytes"]


def test_under_a_memory_limit_of_the_kernel(pipo: CommandLine, smollm2_path: Path, tmp_path: Path) -> None:
    folder, out = large_folder(tmp_path, smollm2_path), tmp_path / "out.gguf"
    with memory_group(140 * MIB + SLACK_BYTES) as group:
        command = ["pack", str(folder), "--type", "q4_0", "-o", str(out), "--ram", "140MiB"]
        child = group.run([sys.executable, "-m", "pipo", *command])
        child.communicate(timeout=60)
        assert child.returncode == 0
    assert pipo("verify", str(out)).code == 0


def test_interrupted_and_continued(pipo: CommandLine, smollm2_path: Path, tmp_path: Path) -> None:
    folder, out = large_folder(tmp_path, smollm2_path), tmp_path / "out.gguf"
    command = ("pack", str(folder), "--type", "f16", "-t", "1", "-o", str(out))
    process = pipo.start(*command)
    part = tmp_path / "out.gguf.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 28 * MIB):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert not out.exists()
    again = pipo(*command, "--json")
    assert again.code == 0 and out.exists() and not part.exists()
    assert again.json["resumed_tensors"] >= 4  # vectors and the embedding table
    assert pipo("verify", str(out)).code == 0


def test_what_is_lost_is_a_warning(pipo: CommandLine, folder: Path, tmp_path: Path) -> None:
    other = save_folder(make_model(SPECS["qwen2"]), tmp_path / "tiny")
    state = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(state | {"normalizer": {"type": "NFC"}}))
    packed = pipo("pack", str(other), "--type", "q8_0", "-o", str(tmp_path / "out.gguf"))
    assert packed.code == 0 and "warning: its tokenizer normalises text (NFC)" in packed.err


@pytest.mark.parametrize(
    ("engine", "said"),
    [(unigram_engine, "its tokenizer is Unigram"), (qwen_like, "the text 'anaïveb' has tokens")],
    ids=["unigram", "whole words"],
)
def test_a_tokenizer_that_no_gguf_has(pipo: CommandLine, engine: object, said: str, tmp_path: Path) -> None:
    made = engine()
    rows = made.get_vocab_size()
    shapes = {name: (rows, *shape[1:]) if shape[0] == VOCAB else shape for name, shape in SHAPES.items()}
    folder = write_folder(tmp_path / "tiny", arrays_of(shapes), vocab_size=rows)
    made.save(str(folder / "tokenizer.json"))
    refused = pipo("pack", str(folder), "--type", "q8_0", "-o", str(tmp_path / "out.gguf"))
    assert refused.code == 1 and said in refused.err and "Traceback" not in refused.err
    assert not list(tmp_path.glob("out.gguf*"))
