"""Random LoRA adapters for any dense GGUF model, made from its header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from pipo.formats.checkpoint import open_checkpoint
from pipo.models.registry import stages_of
from pipo.models.stage import StageKind


def write_random_adapter(model: Path, path: Path, *, rank: int = 8, strength: float = 0.05, seed: int = 0) -> Path:
    """A part for every matrix of every block, in F32. With a `strength` of 1 it is about as large as the weights."""
    manifest = open_checkpoint(model).manifest
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, manifest.hyper.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for stage in stages_of(manifest):
        for spec in stage.matrices.values() if stage.kind in (StageKind.ATTENTION, StageKind.MLP) else ():
            num_in, num_out = spec.shape
            a = rng.standard_normal((rank, num_in)) / np.sqrt(num_in)
            b = rng.standard_normal((num_out, rank)) * strength / np.sqrt(rank)
            writer.add_tensor(f"{spec.name}.lora_a", a.astype(np.float32))
            writer.add_tensor(f"{spec.name}.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
