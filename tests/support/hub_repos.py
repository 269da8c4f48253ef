"""Small repositories of a hub, of every kind that is pulled or refused."""

from __future__ import annotations

import json

from pipo.store.hub_cache import hub_cache_folder
from pipo.store.hub_name import HubName
from pipo.store.hub_pull import Pulled, pull_from_hub
from tests.support.hub_server import Repo

DATA = bytes(range(256)) * 12_000  # three chunks
SMALL = b'{"a": 1}'
SHARDS = [f"split/big-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": WEIGHTS[0], "b": WEIGHTS[1]}}).encode()


def make_repos() -> dict[str, Repo]:
    return {
        "org/gguf": Repo(
            {"README.md": b"read me", "m-Q4_K_M.gguf": DATA, "m-Q2_K.gguf": DATA[:1000], SHARDS[0]: DATA[:500_000],
             SHARDS[1]: DATA[500_000:], "mmproj-m-f16.gguf": b"image"}
        ),
        "org/safe": Repo(
            {"config.json": SMALL, "tokenizer.json": SMALL * 9, "tokenizer_config.json": SMALL * 2,
             "README.md": b"read me", "model.safetensors.index.json": INDEX, WEIGHTS[0]: DATA, WEIGHTS[1]: DATA[:77],
             "pytorch_model.bin": b"run!"}
        ),
        "org/single": Repo({"config.json": SMALL, "model.safetensors": DATA, "generation_config.json": b""}),
        "org/pickles": Repo({"config.json": SMALL, "pytorch_model.bin": b"run!"}),
        "org/moved": Repo({"m-Q4_0.gguf": DATA}, spelled="org/gguf"),
        "org/gated": Repo({"m-Q4_0.gguf": DATA}, wants_token="GatedRepo", is_gated=True),
        "org/private": Repo({"m-Q4_0.gguf": DATA}, wants_token="RepoNotFound"),
        "org/partly": Repo({SHARDS[0]: DATA}),
    }  # fmt: skip


def pull(text: str) -> Pulled:
    name = HubName.parse(text)
    assert name is not None
    return pull_from_hub(name)


def blobs(repo: str = "org--gguf") -> list[str]:
    folder = hub_cache_folder() / f"models--{repo}" / "blobs"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
