"""AirLLM, in a child process."""

from __future__ import annotations

from importlib.metadata import version
from time import perf_counter
from typing import Any

import airllm
import airllm.airllm_base

from bench.engines.torch_engine import TorchEngine
from bench.messages import FolderSetup, Passes, Prepare, Request


class AirllmEngine(TorchEngine):
    """Every layer is read when it is called and forgotten after it; nothing stays, whatever the memory.

    It collects garbage after each layer: the time that takes is counted.
    """

    def __init__(self) -> None:
        super().__init__("AirLLM")
        self._collecting_s = 0.0

    def answer(self, request: Request[Any]) -> object:
        if isinstance(request, Prepare):
            self._load(request.setup)  # splits the checkpoint into a file per layer, which later starts find
            return None
        return super().answer(request)

    def _load(self, setup: FolderSetup) -> Any:
        self._count_collections()
        return airllm.AutoModel.from_pretrained(str(setup.path), device="cpu")

    def _version(self) -> str:
        return f"AirLLM {version('airllm')}, transformers {version('transformers')}"

    def _decode_batch(self, num_sequences: int, num_passes: int) -> Passes:
        self._collecting_s = 0.0
        passes = super()._decode_batch(num_sequences, num_passes)
        share = num_passes / (num_passes + 1)  # the prompt's pass collects as well
        return Passes(num_passes, passes.seconds, stall_s=(("collecting garbage", self._collecting_s * share),))

    def _count_collections(self) -> None:
        collect = airllm.airllm_base.clean_memory

        def timed() -> None:
            begin = perf_counter()
            collect()
            self._collecting_s += perf_counter() - begin

        airllm.airllm_base.clean_memory = timed
