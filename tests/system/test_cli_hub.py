"""pull, list, show, run, plan and rm of a model of the hub, as a user meets them. The hub is on 127.0.0.1."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command_line import BINARY, CommandLine, Ended
from tests.support.header_only import LLAMA_7B, write_header
from tests.support.hub_server import (
    TOKEN,
    Fault,
    Hub,
    Repo,
    hang_up,
    running,
    serve,
    serve_corrupt,
    stall_after,
    status,
)

REPO = "org/SmolLM2-GGUF"
NAME = f"{REPO}:Q4_1"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
THERE = ("--machine", "rtx3060-laptop")


@dataclass
class Setting:
    """A command line with a cache of its own, and the hub it asks."""

    line: CommandLine
    hub: Hub
    folder: Path

    def __call__(self, *arguments: str, **environment: str) -> Ended:
        return self.line(*arguments, **environment)

    @property
    def blobs(self) -> list[Path]:
        return sorted((self.folder / "hf" / "hub").glob("models--*/blobs/*"))


@pytest.fixture(scope="module")
def data(smollm2_path: Path) -> bytes:
    return smollm2_path.read_bytes()


@pytest.fixture
def hub(tmp_path: Path, pipo: CommandLine, data: bytes) -> Iterator[Setting]:
    header = write_header(tmp_path, LLAMA_7B).read_bytes() + bytes(1 << 20)
    repos = {
        REPO: Repo({FILE: data, "README.md": b"read me"}),
        "org/seven": Repo({"m-Q4_0.gguf": header, "m-Q8_0.gguf": header[:10_000]}),
        "org/gated": Repo({"m-Q4_0.gguf": header}, wants_token="GatedRepo", is_gated=True),
    }
    with running(Hub(repos)) as server:
        kept = {name: value for name, value in pipo.environment.items() if not name.startswith("HF_")}
        own = {**kept, **server.environment(tmp_path / "hf")}
        yield Setting(CommandLine(own), server, tmp_path)


def test_a_model_comes_runs_and_goes(hub: Setting) -> None:
    before = hub("run", REPO, "One, two,", "-n", "4")
    assert before.code == 1 and f"error: {REPO} is not on this machine" in before.err
    assert f"hint: pipo pull {REPO}" in before.err and hub.hub.requests == []
    pulled = hub("pull", NAME)
    assert pulled.code == 0, pulled.err
    path = pulled.out.strip()
    assert path.endswith(FILE) and Path(path).is_symlink() and "93.8 MiB fetched" in pulled.err
    assert f"{NAME}: {FILE}, 93.8 MiB\n" in pulled.err
    hub.hub.requests.clear()
    ran = hub("run", NAME, "One, two,", "--raw", "-n", "4", "--ram", "125MB", "--temp", "0", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["model"] == path and ran.json["usage"]["completion_tokens"] == 4
    for name in (NAME, REPO, f"{REPO}:q4_1"):
        assert f"file       {path}" in hub("show", name).out
    assert hub("plan", NAME, *THERE, "--json").json["model"] == path
    assert NAME in hub("list").out
    (listed,) = (model for model in hub("list", "--json").json["models"] if model.get("repo"))
    assert (listed["name"], listed["quant"], listed["path"]) == (NAME, "Q4_1", path)
    gone = hub("rm", NAME, "--yes", "--json")
    assert gone.json["name"] == REPO and gone.json["freed_bytes"] == listed["bytes"]
    assert not Path(path).exists() and NAME not in hub("list").out
    assert hub.hub.requests == []


def test_json_of_pull(hub: Setting) -> None:
    made = hub("pull", "org/seven:q8_0", "--json").json
    assert made["name"] == "org/seven:Q8_0" and made["bytes"] == made["fetched_bytes"] == 10_000
    assert made["files"] == [made["path"]] and len(made["revision"]) == 40
    assert hub("pull", "org/seven:q8_0", "--json").json["fetched_bytes"] == 0
    known = hub("pull", "smollm2", "--json", "-q")
    assert known.json["name"] == "smollm2" and known.err == ""


def test_killed_and_continued(hub: Setting, data: bytes) -> None:
    """kill -9 in the middle: what came stays as a part, and the next pull asks for the rest."""
    hub.hub.fail_with(stall_after(40 << 20))
    process = hub.line.start("pull", NAME)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size >= 32 << 20 for path in hub.blobs):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = hub.blobs
    assert part.name.endswith(".incomplete")
    assert f"error: {NAME} is not on this machine" in hub("show", NAME).err
    num_bytes = part.stat().st_size
    assert hub("list", "--json").json["unfinished"] == [{"repo": REPO, "bytes": num_bytes}]
    assert f"unfinished; pipo pull goes on, pipo rm {REPO} removes it" in hub("list").out
    hub.hub.fail_with(serve)
    assert hub("pull", NAME).code == 0
    assert hub.hub.ranges == [f"bytes={num_bytes}-"]
    (blob,) = hub.blobs
    assert blob.read_bytes() == data


def test_ctrl_c_leaves_a_part(hub: Setting) -> None:
    hub.hub.fail_with(stall_after(4 << 20))
    process = hub.line.start("pull", NAME)
    deadline = time.monotonic() + 60
    while not hub.blobs:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    assert [path.suffix for path in hub.blobs] == [".incomplete"]


def test_a_corrupt_download_is_no_model(hub: Setting) -> None:
    hub.hub.fail_with(serve_corrupt)
    ended = hub("pull", "org/seven")
    assert ended.code == 1 and "their SHA-256 is not" in ended.err and hub.blobs == []
    hub.hub.fail_with(serve)
    assert hub("pull", "org/seven").code == 0


def test_a_bar_on_a_terminal(hub: Setting) -> None:
    terminal = hub.line.on_terminal("pull", NAME)
    assert terminal.wait() == 0
    shown = " ".join(terminal.plain.split())
    assert "download" in shown and "verify" in shown and "93.8/93.8 MiB" in shown and "/s" in shown


def test_rm_asks_and_refuses_where_nobody_answers(hub: Setting) -> None:
    assert hub("pull", "org/seven:Q8_0").code == 0
    ended = hub("rm", "org/seven", stdin="y\n")
    assert ended.code == 2 and "hint: pipo rm org/seven --yes" in ended.err
    for answer, code in (("n", 130), ("", 130), ("y", 0)):
        terminal = hub.line.on_terminal("rm", "org/seven")
        terminal.expect("Remove org/seven and free 9.8 KiB? [y/N]")
        assert "org/seven:Q8_0\n" in terminal.plain and "models--org--seven" in terminal.plain
        terminal.type(answer + "\n")
        assert terminal.wait() == code, terminal.plain
    assert hub.blobs == []
    ended = hub("rm", "org/seven")
    assert ended.code == 1 and "is not on this machine" in ended.err


def test_a_plan_from_the_header_on_the_hub(hub: Setting) -> None:
    ended = hub("plan", "org/seven", *THERE, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["model"] == "org/seven" and ended.json["prediction"]["tokens_per_s"] > 0
    whole = len(hub.hub.repos["org/seven"].files["m-Q4_0.gguf"])
    assert "is not here" in ended.err and f"of its {whole / (1 << 20):.1f} MiB were read from the hub" in ended.err
    assert hub.blobs == [] and not list((hub.folder / "hf").rglob("*.gguf"))
    assert not list(Path(hub.line.environment["XDG_CACHE_HOME"]).rglob(".pipo-header-*"))
    offline = hub("plan", "org/seven", *THERE, HF_HUB_OFFLINE="1")
    assert offline.code == 1 and "HF_HUB_OFFLINE is set" in offline.err
    bad = hub("plan", "org/seven:Q8_0", *THERE)
    assert bad.code == 1 and "error: org/seven/m-Q8_0.gguf" in bad.err


def test_this_machine_from_the_header_on_the_hub(hub: Setting) -> None:
    """What the drive under pipo's own folder was measured to do serves, or the error says what is missing."""
    ended = hub("plan", "org/seven", "--ram", "4GB")
    if ended.code:
        assert "has no weights, or too few, to measure the drive with" in ended.err and "org/seven" in ended.err
    assert ".pipo-header" not in ended.out + ended.err


@pytest.mark.parametrize(
    ("verb", "name", "api", "fault", "says"),
    [
        ("pull", "org/none", None, serve, "has no org/none"),
        ("pull", "org/seven:Q3_K_S", None, serve, "has no 'Q3_K_S'; there are Q8_0"),
        ("pull", "org/gated", None, serve_corrupt, "their SHA-256 is not"),  # which the token opens
        ("pull", "org/seven", status(429, Retry_After="30"), serve, "try again in 30 s"),
        ("pull", "org/seven", status(500), serve, "HTTP 500"),
        ("pull", "org/seven", hang_up, serve, "cannot be reached"),
        ("pull", "org/seven", None, status(403), "does not give out org/seven"),
        ("pull", "org/seven", None, status(404), "HTTP 404"),
        ("plan", "org/seven", None, status(403), "does not give out org/seven"),
        ("plan", "org/seven", status(401), serve, "does not show it"),
    ],
)
def test_errors_are_one_message_and_hold_no_token(
    verb: str, name: str, api: Fault | None, fault: Fault, says: str, hub: Setting
) -> None:
    """With --verbose too, which logs what happens on the way."""
    hub.hub.hub.state.api = api
    hub.hub.fail_with(fault)
    ended = hub(verb, name, "--verbose", *(THERE if verb == "plan" else ()), HF_TOKEN=TOKEN)
    assert ended.code == 1 and says in ended.err
    assert ended.err.count("error: ") == 1 and "Traceback" not in ended.err
    assert TOKEN not in ended.out + ended.err and "DEBUG http" not in ended.err
    if verb == "pull":
        assert all(path.name.endswith(".incomplete") for path in hub.blobs)


def test_run_does_not_import_what_asks_the_hub(hub: Setting) -> None:
    """A start must not pay for it: memory counts against the budget."""
    assert hub("pull", NAME).code == 0
    code = f"""
import sys
sys.argv = ["pipo", "run", {NAME!r}, "One,", "--raw", "-n", "2", "--ram", "125MB"]
from pipo.cli import main
try:
    main()
finally:
    print([name for name in ("huggingface_hub", "ssl", "pipo.store.fetch") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [BINARY.with_name("python"), "-c", code], env=hub.line.environment, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
