"""Headers of models that are not here, by ranges: as many bytes as a header takes, from servers good and bad."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipo.base.errors import DownloadError, MalformedFile, ModelNotFound, PipoError, UnsupportedModel
from pipo.formats.gguf import has_whole_header, open_gguf
from pipo.model_file import ModelFile
from pipo.store import hub_headers
from pipo.store.fetch import Patience
from pipo.store.hub_headers import Headers, fetch_headers
from pipo.store.hub_name import HubName
from pipo.store.ranges import read_range
from pipo.store.request import Address
from tests.support.gguf_bytes import GgufBytes, array_key, count_key, string, tensor, text_key
from tests.support.header_only import Header, write_header
from tests.support.hub_server import (
    Fault,
    Hub,
    Repo,
    drop_after,
    hang_up,
    ignore_range,
    running,
    serve,
    status,
)

FILE = bytes(range(256)) * 4000
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
STRING = 8


def safetensors(num_tensors: int, data: bytes = bytes(1000)) -> tuple[bytes, bytes]:
    """A header with its length, and the whole file."""
    table = {
        f"tensor.{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(num_tensors)
    }
    text = json.dumps(table).encode()
    head = len(text).to_bytes(8, "little") + text
    return head, head + data


def shard(idx: int, num_tokens: int = 3) -> bytes:
    keys = [count_key("split.no", idx), count_key("split.count", 2), count_key("split.tensors.count", 2)]
    if idx == 0:
        keys += [array_key("tokens", STRING, [string("word")] * num_tokens), text_key("general.name", "X")]
    return bytes(GgufBytes(keys, [tensor(f"t{idx}", (8,))], bytes(32))) + bytes(100_000)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    header = write_header(tmp_path, Header(num_layers=2)).read_bytes()
    names = json.dumps({"weight_map": {"a": WEIGHTS[0], "b": WEIGHTS[1]}}).encode()
    repos = {
        "org/gguf": Repo({"m-Q4_0.gguf": header + bytes(1 << 20)}),
        "org/split": Repo({f"q/m-Q8_0-0000{i + 1}-of-00002.gguf": shard(i, 20_000) for i in range(2)}),
        "org/safe": Repo(
            {"config.json": b"{}", "tokenizer.json": b'{"t": 1}', "model.safetensors.index.json": names,
             WEIGHTS[0]: safetensors(2)[1], WEIGHTS[1]: safetensors(9000)[1], "pytorch_model.bin": b"run!"}
        ),
        "org/other": Repo({"m-Q4_0.gguf": FILE}),
        "org/gated": Repo({"m-Q4_0.gguf": header}, wants_token="GatedRepo", is_gated=True),
        "org/pickles": Repo({"config.json": b"{}", "pytorch_model.bin": b"run!"}),
    }  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with running(Hub(repos)) as hub:
        hub.set_up(monkeypatch, tmp_path / "hf")
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "headers").mkdir()
    return tmp_path / "headers"


def fetch(text: str, folder: Path) -> Headers:
    name = HubName.parse(text)
    assert name is not None
    return fetch_headers(name, folder)


def test_a_gguf_header_is_all_that_comes(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_headers, "FIRST_GGUF_BYTES", 1024)
    data = hub.repos["org/gguf"].files["m-Q4_0.gguf"]
    headers = fetch("org/gguf", folder)
    assert headers.model_bytes == len(data) and 1024 < headers.num_bytes < len(data) / 4
    assert headers.path.read_bytes() == data[: headers.num_bytes]
    assert hub.ranges[:3] == ["bytes=0-1023", "bytes=1024-2047", "bytes=2048-4095"]
    model = ModelFile(headers.path, header_only=True)
    assert model.manifest.hyper.num_layers == 2 and not model.has_weights


def test_headers_of_all_shards(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_headers, "FIRST_GGUF_BYTES", 4096)
    monkeypatch.setattr(hub_headers, "FIRST_SHARD_BYTES", 256)
    headers = fetch("org/split", folder)
    opened = open_gguf(headers.path, header_only=True)
    assert set(opened.tensors) == {"t0", "t1"} and opened.metadata.text("general.name") == "X"
    assert headers.num_bytes < headers.model_bytes / 1.5


def test_headers_of_safetensors(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_headers, "FIRST_SHARD_BYTES", 1024)
    headers = fetch("org/safe", folder)
    assert headers.path == folder
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors.index.json", *WEIGHTS,
    }  # fmt: skip
    for name, num_tensors in zip(WEIGHTS, (2, 9000), strict=True):
        assert (folder / name).read_bytes() == safetensors(num_tensors)[0]
    large = safetensors(9000)[0]
    assert hub.ranges == ["bytes=0-1023", "bytes=0-1023", f"bytes=1024-{len(large) - 1}"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]" + bytes(100),
        (2).to_bytes(8, "little") + b"{" * 200,
        (150_000_000).to_bytes(8, "little") + b"{}",
    ],
)
def test_safetensors_that_are_none(data: bytes, hub: Hub, folder: Path) -> None:
    hub.repos["org/safe"].files[WEIGHTS[1]] = data
    with pytest.raises(MalformedFile, match="org/safe"):
        fetch("org/safe", folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000


def test_a_file_that_is_no_gguf_is_not_read_on(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_headers, "FIRST_GGUF_BYTES", 1024)
    with pytest.raises(MalformedFile, match=r"org/other/m-Q4_0.gguf: is not a GGUF file"):
        fetch("org/other", folder)
    assert hub.ranges == ["bytes=0-1023"]


def test_a_header_without_end(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that claims more than there is ends at the file's end, or at the bound."""
    hub.repos["org/other"].files["m-Q4_0.gguf"] = b"GGUF" + (3).to_bytes(4, "little") + b"\0\1" + bytes(14) + FILE[:99]
    with pytest.raises(MalformedFile, match=r"org/other/m-Q4_0.gguf: 123 B of 123 B hold no whole header"):
        fetch("org/other", folder)
    monkeypatch.setattr(hub_headers, "FIRST_GGUF_BYTES", 4096)
    monkeypatch.setattr(hub_headers, "MAX_HEADER_BYTES", 10_000)
    keys = [array_key("tokens", STRING, [string("word")] * 20_000)]
    hub.repos["org/other"].files["m-Q4_0.gguf"] = bytes(GgufBytes(keys))
    hub.large_requests.clear()
    with pytest.raises(MalformedFile, match="hold no whole header"):
        fetch("org/other", folder)
    assert hub.ranges == ["bytes=0-4095", "bytes=4096-8191", "bytes=8192-9999"]


def test_every_beginning_of_a_file_is_whole_or_not(tmp_path: Path) -> None:
    """Never an error, and never whole before it is: the rest of the plan would be made up."""
    data = shard(0)[:-100_000]
    path = tmp_path / "m-00001-of-00002.gguf"
    end = len(data) - 32
    found = []
    for num_bytes in range(24, len(data)):
        path.write_bytes(data[:num_bytes])
        found.append(has_whole_header(path))
    assert found == sorted(found) and found[-1]
    assert end - 32 <= 24 + found.index(True) <= end


@pytest.mark.parametrize(
    ("faults", "num_requests"),
    [
        ([hang_up, serve], 2),
        ([drop_after(10), serve], 2),
        ([status(503), status(429), serve], 3),
        ([ignore_range], 1),
    ],
)
def test_a_range_arrives(faults: list[Fault], num_requests: int, hub: Hub) -> None:
    hub.fail_with(*faults)
    address = Address(f"{hub.large.url}/large/org/other/m-Q4_0.gguf")
    assert read_range(address, 3_000, 9_000, len(FILE)) == FILE[3_000:9_000]
    assert len(hub.ranges) == num_requests


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (hang_up, "gave up after 4 tries"),
        (drop_after(10), "gave up after 4 tries for bytes 3000 to 9000"),
        (status(500), "HTTP 500"),
        (status(404), "HTTP 404"),
        (lambda handler, data: handler.send_ranged(data + b"more"), "lists 1024000 bytes, the server has 1024004"),
        (lambda handler, data: handler.send(206, data, Content_Range="bytes 0-9/1024000"), "another range"),
    ],
)
def test_a_range_that_does_not(fault: Fault, message: str, hub: Hub) -> None:
    hub.fail_with(fault)
    address = Address(f"{hub.large.url}/large/org/other/m-Q4_0.gguf")
    with pytest.raises(DownloadError, match=message):
        read_range(address, 3_000, 9_000, len(FILE), Patience(num_tries=4, wait_s=0.0, timeout_s=2.0))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("org/none", ModelNotFound, "does not show it"),
        ("org/gguf:Q8_0", ModelNotFound, "has no 'Q8_0'"),
        ("org/gated", DownloadError, "is gated"),
        ("org/pickles", UnsupportedModel, "pickled weights are never read"),
    ],
)
def test_what_there_is_not(name: str, kind: type[PipoError], message: str, hub: Hub, folder: Path) -> None:
    with pytest.raises(kind, match=message):
        fetch(name, folder)
    assert list(folder.iterdir()) == []


def test_offline(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        fetch("org/gguf", folder)
    assert hub.requests == []
