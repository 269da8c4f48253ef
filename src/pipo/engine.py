"""The engine: open a model inside a memory budget, plan, answer, close. `pipo.api` is its short form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from pipo.base.clock import RealClock
from pipo.base.config import EngineConfig
from pipo.base.errors import OverBudget, UnsupportedModel, UsageError
from pipo.base.trace import MAX_ZONES, ZONE_BYTES, NullTracer, Tracer
from pipo.base.units import MIB, round_up
from pipo.compute import ggml
from pipo.compute.devices import CpuBackend
from pipo.compute.repack import RepackBuffer
from pipo.generation.loop import Generator, Piece, Timing
from pipo.generation.request import Completion, FinishReason, SamplingParams, Usage
from pipo.generation.worker import Stream, Worker
from pipo.hardware.budget import ram_bytes
from pipo.hardware.cache import drive_rates
from pipo.hardware.drive import QUICK_COMBOS, DriveRate, best_rate, measure_drive
from pipo.hardware.memory import PeakSampler, process_memory
from pipo.kvcache.cache import ROWS_PER_CLASS, kv_rows_class
from pipo.model_file import PROCESS_BYTES, ModelFile
from pipo.pipeline.assembly import Assembly
from pipo.pipeline.blueprint import Blueprint, choose_layouts, demand
from pipo.pipeline.stage_graphs import Compute
from pipo.pipeline.stats import PassStats
from pipo.planner.placement import Demand, Placement, place, smallest_bytes
from pipo.text.chat_template import Message
from pipo.transfer.disk import DriveSettings

PROCESS_STEP = 8 * MIB
KV_SHARE = 4  # a context nobody asked for may take this fraction of the budget for its keys and values
TRACE_SHARE = 16  # the zones of a trace may take this fraction of the budget
LEAST_TRACE_BYTES = 4 * MIB  # or this much: some 70 tokens of 30 blocks
LEAST_CONTEXT_TOKENS = 256  # that is taken where nobody asked for one
WIDE_SHARE = 16  # the transfer's own buffers may take this fraction of the budget
TOKENS_PER_SAMPLE = 16  # of the memory in use: between two passes, with caches cold, a sample takes 0.1 ms
NARROW_DRIVE = DriveSettings(chunk_bytes=MIB // 2, num_workers=4)


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine will do with its budget, before it takes any of it."""

    placement: Placement
    context_tokens: int
    limit_bytes: int
    weight_bytes: int  # of all stages
    repacked_types: tuple[str, ...]
    drive: DriveRate
    blueprint: Blueprint = field(repr=False)

    @property
    def is_streaming(self) -> bool:
        return self.placement.streamed_bytes > 0

    @property
    def pass_floor_s(self) -> float:
        """Seconds the drive needs for what one pass streams: no engine on this drive can be faster."""
        return self.placement.streamed_bytes / self.drive.bytes_per_s


@dataclass(frozen=True, slots=True)
class Report:
    """What the last request cost. `prefill` and `decode` count their own passes."""

    timing: Timing
    prefill: PassStats
    decode: PassStats
    num_generated: int
    peak_anonymous_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Of decode, as the caller sees it: tokens after the first. 0 when there were none."""
        return self.timing.num_decoded / self.timing.decode_s if self.timing.decode_s else 0.0


class Engine:
    """One model inside one budget. `load` opens and starts one; close it, or use it as a context manager.

    Computation runs on a thread of its own. Threads: one request at a time; `cancel` from any thread.
    """

    def __init__(self, model: ModelFile, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        limit = ram_bytes(config.ram)  # first: a budget that cannot be read must leave nothing behind
        self.tracer = _tracer(limit) if config.trace else NullTracer()
        self.plan: Plan | None = None
        self.report: Report | None = None
        self.seconds_per_pass = 0.0  # predicted; known after `start`
        self._clock = RealClock()
        self._lib = ggml.load()
        self._check_types()
        self._backend = CpuBackend(self._lib, config.num_threads)
        try:
            self._compute = Compute(self._lib, self._backend, RepackBuffer.find(self._lib))
        except BaseException:
            self._backend.close()
            raise
        self._drive: DriveRate | None = None  # measured for the first plan
        self._peak = PeakSampler()
        self._is_closed = False
        # what a plan charges besides what the model needs
        self._kept_bytes = {"trace": self.tracer.most_bytes} if config.trace else {}
        self._assembly: Assembly | None = None
        self._generator: Generator | None = None
        self._worker = Worker(self._backend.abort.set, self._backend.abort.clear)

    def make_plan(self, context_tokens: int | None = None, logprobs_bytes: int = 0) -> Plan:
        """Decide who lives where, without taking memory.

        The context (this, else the config's, else the roomiest that fits) bounds prompt plus answer. Log-probabilities
        that the caller keeps take `logprobs_bytes`, which `generation.request` counts.
        Raises OverBudget naming the smallest `--ram` that works; UsageError for a context the model was not made for.
        """
        self._check_open()
        limit = ram_bytes(self.config.ram)
        if self._drive is None:
            self._drive = _drive_rate(self.model.manifest.files, limit)
        self._kept_bytes |= {"log-probabilities": logprobs_bytes} if logprobs_bytes else {}
        context = context_tokens or self.config.context_tokens
        trained = self.model.manifest.hyper.context_tokens
        if context is not None and context > trained:
            raise UsageError(
                f"a context of {context} tokens exceeds the {trained} the model was trained for",
                hint=f"-c {trained} is the most",
            )
        try:
            return self._plan(context, limit)
        except OverBudget:
            if not self._shrink_trace():
                raise
            return self._plan(context, limit)

    def smallest_ram_bytes(self, context_tokens: int) -> int:
        """The least budget that `make_plan` takes for this context."""
        self._check_open()
        return smallest_bytes(self._demand(self._blueprint(False, NARROW_DRIVE), context_tokens, 0))

    def start(self, plan: Plan) -> None:
        """Take the memory of a plan and begin to answer. Raises OverBudget, TransferError."""
        self._check_open()
        if self._assembly is not None:
            raise UsageError("the engine is running already", hint="an engine starts once; open another")
        self.plan = plan
        self._assembly = Assembly(
            plan.blueprint, plan.placement, plan.context_tokens, plan.limit_bytes, self._clock, self.tracer
        )
        forward = self._assembly.forward
        self._generator = Generator(forward, self.model.manifest.hyper.vocab_size, plan.context_tokens, self._clock)
        # on the thread that will compute: a second one would leave OpenMP with more threads than cores, and from then
        # on every one of them sleeps at each barrier (0.15 ms a block and token, measured on two cores)
        assembly = self._assembly
        (compute_s,) = self._worker.stream(lambda: iter([assembly.measure_compute_s(plan.weight_bytes)]))
        self.seconds_per_pass = max(plan.pass_floor_s, compute_s)

    def generate(self, prompt: str, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer to plain text, piece by piece, no chat template."""
        return (p.text for p in self.stream(self.encode(prompt), params) if p.text)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[str]:
        """The answer to a conversation, piece by piece. Earlier turns still in the KV cache are not computed again."""
        return (p.text for p in self.stream(self.encode_chat(messages), params) if p.text)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of plain text. Raises ContextOverflow where the plan has no memory to encode it."""
        return self.model.encode(prompt, self._context_tokens)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation. Raises UsageError, ContextOverflow."""
        return self.model.encode_chat(messages, self._context_tokens)

    @property
    def _context_tokens(self) -> int | None:
        return None if self.plan is None else self.plan.context_tokens

    def complete(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Completion:
        """The whole answer at once."""
        pieces = list(self.stream(prompt, params))
        tokens = tuple(p.token for p in pieces if p.token is not None)
        finish = pieces[-1].finish or FinishReason.CANCELLED
        assert self.report is not None
        usage = Usage(len(prompt), len(tokens), self.report.timing.cached_tokens)
        return Completion("".join(p.text for p in pieces), tokens, finish, usage)

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
    ) -> Stream[Piece]:
        """Tokens and text as they are made. Leaving the iterator early stops the computation; the KV cache stays.

        `on_prefill(done, total)` is called on the compute thread. Raises ContextOverflow and UsageError before any
        work, TransferError and ComputeError when a pass fails, Cancelled after `cancel`.
        """
        generator = self._running()
        settings = params or SamplingParams()
        generator.check(prompt, settings)
        return self._worker.stream(lambda: self._answer(generator, list(prompt), settings, on_prefill))

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """(tokens, vocabulary) at every position, computed afresh in chunks of `config.max_outputs`."""
        generator = self._running()
        generator.check(token_ids, SamplingParams(max_tokens=1))
        chunk = min(self.config.max_outputs, generator.max_chunk)
        parts = self._worker.stream(lambda: (part.copy() for part in generator.logits(token_ids, chunk)))
        return np.concatenate(list(parts))

    def cancel(self) -> None:
        """Stop what is being computed; whoever iterates over it gets Cancelled."""
        self._backend.abort.set()

    @property
    def ledger_breakdown(self) -> dict[str, int]:
        return {} if self._assembly is None else self._assembly.ledger.breakdown()

    def close(self) -> None:
        """Stop, and give every byte back. Closing again does nothing."""
        self._is_closed = True
        self.cancel()
        if self._assembly is not None:
            self._assembly.transfer.close()  # first: compute may be waiting for a read that is stuck
        self._worker.close()
        if self._assembly is not None:
            self._assembly.close()
            self._assembly = self._generator = None
        self._compute.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        """What follows would hand ggml a backend that is gone: it answers that by ending the process."""
        if self._is_closed:
            raise UsageError("the engine is closed", hint="open another")

    def _running(self) -> Generator:
        if self._generator is None:
            raise UsageError("the engine is not running", hint="use pipo.load(...), or start a plan first")
        return self._generator

    def _answer(
        self,
        generator: Generator,
        prompt: list[int],
        params: SamplingParams,
        on_prefill: Callable[[int, int], None],
    ) -> Iterator[Piece]:
        """On the compute thread: generate, and keep the accounts of prefill and decode apart."""
        assert self._assembly is not None
        forward = self._assembly.forward
        forward.take_stats()
        detokenizer = self.model.tokenizer.detokenizer(prompt)

        def note_chunk(done: int, total: int) -> None:
            self._peak.sample()
            on_prefill(done, total)

        prefill: PassStats | None = None
        num_generated = 0
        try:
            pieces = generator.generate(prompt, params, self.model.tokenizer.end_ids, detokenizer, note_chunk)
            for piece in pieces:
                prefill = prefill or forward.take_stats()
                num_generated += piece.token is not None
                if num_generated % TOKENS_PER_SAMPLE == 1:
                    self._peak.sample()
                yield piece
        finally:
            self._peak.sample()
            rest = forward.take_stats()
            decode = rest if prefill else PassStats()
            self.report = Report(generator.timing, prefill or rest, decode, num_generated, self._peak.peak_bytes)

    def _plan(self, context: int | None, limit: int) -> Plan:
        trained = self.model.manifest.hyper.context_tokens
        return self._plan_at(context, limit) if context is not None else self._plan_roomiest(limit, trained)

    def _shrink_trace(self) -> bool:
        """To a size that does not depend on the budget: else the smallest budget named would grow with itself."""
        if self._kept_bytes.get("trace", 0) <= LEAST_TRACE_BYTES:
            return False
        self.tracer = _tracer(0)
        self._kept_bytes["trace"] = self.tracer.most_bytes
        return True

    def _plan_roomiest(self, limit: int, trained: int) -> Plan:
        """Halve a context that nobody asked for until the rest fits beside it. Raises OverBudget for the least one."""
        context, least = self._roomiest_context(limit, trained), min(LEAST_CONTEXT_TOKENS, trained)
        while context > least:
            if self.smallest_ram_bytes(context) <= limit:
                break
            context = max(context // 2, least)
        return self._plan_at(context, limit)

    def _roomiest_context(self, limit: int, trained: int) -> int:
        """The largest power of two whose keys and values take at most a quarter of the budget, or the least one."""
        blueprint = self._blueprint(all_resident=False, drive=NARROW_DRIVE)
        context = min(LEAST_CONTEXT_TOKENS, trained)
        while context * 2 <= trained and blueprint.kv_shape(context * 2).num_bytes * KV_SHARE <= limit:
            context *= 2
        return context

    def _plan_at(self, context_tokens: int, limit: int) -> Plan:
        """Try the faster set-ups first; the last, the narrowest, is the one that names the smallest budget."""
        assert self._drive is not None
        wide = self._drive.settings
        for all_resident, drive in ((True, wide), (False, wide), (True, NARROW_DRIVE)):
            blueprint = self._blueprint(all_resident, drive)
            if blueprint.bounce_bytes * WIDE_SHARE > limit and drive is wide:
                continue
            placement = self._try(blueprint, context_tokens, limit)
            if placement is not None and (all(placement.resident) or not all_resident):
                return self._plan_of(blueprint, placement, context_tokens, limit)
        blueprint = self._blueprint(False, NARROW_DRIVE)
        try:
            placement = place(self._demand(blueprint, context_tokens, limit))
        except OverBudget as error:
            raise self._with_context_hint(error, blueprint, context_tokens, limit) from None
        return self._plan_of(blueprint, placement, context_tokens, limit)

    def _with_context_hint(
        self, error: OverBudget, blueprint: Blueprint, context_tokens: int, limit: int
    ) -> OverBudget:
        """Say which context would fit, where a shorter one would: the excess in rows of the KV cache."""
        excess = (error.smallest_bytes or limit) - limit
        classes_too_many = -(-excess // blueprint.kv_shape(ROWS_PER_CLASS).num_bytes)
        context = kv_rows_class(context_tokens) - classes_too_many * ROWS_PER_CLASS
        if context < ROWS_PER_CLASS:
            return error
        hint = f"-c {context} fits; {error.hint}"
        return OverBudget(error.message, smallest_bytes=error.smallest_bytes, hint=hint)

    def _try(self, blueprint: Blueprint, context_tokens: int, limit: int) -> Placement | None:
        try:
            return place(self._demand(blueprint, context_tokens, limit))
        except OverBudget:
            return None

    def _demand(self, blueprint: Blueprint, context_tokens: int, limit: int) -> Demand:
        return demand(blueprint, context_tokens, limit, self._process_bytes(), self._kept_bytes)

    def _blueprint(self, all_resident: bool, drive: DriveSettings) -> Blueprint:
        layouts = choose_layouts(self.model.stages, self._compute.repack, self.config.layout, all_resident)
        return Blueprint(self.model.manifest, self.model.stages, layouts, self._compute, self.config, drive)

    def _plan_of(self, blueprint: Blueprint, placement: Placement, context_tokens: int, limit: int) -> Plan:
        assert self._drive is not None
        tensors = self.model.manifest.tensors
        repacked = {tensors[name].type.name for name in blueprint.layouts.repacked}
        weights = sum(spec.num_bytes for stage in self.model.stages for spec in stage.matrices.values())
        return Plan(placement, context_tokens, limit, weights, tuple(sorted(repacked)), self._drive, blueprint)

    def _process_bytes(self) -> int:
        return max(PROCESS_BYTES, round_up(process_memory().anonymous_bytes, PROCESS_STEP))

    def _check_types(self) -> None:
        for spec in self.model.manifest.tensors.values():
            if not self._lib.multiplies(spec.type):
                is_new = not self._lib.computes(spec.type)
                raise UnsupportedModel(
                    f"{self.model.manifest.name}: {spec.name} is {spec.type.name}, which libggml "
                    f"{self._lib.version_text} does not compute",
                    hint="pip install 'pipo[native]' brings a newer libggml" if is_new else None,
                )


def _tracer(limit_bytes: int) -> Tracer:
    """Keeps as many zones as their share of the budget holds."""
    return Tracer(min(max(limit_bytes // TRACE_SHARE, LEAST_TRACE_BYTES) // ZONE_BYTES, MAX_ZONES))


def _drive_rate(files: Sequence[Path], limit_bytes: int) -> DriveRate:
    """The best way to read this drive, measured at first use with buffers that are small beside the budget."""
    affordable = [c for c in QUICK_COMBOS if 2 * c.chunk_bytes * c.num_workers * WIDE_SHARE <= limit_bytes]
    combos = affordable or QUICK_COMBOS[:1]
    kind = "" if len(combos) == len(QUICK_COMBOS) else f":first-{len(combos)}"
    return best_rate(drive_rates(files, measure=partial(measure_drive, combos=combos), kind=kind))
