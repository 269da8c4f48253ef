"""The Python API: open a model inside a memory budget, ask it, close it.

    with pipo.load("model.gguf", ram="4GB") as engine:
        for piece in engine.generate("Once upon a time"):
            print(piece, end="")
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from pipo.base.clock import RealClock
from pipo.base.config import EngineConfig
from pipo.base.errors import Cancelled, OverBudget, UsageError
from pipo.base.trace import NullTracer, Tracer
from pipo.base.units import MIB, round_up
from pipo.compute import ggml
from pipo.compute.devices import CpuBackend
from pipo.compute.repack import RepackBuffer
from pipo.formats.checkpoint import Checkpoint, open_checkpoint
from pipo.generation.loop import Generator, Piece, Timing
from pipo.generation.request import SamplingParams
from pipo.hardware.drive import DriveRate, drive_rate
from pipo.hardware.memory import auto_budget_bytes, process_memory, ram_bytes
from pipo.kvcache.cache import kv_rows_class
from pipo.models.registry import stages_of
from pipo.pipeline.assembly import Assembly, Blueprint, choose_layouts, demand
from pipo.pipeline.stage_graphs import Compute
from pipo.pipeline.stats import PassStats
from pipo.planner.placement import Demand, Placement, place, smallest_bytes
from pipo.store.library import resolve_model
from pipo.text.chat_template import ChatTemplate, Message
from pipo.text.tokenizer import Tokenizer, build_tokenizer
from pipo.transfer.disk import DriveSettings

log = logging.getLogger(__name__)

# Anonymous memory of the process once everything is imported and the tokenizer is built, by declaration, so that the
# smallest budget is the same number on every run; a process that measures more is charged what it measures.
PROCESS_BYTES = 64 * MIB
PROCESS_STEP = 4 * MIB
# a context nobody asked for: the largest power of two whose keys and values take at most this share of the budget
KV_SHARE = 4
NARROW_DRIVE = DriveSettings(chunk_bytes=MIB, num_workers=4, direct=True)
WIDE_SHARE = 16  # the transfer's own buffers may take this fraction of the budget


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine will do with its budget, before it takes any of it."""

    placement: Placement
    context_tokens: int
    limit_bytes: int
    layout_types: tuple[str, ...]  # types kept in repacked layout
    drive: DriveRate
    num_units: int

    @property
    def num_resident(self) -> int:
        return sum(self.placement.resident)

    @property
    def pass_floor_s(self) -> float:
        """Seconds the drive needs for what one pass streams: no engine on this drive can be faster."""
        return self.placement.streamed_bytes / self.drive.bytes_per_s


@dataclass(frozen=True, slots=True)
class Report:
    """What the last request cost."""

    timing: Timing
    prefill: PassStats
    decode: PassStats
    num_generated: int
    peak_anonymous_bytes: int


class ModelFile:
    """A model's header and tokenizer: cheap, no weights. What is needed to count a prompt before planning for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.stages = stages_of(self.checkpoint.manifest)
        self.tokenizer: Tokenizer = build_tokenizer(self.checkpoint.metadata)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation. Raises UsageError when the model has no chat template."""
        source = self.checkpoint.metadata.chat_template
        return ChatTemplate(source, self.tokenizer.bos_token, self.tokenizer.eos_token).render(messages)

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt, add_special=True, parse_special=True)
