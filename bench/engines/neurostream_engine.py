"""neurostream, in a child process."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from neurostream import NeuroStream
from neurostream.model.qwen3 import KVCache

from bench.engines.torch_engine import TorchEngine
from bench.messages import FolderSetup

_IO_SHARE = 0.25  # of the memory it may use, for blocks on their way; the rest keeps weights


@dataclass(slots=True)
class _Answer:
    logits: torch.Tensor
    past_key_values: KVCache


class NeurostreamEngine(TorchEngine):
    """Refuses what it has no architecture for: that is the answer then."""

    def __init__(self) -> None:
        super().__init__("neurostream")

    def _load(self, setup: FolderSetup) -> Any:
        io_bytes = int(setup.ram_bytes * _IO_SHARE)
        engine = NeuroStream.load(setup.path, mem_budget=io_bytes, ram_budget=setup.ram_bytes - io_bytes, device="cpu")

        def call(*, input_ids: torch.Tensor, past_key_values: KVCache | None, **_: Any) -> _Answer:
            cache = past_key_values or KVCache(engine.cfg.n_layer)
            logits = engine.model.forward(input_ids[0], cache, start_pos=cache.length)
            return _Answer(logits[None], cache)

        return call

    def _version(self) -> str:
        return f"neurostream {version('neurostream')}"
