"""Packing small models in this process, and looking at what came out."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pipo.base.tensor_type import TensorType
from pipo.compute import ggml
from pipo.compute.repack import RepackBuffer
from pipo.formats.checkpoint import open_checkpoint
from pipo.model_file import gguf_text_of_folder
from pipo.packing.pack import PackReport, pack
from pipo.packing.part import Pwrite
from pipo.packing.plan import PackPlan, plan_pack
from pipo.packing.types import parse_mix

PLENTY = 1 << 40


def without_kernels(type: TensorType) -> pytest.MarkDecorator:
    """Skips where this CPU has no repacked kernels for the type."""
    repack = RepackBuffer.find(ggml.load())
    has_some = repack is not None and repack.supports(type, (256, 8))
    return pytest.mark.skipif(not has_some, reason=f"this CPU has no repacked kernels for {type.name}")


def plan_of(source: Path, type: str, *, limit_bytes: int = PLENTY, threads: int = 2) -> PackPlan:
    checkpoint = open_checkpoint(source)
    text = gguf_text_of_folder(checkpoint, PLENTY)
    entries = text.entries if text is not None else ()
    return plan_pack(checkpoint, parse_mix(type), ggml.load(), limit_bytes, threads, entries)


def pack_file(
    source: Path, type: str, out: Path, *, limit_bytes: int = PLENTY, threads: int = 2, pwrite: Pwrite = os.pwrite
) -> PackReport:
    plan = plan_of(source, type, limit_bytes=limit_bytes, threads=threads)
    return pack(plan, out, ggml.load(), pwrite=pwrite)


def left_beside(out: Path) -> list[str]:
    """Names of what a pack has not cleaned up."""
    return sorted(path.name for path in out.parent.glob(f"{out.name}.*"))


def stored_bytes(path: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Every tensor as the file has it, by name, read by the `gguf` package."""
    return {t.name: np.frombuffer(t.data.tobytes(), np.uint8) for t in gguf.GGUFReader(path).tensors}


def stored_types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


@dataclass
class FillingDisk:
    """Writes until so many bytes are taken, then the disk is full; `error` may be something else."""

    room_bytes: int
    error: int = errno.ENOSPC
    written: list[tuple[int, int]] = field(default_factory=list)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        if len(view) > self.room_bytes:
            raise OSError(self.error, os.strerror(self.error))
        self.room_bytes -= len(view)
        self.written.append((offset, len(view)))
        return os.pwrite(fd, view, offset)
