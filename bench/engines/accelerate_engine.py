"""transformers with accelerate's disk offload, in a child process."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import accelerate
import torch
import transformers

from bench.engines.torch_engine import TorchEngine
from bench.messages import FolderSetup


class AccelerateEngine(TorchEngine):
    """The layers that fit stay in memory, the others are read from the checkpoint whenever they are called."""

    def __init__(self) -> None:
        super().__init__("accelerate")
        self._offload = TemporaryDirectory(prefix="offload-")  # stays empty: the layers are read from the checkpoint

    def _load(self, setup: FolderSetup) -> Any:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            setup.path,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={"cpu": setup.ram_bytes},
            offload_folder=self._offload.name,
        )
        return model.eval()

    def _version(self) -> str:
        num_on_disk = sum(device == "disk" for device in self._model.hf_device_map.values())
        parts = len(self._model.hf_device_map)
        names = f"accelerate {accelerate.__version__}, transformers {transformers.__version__}"
        return f"{names}, {num_on_disk} of {parts} parts on disk"
