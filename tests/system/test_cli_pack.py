"""`pipo pack` and `pipo verify` as a user runs them: a real model, packed, killed, continued, run and verified."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from bench.page_cache import cached_bytes
from pipo.base.page_cache import forget_cached
from pipo.base.units import MIB
from tests.support.cgroup import memory_group
from tests.support.command_line import CommandLine
from tests.support.hf_bytes import write_folder
from tests.support.outside_memory import peak_bytes

SLACK_BYTES = 48 * MIB  # the kernel charges page tables and the file pages of libraries too


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_packed_verified_and_run(pipo: CommandLine, tmp_path: Path, type: str) -> None:
    out = str(tmp_path / "out.gguf")
    packed = pipo("pack", "smollm2", "--type", type, "-o", out)
    assert (packed.code, packed.out) == (0, f"{out}\n")
    assert "210 tensors are quantised already (Q4_1)" in packed.err
    assert "bits per weight" in packed.err and "peak" in packed.err
    verified = pipo("verify", out)
    assert verified.code == 0 and verified.out.startswith("intact: 272 tensors")
    answered = pipo("run", out, "Name the capital of France.", "--temp", "0", "-n", "12", "--ram", "300MB")
    assert answered.code == 0 and "Paris" in answered.out
    streamed = pipo("run", out, "Name the capital of France.", "--temp", "0", "-n", "12", "--ram", "110MB")
    assert streamed.out == answered.out


def test_json_says_what_was_done(pipo: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    found = pipo("pack", "smollm2", "--type", "q4_k", "-o", str(out), "--json", "-q").json
    assert found["bytes"] == out.stat().st_size
    assert found["source_bytes"] == 96576768
    assert 5 < found["bits_per_weight"] < 6.5
    assert {f["type"] for f in found["fallbacks"]} == {"Q5_0", "Q8_0"}
    assert found["requantised_tensors"] == 210
    assert 0 < found["peak_bytes"] < found["limit_bytes"]
    verdict = pipo("verify", str(out), "--json").json
    assert verdict["status"] == "intact" and verdict["damage"] is None


def test_the_smallest_budget_is_named_and_kept(pipo: CommandLine, smollm2_path: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.gguf")
    refused = pipo("pack", "smollm2", "--type", "q8_0", "-o", out, "--ram", "10MB")
    assert refused.code == 2 and "of RAM at least, the limit is 9.5 MiB" in refused.err
    smallest = refused.err.rpartition("the smallest --ram that works is ")[2].strip()
    with smollm2_path.open("rb") as stream:
        forget_cached(stream.fileno(), 0, smollm2_path.stat().st_size)
    process = pipo.start("pack", "smollm2", "--type", "q8_0", "-o", out, "--ram", smallest, "--json")
    peak = peak_bytes(process)
    told, err = process.communicate()
    assert process.returncode == 0, err
    assert 0 < peak <= json.loads(told)["limit_bytes"]
    for path in (Path(out), smollm2_path):
        assert cached_bytes(path) < 8 << 20


def test_a_native_layout_lies_beside(pipo: CommandLine, tmp_path: Path) -> None:
    """Of SmolLM2 only `ffn_down` has rows for Q4_K."""
    out, beside = tmp_path / "out.gguf", tmp_path / "out.gguf.native"
    packed = pipo("pack", "smollm2", "--type", "q4_k", "--layout", "native", "-o", str(out))
    if "nothing to gain" in packed.err:
        pytest.skip("this CPU has no repacked kernels for Q4_K")
    assert (packed.code, packed.out) == (0, f"{out}\n{beside}\n")
    question = ("run", str(out), "Name the capital of France.", "--temp", "0", "-n", "12", "--ram", "110MB")
    answered = pipo(*question, "--layout", "native")
    assert answered.code == 0 and "repacked Q4_K weights from out.gguf.native" in answered.err
    assert "Paris" in answered.out
    again = pipo("pack", str(out), "--layout", "native")
    assert again.code == 2 and "is there already, and right for this CPU" in again.err
    assert pipo("verify", str(out)).out.count("intact") == 2
    with beside.open("r+b") as stream:
        stream.seek(beside.stat().st_size - 9000)
        stream.write(b"wrong")
    damaged = pipo("verify", str(out))
    assert damaged.code == 1 and f"{beside}: blk." in damaged.err
    assert pipo("pack", str(out), "--layout", "native", "--overwrite").code == 0
    assert pipo("verify", str(out), "--json").json["native"]["status"] == "intact"


def test_both_layouts_are_one_document(pipo: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = pipo("pack", "smollm2", "--type", "q4_k", "--layout", "native", "-o", str(out), "--json", "-q")
    if "nothing to gain" in done.err:
        pytest.skip("this CPU has no repacked kernels for Q4_K")
    assert done.json["path"] == str(out) and done.json["native"]["path"] == f"{out}.native"


def test_verify_says_that_a_folder_is_none_of_its_files(pipo: CommandLine, tmp_path: Path) -> None:
    refused = pipo("verify", str(write_folder(tmp_path / "m")))
    assert refused.code == 1 and "is a Hugging Face folder; checksums are what `pipo pack` writes" in refused.err


def test_a_native_layout_that_was_ended_is_continued(pipo: CommandLine, tmp_path: Path) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.native"
    assert pipo("pack", "smollm2", "--type", "q4_k", "-o", str(out)).code == 0
    command, beside = ("pack", str(out), "--layout", "native", "--json", "-q"), Path(f"{out}.native")
    if "nothing to gain" in pipo(*command).err:
        pytest.skip("this CPU has no repacked kernels for Q4_K")
    beside.rename(whole)
    process, journal = pipo.start(*command), Path(f"{beside}.part.journal")
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -9, "it was done before it could be ended"
    assert not beside.exists()
    assert pipo(*command).json["resumed_tensors"] >= 1
    assert beside.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layout", "native", "-o", "x.gguf"), "-o names a file of another type"),
        (("--type", "q4_k", "--layout", "odd"), "--layout 'odd' is not known"),
        (("--layout", "native"), "there is nothing to gain"),
        (("--type", "q4_0", "--layout", "native", "-o", "never.gguf"), "there is nothing to gain"),
    ],
)
def test_layouts_that_are_refused(pipo: CommandLine, arguments: tuple[str, ...], words: str) -> None:
    """SmolLM2 is Q4_1, which has no repacked kernels."""
    refused = pipo("pack", "smollm2", *arguments)
    assert refused.code in (1, 2) and words in refused.err
    assert not Path("never.gguf").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_it_goes_on_with_the_same_command(
    pipo: CommandLine, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    command = ("pack", "smollm2", "--type", "q4_k", "--json", "-q", "-o")
    assert pipo(*command, str(whole)).code == 0
    process, journal = pipo.start(*command, str(out)), Path(f"{out}.part.journal")
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 40):
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code, "it was done before it could be ended"
    assert not out.exists()
    assert pipo(*command, str(out)).json["resumed_tensors"] >= 40
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_what_would_be_overwritten_is_not(pipo: CommandLine, smollm2_path: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out.gguf", str(smollm2_path)
    out.write_text("mine")
    for arguments, said in (
        (("smollm2", "--type", "q8_0", "-o", str(out)), "is there already"),
        (("smollm2", "--type", "q8_0", "-o", str(tmp_path)), "is a folder"),
        (("smollm2", "--type", "q8_0", "-o", "/dev/null", "--overwrite"), "is not a regular file"),
        (("smollm2", "--type", "q8_0", "-o", str(out / "below.gguf")), "Not a directory"),
        ((model, "--type", "q8_0", "-o", model, "--overwrite"), "is the model itself"),
        (("smollm2", "--type", "iq1_s", "-o", str(out)), "'iq1_s' is not a type to pack to"),
        (("smollm2", "-o", str(out)), "which type?"),
    ):
        refused = pipo("pack", *arguments)
        assert (refused.code, refused.out) == (2, ""), refused.err
        assert said in refused.err
    assert out.read_text() == "mine"
    assert pipo("pack", "smollm2", "--type", "f16", "-o", str(out), "--overwrite", "-q").code == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_a_folder_that_is_not_there(pipo: CommandLine, tmp_path: Path) -> None:
    refused = pipo("pack", "smollm2", "--type", "q8_0", "-o", str(tmp_path / "none" / "out.gguf"))
    assert (refused.code, refused.out) == (1, "")
    assert "cannot write" in refused.err and "No such file or directory" in refused.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cgroup
def test_in_a_control_group_it_needs_no_more_than_it_says(smollm2_path: Path, tmp_path: Path) -> None:
    """Buffers of the kernel included: what is read and written stays out of the page cache."""
    with memory_group(64 * MIB + SLACK_BYTES) as group:
        command = ["pack", str(smollm2_path), "--type", "q4_0", "-o", str(tmp_path / "out.gguf"), "--ram", "64MiB"]
        child = group.run([sys.executable, "-m", "pipo", *command])
        child.communicate(timeout=60)
        assert child.returncode == 0
        assert group.stat("cache") < 32 * MIB


def test_verify_tells_damaged_from_unchecked(pipo: CommandLine, tmp_path: Path) -> None:
    unchecked = pipo("verify", "smollm2")
    assert (unchecked.code, unchecked.out) == (3, "")
    assert "has no checksums to compare with" in unchecked.err
    assert pipo("verify", "smollm2", "--json").json["status"] == "unchecked"
    out = tmp_path / "out.gguf"
    assert pipo("pack", "smollm2", "--type", "q4_0", "-o", str(out), "-q").code == 0
    with out.open("r+b") as stream:
        stream.seek(-1_000_000, 2)
        stream.write(b"\0\1\2\3")
    damaged = pipo("verify", str(out))
    assert (damaged.code, damaged.out) == (1, "")
    assert "blk.29.ffn_" in damaged.err or "token_embd" in damaged.err
    assert all(word in damaged.err for word in ("at offset", "wanted", "found", "is damaged"))
    verdict = pipo("verify", str(out), "--json").json
    assert verdict["status"] == "damaged" and verdict["damage"]["wanted"] != verdict["damage"]["found"]
    out.write_bytes(out.read_bytes()[:-500_000])
    cut = pipo("verify", str(out))
    assert cut.code == 1 and "the file ends at" in cut.err
