"""The engine: open a model inside a memory budget, plan, answer, close. `pipo.api` is its short form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from pipo.answering import Answering, Report, start_answering
from pipo.base.adapter import AdapterChoice, AdapterId, NamedAdapter
from pipo.base.clock import RealClock
from pipo.base.config import EngineConfig
from pipo.base.errors import OverBudget, UsageError
from pipo.base.machine import MachineProfile
from pipo.base.trace import LEAST_TRACE_BYTES, NullTracer, Tracer
from pipo.compute import ggml
from pipo.device_shares import device_of
from pipo.generation.adapters import AdapterSet, find_adapter, weights_of, weights_of_each
from pipo.generation.answer import Piece, completion_of
from pipo.generation.batcher import Batcher
from pipo.generation.events import Event
from pipo.generation.inbox import Inbox, Iterated
from pipo.generation.request import Completion, ConstraintSpec, GenerationRequest, SamplingParams
from pipo.generation.scoring import Scorer
from pipo.generation.whole_answers import completions, requests_of
from pipo.generation.windows import Windows
from pipo.generation.worker import PassInterrupt, Stream, Worker
from pipo.hardware.budget import ram_bytes
from pipo.hardware.memory import PeakSampler
from pipo.hardware.probe import Progress
from pipo.model_file import ModelFile
from pipo.pipeline.assembly import Assembly
from pipo.pipeline.expert_stages import NoteRouting
from pipo.pipeline.stage_graphs import compute_on_cpu
from pipo.pipeline.stats import PassStats
from pipo.plan import Plan, PlanMaker
from pipo.planner.cost import PassLoad
from pipo.planner.predict import Workload
from pipo.planner.simulate import Forecast
from pipo.text.chat_template import Message
from pipo.type_checks import check_adapter_types, check_types, open_adapters
from pipo.window_plan import plan_windows


class Engine:
    """One model inside one budget. `load` opens and starts one; close it, or use it as a context manager.

    Computation runs on a thread of its own. Threads: one request at a time; `cancel` from any thread.
    """

    def __init__(self, model: ModelFile, config: EngineConfig) -> None:
        model.check_can_run()
        self.model = model
        self.config = config
        limit = ram_bytes(config.ram)  # first: a budget that cannot be read must leave nothing behind
        self.tracer = Tracer.within(limit) if config.trace else NullTracer()
        self.plan: Plan | None = None
        self._profile: MachineProfile | None = None  # that plans were made with
        self._clock = RealClock()
        self._lib = ggml.load()
        check_types(self._lib, model)
        adapters = open_adapters(self._lib, model, config)
        self._compute, self._backend = compute_on_cpu(self._lib, config.num_threads)
        try:
            device = device_of(self._lib, config)
            self._planner = PlanMaker(model, config, self._compute, device, adapters=adapters)
        except BaseException:
            self._compute.close()
            raise
        self._peak = PeakSampler()
        self._is_closed = False
        self.charge("trace", self.tracer.most_bytes if config.trace else 0)
        self._assembly: Assembly | None = None
        self._answering: Answering | None = None
        self._worker = Worker(self._backend.abort.set, self._backend.abort.clear)

    def charge(self, name: str, num_bytes: int) -> None:
        """What plans from now on leave of the budget to somebody else, whom the ledger names."""
        self._planner.kept_bytes.pop(name, None)
        if num_bytes:
            self._planner.kept_bytes[name] = num_bytes

    def make_plan(
        self,
        context_tokens: int | None = None,
        logprobs_bytes: int = 0,
        workload: Workload | None = None,
        on_probe: Progress = lambda step, fraction: None,
    ) -> Plan:
        """Decide who lives where, without taking memory.

        With a `workload` the plan is the one predicted to serve it soonest, from what this machine was measured to do:
        before the first such plan that takes some seconds, of which `on_probe` hears.

        The context (this, else the config's, else the roomiest that fits) bounds prompt plus answer. Log-probabilities
        that the caller keeps take `logprobs_bytes`, which `generation.request` counts.
        Raises OverBudget naming the smallest budget that works; UsageError for a context the model was not made for.
        """
        self._check_open()
        self.charge("log-probabilities", logprobs_bytes)
        self.charge("scores", 0)
        try:
            return self._planned(context_tokens, workload, on_probe)
        except OverBudget:
            if not self._shrink_trace():
                raise
            return self._planned(context_tokens, workload, on_probe)

    def _planned(self, context_tokens: int | None, workload: Workload | None, on_probe: Progress) -> Plan:
        """A budget that is too small is refused before anything is measured; a probe may leave less of it."""
        machine = None
        if workload is not None:
            machine = self._machine(on_probe, before=lambda: self._planner.make(context_tokens))
        return self._planner.make(context_tokens, workload, machine)

    def _machine(self, on_probe: Progress, before: Callable[[], object] = lambda: None) -> MachineProfile | None:
        """What this machine was measured to do, now or before; None where a budget or a file is too small to tell.
        `before` it is measured now, something else is done.
        """
        # on the thread that will compute: a second one would leave OpenMP with more threads than cores, and from then
        # on every one of them sleeps at each barrier (0.15 ms a block and token, measured on two cores)
        (self._profile,) = self._worker.stream(lambda: iter([self._planner.machine(on_probe, before)]))
        return self._profile

    def plan_windows(self, windows: Windows, kept_bytes: int) -> Plan:
        """A plan to `score` with, whatever the config's `max_outputs`; that keeps `kept_bytes`. Raises OverBudget."""
        self._check_open()
        self.charge("log-probabilities", 0)
        self.charge("scores", kept_bytes)
        return plan_windows(self._planner, windows)

    def forecast(self, plan: Plan, load: PassLoad, on_probe: Progress = lambda step, fraction: None) -> Forecast:
        """What a pass among many of this load would take on this machine, which is measured at first.

        Raises UsageError where the machine cannot be measured with this budget and file.
        """
        self._check_open()
        machine = self._machine(on_probe)
        if machine is None:
            raise UsageError("the budget or the file is too small to measure this machine with")
        return self._planner.forecast(plan, load, machine)

    def smallest_ram_bytes(self, context_tokens: int) -> int:
        """The least budget that `make_plan` takes for this context."""
        self._check_open()
        return self._planner.smallest_ram_bytes(context_tokens)

    def start(self, plan: Plan) -> None:
        """Take the memory of a plan and begin to answer. Raises OverBudget, TransferError."""
        self._check_open()
        if self._assembly is not None:
            raise UsageError("the engine is running already", hint="an engine starts once; open another")
        sizes = plan.blueprint, plan.placement, plan.context_tokens, plan.limit_bytes
        self._assembly = Assembly(*sizes, self._clock, self.tracer, plan.decode_threads)
        abort = self._backend.abort
        self._answering = start_answering(
            self._assembly.forward,
            self.model,
            plan,
            lambda: self.adapters,
            self._planner.prefill_beside_decode(plan, self._profile),
            PassInterrupt(abort.set, abort.clear, self._worker),
            self._peak,
            self._clock,
        )
        self.plan = plan

    @property
    def report(self) -> Report | None:
        """What the last request cost."""
        return self._answering.report if self._answering else None

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

    def complete(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        adapters: AdapterSet = None,
        constraint: ConstraintSpec | None = None,
    ) -> Completion:
        """The whole answer at once. Raises as `stream`."""
        pieces = list(self.stream(prompt, params, adapters=adapters, constraint=constraint))
        assert self.report is not None
        return completion_of(prompt, pieces, self.report.timing.cached_tokens)

    def complete_batch(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapters: Sequence[AdapterSet] | None = None,
    ) -> list[Completion]:
        """Whole answers to any number of prompts, of which `config.num_sequences` at a time share every sweep of the
        weights. `adapters` by prompt: each may have others.

        Raises UsageError and ContextOverflow before any work, TransferError, ComputeError and Cancelled.
        """
        generator = self._running().generator
        weights_of_each(adapters, len(prompts), self.adapters)  # raises what is wrong with one of them
        requests = requests_of(prompts, params, adapters)
        for request in requests:
            generator.check(request.prompt, request.params)
        with closing(self.stream_requests(requests)) as events:
            return completions(requests, events)

    def stream_requests(self, requests: Iterable[GenerationRequest]) -> Stream[Event]:
        """What is said of requests, numbered in their order: pieces of the answer, then a summary or the error that
        ended it. One joins as soon as another has left; prompts that begin alike share what is computed.

        Raises Cancelled; TransferError and ComputeError only end the requests that they are of.
        """
        answering = self._running()
        inbox = Iterated(requests, lambda: answering.batcher.has_free_slot)
        return self._worker.stream(lambda: chain.from_iterable(answering.answer_requests(inbox)))

    def serve(self, inbox: Inbox, deliver: Callable[[list[Event]], None]) -> None:
        """Answer until nothing more comes; `deliver` hears, on the compute thread, what each pass gave. Close the inbox
        before the engine. Raises Cancelled, once `deliver` has heard of it for every request.
        """
        answering = self._running()

        def answer() -> Iterator[None]:
            for events in answering.answer_requests(inbox):
                deliver(events)
            yield None

        list(self._worker.stream(answer))

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
        *,
        adapters: AdapterSet = None,
        constraint: ConstraintSpec | None = None,
        shown: frozenset[int] = frozenset(),
    ) -> Stream[Piece]:
        """Tokens and text as they are made. Leaving the iterator early stops the computation; the KV cache stays.

        The answer follows the `constraint`, which the config must have kept memory for. `shown` are control tokens
        that are part of its text.

        A prompt that begins with the last one's tokens computes only the rest, where it has the same adapters.
        `on_prefill(done, total)` is called on the compute thread. Raises ContextOverflow and UsageError before any
        work, TransferError and ComputeError when a pass fails, Cancelled after `cancel`.
        """
        answering, settings = self._running(), params or SamplingParams()
        answering.generator.check(prompt, settings)
        weights = weights_of(adapters, self.adapters)
        held = None if constraint is None else answering.constraint(constraint)
        return self._worker.stream(lambda: answering.answer(list(prompt), settings, weights, on_prefill, held, shown))

    def logits(self, token_ids: Sequence[int], *, adapters: AdapterSet = None) -> npt.NDArray[np.float32]:
        """(tokens, vocabulary) at every position, computed afresh in chunks of `config.max_outputs`."""
        answering = self._running()
        generator = answering.generator
        generator.check(token_ids, SamplingParams(max_tokens=1))
        chunk = min(self.config.max_outputs, generator.max_chunk)
        weights = weights_of(adapters, self.adapters)

        def parts() -> Iterator[npt.NDArray[np.float32]]:
            return (part.copy() for part in answering.use_generator(weights).logits(token_ids, chunk))

        return np.concatenate(list(self._worker.stream(parts)))

    @property
    def adapters(self) -> Mapping[AdapterId, NamedAdapter]:
        """Those that are loaded, by what requests call them."""
        return {} if self._assembly is None else self._assembly.adapters

    def add_adapter(self, path: str | Path, scale: float = 1.0) -> AdapterId:
        """Load a LoRA adapter between requests, into what the plan has left of the budget. Sequences have it with this
        scale from then on, unless their request says otherwise. Returns what requests call it.

        Raises ModelError, UsageError, OverBudget, TransferError; then nothing has changed.
        """
        self._running()
        named = self.model.open_adapter(AdapterChoice(Path(path), scale), self.adapters)
        check_adapter_types(self._lib, named.adapter)
        self._change_adapters(lambda assembly: assembly.add_adapter(named))
        return named.id

    def remove_adapter(self, adapter_id: str) -> None:
        """Give its memory back, between requests. Raises UsageError where there is none of this name."""
        named = find_adapter(adapter_id, self.adapters)
        self._change_adapters(lambda assembly: assembly.remove_adapter(named.id))

    def _change_adapters(self, change: Callable[[Assembly], None]) -> None:
        """On the compute thread, once it is at rest. What is in the KV cache is of no use any more."""
        answering, assembly = self._running(), self._assembly
        assert assembly is not None

        def steps() -> Iterator[None]:
            answering.forget()
            change(assembly)
            yield None

        list(self._worker.stream(steps))

    def score(self, windows: Windows, scorer: Scorer) -> Stream[int]:
        """Show `scorer` the logits of each scored position, on the compute thread. Yields the tokens of every pass, as
        many as the plan allows. Raises as `stream`.
        """
        answering, weights = self._running(), weights_of(None, self.adapters)
        answering.generator.check(windows.inputs(0), SamplingParams(max_tokens=1))
        return self._worker.stream(lambda: answering.score(windows, scorer, weights))

    def cancel(self) -> None:
        """Stop what is being computed; whoever iterates over it gets Cancelled."""
        self._worker.interrupt()

    def note_experts(self, on_routing: NoteRouting) -> None:
        """`on_routing(block, routing)` hears, on the compute thread, which experts every pass chooses. Of a dense model
        there is nothing to hear.
        """
        self._running()
        assert self._assembly is not None
        if self._assembly.forward.experts is not None:
            self._assembly.forward.experts.on_routing = on_routing

    @property
    def totals(self) -> PassStats:
        """Of all passes that `serve` and `stream_requests` made."""
        return self._running().totals

    @property
    def batcher(self) -> Batcher:
        """Whose counters tell of what `serve` and `stream_requests` answer. Threads: reading them, any."""
        return self._running().batcher

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
            self._assembly = None
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

    def _running(self) -> Answering:
        if self._answering is None or self._assembly is None:
            raise UsageError("the engine is not running", hint="use pipo.load(...), or start a plan first")
        return self._answering

    def _shrink_trace(self) -> bool:
        """To a size that does not depend on the budget: else the smallest budget named would grow with itself."""
        if self._planner.kept_bytes.get("trace", 0) <= LEAST_TRACE_BYTES:
            return False
        self.tracer = Tracer.within(0)
        self.charge("trace", self.tracer.most_bytes)
        return True
