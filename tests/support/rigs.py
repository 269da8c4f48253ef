"""A model's pipeline without an Engine around it: placements are exact to the byte, whatever this process weighs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from bench.random_model import write_random_model
from pipo.base.adapter import AdapterId, NamedAdapter
from pipo.base.clock import RealClock
from pipo.base.config import EngineConfig
from pipo.base.trace import NullTracer
from pipo.compute import ggml
from pipo.compute.device import ComputeDevice
from pipo.compute.devices import CpuBackend
from pipo.compute.repack import RepackBuffer
from pipo.formats.adapter import open_adapter
from pipo.formats.checkpoint import open_checkpoint
from pipo.models.registry import stages_of
from pipo.pipeline.assembly import Assembly
from pipo.pipeline.blueprint import Blueprint, choose_layouts, demand
from pipo.pipeline.device_share import DeviceShare, PassSizes, device_demand
from pipo.pipeline.forward import Forward
from pipo.pipeline.stage_graphs import Compute
from pipo.planner.device_placement import DeviceDemand, DevicePlacement
from pipo.planner.placement import Demand, Placement, place, smallest_bytes
from pipo.transfer.disk import DriveSettings

FloatArray = npt.NDArray[np.float32]
SMALL_CHUNKS = DriveSettings(chunk_bytes=64 << 10, num_workers=3)


class Rig:
    """One model and one way to run it. A context manager. Threads: one."""

    def __init__(
        self, path: Path, config: EngineConfig, *, drive: DriveSettings = SMALL_CHUNKS, context_tokens: int = 256
    ) -> None:
        manifest = open_checkpoint(path).manifest
        stages, lib = stages_of(manifest), ggml.load()
        self.context_tokens = context_tokens
        self.compute = Compute(lib, CpuBackend(lib, config.num_threads), RepackBuffer.find(lib))
        layouts = choose_layouts(stages, self.compute.repack, config.layout, all_resident=True)
        self.blueprint = Blueprint(manifest, stages, layouts, self.compute, config, drive)

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.compute.close()

    def demand(self, limit_bytes: int = 0) -> Demand:
        return demand(self.blueprint, self.context_tokens, limit_bytes, process_bytes=0)

    def device_demand(self, device: ComputeDevice, limit_bytes: int, chunk: int) -> DeviceDemand:
        """For a device that computes chunks of up to `chunk` tokens."""
        plan, context = self.blueprint, self.context_tokens
        shapes = plan.largest_shapes(context, chunk)
        sizes = PassSizes(shapes, plan.buffer_shape(context, chunk), plan.kv_shape(context))
        hyper, adapters = plan.manifest.hyper, plan.adapters
        return device_demand(plan.stages, hyper, device, plan.compute, sizes, limit_bytes, adapters)

    def with_adapters(self, *files: Path) -> Rig:
        """The same model, with adapters named as their files are, at a scale of 1."""
        rig = copy(self)
        named = [NamedAdapter(AdapterId(file.stem), open_adapter(file), 1.0) for file in files]
        rig.blueprint = replace(self.blueprint, named_adapters=tuple(named))
        return rig

    def on_device(self, device: ComputeDevice, placement: DevicePlacement) -> Rig:
        """The same model, some of whose stages compute on a device."""
        rig = copy(self)
        share = DeviceShare(
            device, placement, self.blueprint.stages, placement.num_bytes, self.blueprint.config.prefill_chunk or 512
        )
        rig.blueprint = replace(self.blueprint, device=share)
        return rig

    def all_resident(self) -> Placement:
        return place(self.demand(1 << 50))

    def placements(self, count: int) -> list[Placement]:
        """At limits evenly apart, from the smallest that works to the smallest that keeps everything in RAM."""
        low, high = smallest_bytes(self.demand()), self.all_resident().num_bytes
        return [place(self.demand(low + (high - low) * i // (count - 1))) for i in range(count)]

    @contextmanager
    def running(
        self, placement: Placement, *, schedule: str = "pipelined", drive: DriveSettings | None = None
    ) -> Iterator[Forward]:
        """The pipeline with just the memory of its placement, all of which is given back at the end."""
        config = replace(self.blueprint.config, schedule=schedule)
        blueprint = replace(self.blueprint, config=config, drive=drive or self.blueprint.drive)
        extra = blueprint.bounce_bytes - self.blueprint.bounce_bytes
        limit = placement.num_bytes + max(extra, 0)
        assembly = Assembly(blueprint, placement, self.context_tokens, limit, RealClock(), NullTracer())
        try:
            yield assembly.forward
        finally:
            assembly.close()
        assert assembly.ledger.in_use_bytes == 0, assembly.ledger.breakdown()


def transcript(forward: Forward, prompt: Sequence[int], chunk: int, num_new: int) -> FloatArray:
    """Logits of the last prompt token and of `num_new` greedy ones, from an empty cache. Shape: (1 + new, vocab)."""
    rows = [_prefill(forward, prompt, chunk)]
    for i in range(num_new):
        rows.append(forward.run([int(rows[-1].argmax())], len(prompt) + i, [0])[0].copy())
    return np.stack(rows)


def all_logits(forward: Forward, token_ids: Sequence[int], chunk: int) -> FloatArray:
    """At every position, computed in chunks. Shape: (tokens, vocab)."""
    starts = range(0, len(token_ids), chunk)
    parts = [(token_ids[start : start + chunk], start) for start in starts]
    return np.concatenate([forward.run(part, start, range(len(part))).copy() for part, start in parts])


def read_prompts(forward: Forward, prompts: Sequence[Sequence[int]], chunk: int) -> FloatArray:
    """Logits after each, which is read into a sequence of its own. Shape: (prompts, vocab)."""
    return np.stack([_prefill(forward, prompt, chunk, sequence) for sequence, prompt in enumerate(prompts)])


def _prefill(forward: Forward, prompt: Sequence[int], chunk: int, sequence: int = 0) -> FloatArray:
    """Logits after the prompt. Shape: (vocab,)."""
    last = (len(prompt) - 1) // chunk * chunk
    for start in range(0, last, chunk):
        forward.run(prompt[start : start + chunk], start, sequence=sequence)
    logits: FloatArray = forward.run(prompt[last:], last, [len(prompt) - last - 1], sequence)[0].copy()
    return logits


@contextmanager
def float_rig(folder: Path, chunk: int, num_sequences: int) -> Iterator[Rig]:
    """A small model in F16 with keys and values in F32, so that a device's rounding alone tells it from the CPU."""
    path = folder / "smoke.gguf"
    write_random_model(path, "smoke", "f16")
    config = EngineConfig(
        threads=1,
        layout="plain",
        prefill_chunk=chunk,
        cache_type_k="f32",
        cache_type_v="f32",
        num_sequences=num_sequences,
    )
    with Rig(path, config) as rig:
        yield rig
