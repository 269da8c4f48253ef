"""The verbs that compute nothing, and what is the same for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pipo as package
from pipo.base.errors import UsageError
from pipo.cli import app
from pipo.cli.flags import Call, OutputFlags
from tests.support.command_line import BINARY, CommandLine

VERBS = ("run", "chat", "pull", "list", "rm", "show", "plan", "doctor")
HEAVY = (
    "numpy",
    "tokenizers",
    "jinja2",
    "pipo.engine",
    "pipo.compute",
    "pipo.store.fetch",
    "huggingface_hub",
    "ssl",
    "asyncio",
)


def test_help_names_every_verb_and_flags_are_explained(pipo: CommandLine) -> None:
    ended = pipo("--help")
    assert ended.code == 0
    assert all(f" {verb} " in ended.out for verb in VERBS)
    flags = pipo("run", "--help", COLUMNS="200").out
    for flag in ("--ram", "--ctx-size", "--max-tokens", "--threads", "--temp", "--seed", "--stop", "--trace", "--raw"):
        assert flag in flags


def test_a_bare_pipo_shows_the_help(pipo: CommandLine) -> None:
    assert pipo().out == pipo("--help").out


def test_version(pipo: CommandLine) -> None:
    assert pipo("--version").out == f"pipo {package.__version__}\n"


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS)])
def test_help_imports_nothing_heavy(verb: tuple[str, ...]) -> None:
    code = f"""
import sys
sys.argv = ["pipo", *{verb!r}, "--help"]
from pipo.cli import main
try:
    main()
finally:
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nope",), "No such command 'nope'"),
        (("run", "smollm2", "hi", "--nope"), "No such option: --nope"),
        (("run", "smollm2", "hi", "--ram"), "--ram"),
        (("run",), "which model?"),
        (("show",), "which model?"),
        (("chat",), "which model?"),
        (("run", "smollm2", "tell", "me"), "one word too many: 'me'"),
        (("show", "a.gguf", "-m", "b.gguf"), "one word too many: 'a.gguf'"),
        (("run", "smollm2", "hi", "-c", "0"), "--ctx-size"),
        (("run", "smollm2", "hi", "-n", "0"), "--max-tokens"),
        (("run", "smollm2", "hi", "-n", "-3"), "--max-tokens"),
        (("run", "smollm2", "hi", "-t", "0"), "--threads"),
        (("run", "smollm2", "hi", "--prefill-chunk", "0"), "--prefill-chunk"),
        (("run", "smollm2", "hi", "--temp", "hot"), "--temp"),
        (("run", "smollm2", "hi", "--temp", "-1"), "temperature must be 0 or more"),
        (("run", "smollm2", "hi", "--top-p", "2"), "top_p must be from 0 to 1"),
        (("run", "smollm2", "hi", "--seed", "-1"), "seed must be 0 or more"),
        (("run", "smollm2", "hi", "--stop", ""), "stop must not hold an empty string"),
        (("run", "smollm2", "hi", "--schedule", "magic"), "one of pipelined, sequential, layer"),
        (("run", "smollm2", "hi", "--layout", "magic"), "one of auto, plain, repacked"),
        (("run", "smollm2", "hi", "--cache-type-k", "q3"), "one of f16, f32, q8_0, q4_0"),
        (("run", "smollm2", "hi", "--ram", "0"), "must be more than zero"),
        (("run", "smollm2", "hi", "--ram", "-4GB"), "is not a size"),
        (("run", "smollm2", "hi", "--ram", "much"), "is not a size"),
        (("run", "smollm2", "hi", "--ram", "120%"), "at most 100%"),
        (("run", "smollm2", "hi", "--logprobs", "2"), "--logprobs needs --json"),
        (("run", "smollm2", "hi", "--raw", "--system", "x"), "--system needs the chat template"),
        (("run", "smollm2", "hi", "--trace", "/no/such/folder/t.json"), "--trace /no/such/folder/t.json"),
        (("run", "smollm2", ""), "the prompt is empty"),
        (("run", "smollm2", " \n"), "the prompt is empty"),
        (("run", "smollm2", "--raw", ""), "the prompt is empty"),
    ],
)
def test_what_cannot_be_used_is_one_clear_message(pipo: CommandLine, arguments: tuple[str, ...], says: str) -> None:
    ended = pipo(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert says in ended.err
    assert "Traceback" not in ended.err


def test_a_setting_comes_from_argument_then_environment_then_file(pipo: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "pipo" / "config.toml"
    file.parent.mkdir()
    file.write_text('ram = "21MiB"\n')

    def limit(*arguments: str, **environment: str) -> str:
        ended = pipo("run", "smollm2", "hi", *arguments, XDG_CONFIG_HOME=str(tmp_path), **environment)
        assert ended.code == 2
        return ended.err.splitlines()[0]

    assert limit().endswith("the limit is 21.0 MiB")
    assert limit(PIPO_RAM="22MiB").endswith("the limit is 22.0 MiB")
    assert limit("--ram", "23MiB", PIPO_RAM="22MiB").endswith("the limit is 23.0 MiB")
    file.write_text('rma = "21MiB"\n')
    assert limit() == f"error: {file}: unknown setting 'rma'"
    file.unlink()
    assert limit(PIPO_THREADS="many").startswith("error: environment: threads = 'many'")


def test_list_shows_what_is_there(pipo: CommandLine) -> None:
    listed = pipo("list")
    assert listed.code == 0
    assert "smollm2" in listed.out
    found = pipo("list", "--json").json
    assert [model["name"] for model in found["models"]] == ["smollm2"]
    assert Path(found["models"][0]["path"]).is_file()


def test_list_names_what_can_be_fetched(pipo: CommandLine, tmp_path: Path) -> None:
    assert "pipo pull smollm2" in pipo("list", XDG_CACHE_HOME=str(tmp_path)).out
    missing = pipo("run", "smollm2", "hi", XDG_CACHE_HOME=str(tmp_path))
    assert missing.code == 1
    assert "hint: pipo pull smollm2" in missing.err


def test_pull_of_a_model_that_is_there_prints_its_path(pipo: CommandLine) -> None:
    ended = pipo("pull", "smollm2")
    assert ended.code == 0
    assert Path(ended.out.strip()).is_file()
    unknown = pipo("pull", "nope")
    assert (unknown.code, unknown.out) == (1, "")
    assert "known models: smollm2" in unknown.err


def test_show_accounts_for_every_byte(pipo: CommandLine) -> None:
    shown = pipo("show", "smollm2", "--json").json
    own = [part["bytes"] for part in shown["parts"].values() if part["shares"] is None]
    assert sum(own) == shown["bytes"] == sum(shown["bytes_by_type"].values())
    assert shown["parts"]["head"]["shares"] == "embedding"
    assert shown["has_chat_template"]
    assert shown["plan"] is None
    text = pipo("show", "smollm2").out
    assert "attention" in text and "has a template" in text


def test_show_with_ram_says_what_streams(pipo: CommandLine) -> None:
    plan = pipo("show", "smollm2", "--ram", "125MB", "-c", "300", "--json").json["plan"]
    assert plan["context_tokens"] == 300
    assert 0 < plan["streamed_bytes_per_pass"] < plan["weight_bytes"]
    assert sum(plan["breakdown_bytes"].values()) == plan["planned_bytes"] <= 125_000_000
    assert plan["smallest_bytes"] <= 125_000_000
    text = pipo("show", "smollm2", "--ram", "125MB", "-c", "300").out
    assert "stream from disk in every pass" in text
    assert f"--ram {plan['smallest_ram']}" in text
    assert pipo("show", "smollm2", "--ram", "1GB").out.count("nothing streams") == 1


def test_doctor_finds_library_drive_and_memory(pipo: CommandLine) -> None:
    ended = pipo("doctor", "--json")
    assert ended.code == 0
    found = ended.json
    assert found["library"]["version"]
    assert found["library"]["features"]
    assert any(device["kind"] == "cpu" for device in found["library"]["devices"])
    assert found["drive"]["best"]["bytes_per_s"] > 0
    assert 0 < found["memory"]["auto_bytes"] <= found["memory"]["available_bytes"]
    assert found["cores"] >= 1
    text = pipo("doctor").out
    assert "libggml" in text and "--ram auto" in text and "O_DIRECT" in text


def test_doctor_without_a_model_says_what_it_could_not_measure(pipo: CommandLine, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from pipo.cli import main; main()", "doctor", "--json"],
        cwd=tmp_path,
        env={**pipo.environment, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["drive"] is None
    assert "pipo pull smollm2" in found["problems"][0]


def test_doctor_probes_once_and_says_so(pipo: CommandLine) -> None:
    """Half a minute at most on a busy machine: the types of the model are measured, nothing else."""
    ended = pipo("doctor", "--probe", "smollm2", "--json")
    assert ended.code == 0, ended.err
    profile = ended.json["profile"]
    assert profile["measured_now_because"] and ended.json["drive"] is None
    assert set(profile["devices"][0]["products"]) == {"Q4_1", "Q8_0"}
    assert all(way["bytes_per_s"] > 0 for way in profile["drive_ways"])
    again = pipo("doctor", "--probe", "smollm2")
    assert "--fresh measures again" in again.out and "Q4_1" in again.out and "RAM copy" in again.out
    kept = pipo("doctor", "--probe", "smollm2", "--json").json["profile"]
    assert kept == profile | {"measured_now_because": None}


def test_doctor_refuses_what_it_cannot_probe(pipo: CommandLine, tmp_path: Path) -> None:
    ended = pipo("doctor", "--fresh")
    assert ended.code == 2 and "pipo doctor --probe --fresh" in ended.err
    assert pipo("doctor", "--probe", "nowhere.gguf").code == 1
    done = subprocess.run(
        [sys.executable, "-c", "from pipo.cli import main; main()", "doctor", "--probe"],
        cwd=tmp_path,
        env={**pipo.environment, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "pipo pull smollm2" in done.stderr


@pytest.mark.parametrize("arguments", [("list",), ("show", "smollm2"), ("doctor",), ("--help",), ("nope",)])
def test_no_colour_where_nobody_wants_it(pipo: CommandLine, arguments: tuple[str, ...]) -> None:
    piped = pipo(*arguments)
    assert "\x1b" not in piped.out + piped.err
    terminal = pipo.on_terminal(*arguments, NO_COLOR="1")
    terminal.wait()
    assert not any(f"\x1b[{code}" in terminal.shown for code in ("3", "1;3", "9"))


def test_colour_on_a_terminal(pipo: CommandLine) -> None:
    terminal = pipo.on_terminal("nope")
    assert terminal.wait() == 2
    assert "\x1b[1;31merror:" in terminal.shown


def test_a_reader_that_has_enough_ends_it_quietly(pipo: CommandLine) -> None:
    process = pipo.start("run", "smollm2", "story", "--ignore-eos", "-n", "4000", "--quiet")
    assert process.stdin and process.stdout and process.stderr
    process.stdin.close()
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""


@pytest.mark.parametrize("verbose", [False, True])
def test_a_bug_is_one_line_unless_asked_for_more(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(output: OutputFlags) -> None:
        raise ZeroDivisionError("division by zero")

    assert app._run(Call(verb, {"output": OutputFlags(verbose=verbose)})) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: pipo has a bug: ZeroDivisionError: division by zero")
    assert ("Traceback" in err) == verbose


def test_verbose_names_the_cause_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def verb(output: OutputFlags) -> None:
        raise UsageError("no", hint="yes") from OSError(5, "Input/output error")

    assert app._run(Call(verb, {"output": OutputFlags(verbose=True)})) == 2
    assert "caused by OSError(5" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("verb", [["list"], ["--help"]])
def test_output_that_cannot_be_written_is_said(verb: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([BINARY, *verb], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert "error: cannot write the output: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_closed_stdout_is_one_nobody_reads() -> None:
    result = subprocess.run(f"{BINARY} list >&-", shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 0 and "error" not in result.stderr and "Traceback" not in result.stderr
