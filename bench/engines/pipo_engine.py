"""pipo in a child process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import nan
from time import perf_counter
from typing import Any

import numpy as np

from bench.engines.timed_engine import PROMPT_TOKENS, TimedEngine
from bench.messages import (
    AnswerAlone,
    Batch,
    BatchFacts,
    ExpertReplay,
    FirstToken,
    Forecast,
    Library,
    LoneAnswer,
    Passes,
    PassForecast,
    PipoSetup,
    Plan,
    PlanFacts,
    ReplayExperts,
    Request,
    Started,
)  # fmt: skip
from bench.prompts import random_prompt
from pipo.answering import Report
from pipo.base.config import EngineConfig
from pipo.base.errors import OverBudget, PipoError
from pipo.base.manifest import Extent
from pipo.compute import ggml
from pipo.compute.devices import cpu_features
from pipo.engine import Engine
from pipo.generation.answer import Piece
from pipo.generation.request import GenerationRequest, SamplingParams
from pipo.model_file import ModelFile
from pipo.pipeline.expert_trace import BlockVisit, ExpertTrace, TraceHead, policies
from pipo.pipeline.units import make_units
from pipo.plan import Plan as EnginePlan
from pipo.planner.cost import PassLoad
from pipo.planner.predict import Workload
from pipo.planner.simulate import Lane

_TELLING_FEATURES = frozenset({"AVX2", "AVX512", "AVX512_BF16", "AMX_INT8", "NEON", "SVE", "LLAMAFILE", "REPACK"})

SPARE_PASSES = 4  # in which prompts are read beside answers that have begun


class PipoEngine(TimedEngine[PipoSetup]):
    """One engine, started once."""

    def __init__(self) -> None:
        super().__init__("pipo", PipoSetup)
        self._engine: Engine | None = None
        self._visits: list[BlockVisit] = []  # of experts, since the engine started

    def answer(self, request: Request[Any]) -> object:
        match request:
            case Library():
                return _library()
            case Plan():
                return _plan(request.setup)
            case Forecast():
                return _forecast(request.setup, request.num_tokens)
            case Batch():
                return self._batch(request)
            case AnswerAlone():
                return self._answer_alone(request)
            case ReplayExperts():
                return self._replay()
        return super().answer(request)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _start(self, setup: PipoSetup) -> Started:
        begin = perf_counter()
        self._setup_of_start = setup
        self._engine = Engine(ModelFile(setup.path), _config(setup))
        self._vocab_size = self._engine.model.manifest.hyper.vocab_size
        self._engine.start(self._engine.make_plan(workload=_workload(setup)))
        self._engine.note_experts(
            lambda block, routing: self._visits.append(BlockVisit(block, np.asarray(routing.experts).tolist()))
        )
        return Started(perf_counter() - begin, _library())

    def _decode(self, num_passes: int, prompt: list[int]) -> Passes:
        """Passes after the first token: the first one would profit from what was read ahead while nobody asked."""
        return self._passes([time for time, _ in self._pieces(prompt, num_passes + 1)])

    def _passes(self, times: Sequence[float]) -> Passes:
        """Of the newest answer, whose tokens came at these times."""
        report = self._report()
        return Passes(
            num_passes=len(times) - 1,
            seconds=tuple(after - before for before, after in pairwise(times)),
            bytes_read=report.decode.bytes_read,
            compute_s=report.decode.compute_s,
            stall_s=tuple((cause.value, seconds) for cause, seconds in report.decode.stall_s.items()),
            peak_anonymous_bytes=report.peak_anonymous_bytes,
            experts=_experts(report),
        )

    def _replay(self) -> ExpertReplay:
        assert self._engine is not None and self._engine.plan is not None
        hyper, slots = self._engine.model.manifest.hyper, self._engine.plan.placement.expert_slots
        num_blocks = 1 + max(visit.block for visit in self._visits)
        head = TraceHead("", num_blocks, hyper.num_experts, hyper.num_experts_per_tok)
        trace, num_slots = ExpertTrace(head, self._visits), sum(each.num_slots for each in slots)
        return ExpertReplay(
            num_slots, num_blocks * hyper.num_experts, trace.num_needed, tuple(policies(trace, num_slots))
        )

    def _decode_batch(self, num_sequences: int, num_passes: int) -> Passes:
        """In an engine of its own, planned for as many: the keys and values of all have to fit."""
        assert self._engine is not None
        setup = replace(self._setup_of_start, context_tokens=PROMPT_TOKENS + num_passes + 1)
        return self._batch(Batch(setup, num_sequences, PROMPT_TOKENS, num_passes)).passes

    def _batch(self, request: Batch) -> BatchFacts:
        self.close()
        config = replace(_config(request.setup), num_sequences=request.num_sequences)
        self._engine = Engine(ModelFile(request.setup.path), config)
        self._vocab_size = self._engine.model.manifest.hyper.vocab_size
        workload = Workload(request.prompt_tokens, request.num_passes + 1, request.num_sequences)
        plan = self._engine.make_plan(workload=workload)
        self._engine.start(plan)
        prompts = self._prompts(request.num_sequences, request.prompt_tokens)
        params = SamplingParams(max_tokens=request.num_passes + SPARE_PASSES, temperature=0, ignore_eos=True)
        answers: list[list[int]] = [[] for _ in prompts]
        longest, times = 0, list[float]()  # when passes ended, from the first on that found all answers begun
        for i, event in self._engine.stream_requests(GenerationRequest(prompt, params) for prompt in prompts):
            if isinstance(event, PipoError):
                raise event
            if not isinstance(event, Piece) or event.token is None:
                continue
            answers[i].append(event.token.token_id)
            if len(answers[i]) > longest:
                longest += 1
                times += [perf_counter()] if all(answers) else []
        predicted_s = plan.prediction.decode.seconds if plan.prediction else nan  # of a toy nothing is predicted
        return BatchFacts(self._passes(times), predicted_s, tuple(tuple(answer) for answer in answers))

    def _answer_alone(self, request: AnswerAlone) -> tuple[LoneAnswer, ...]:
        assert self._engine is not None
        params = SamplingParams(max_tokens=request.num_tokens, temperature=0, ignore_eos=True, logprobs=2)
        found = []
        for prompt in self._prompts(request.num_prompts, request.prompt_tokens):
            tokens = [piece.token for piece in self._engine.stream(prompt, params) if piece.token is not None]
            leads = tuple(token.top[0][1] - token.top[1][1] for token in tokens)
            found.append(LoneAnswer(tuple(token.token_id for token in tokens), leads))
        return tuple(found)

    def _prompts(self, num_prompts: int, num_tokens: int) -> list[list[int]]:
        return [random_prompt(num_tokens, i, self._vocab_size) for i in range(num_prompts)]

    def _prefill(self, num_tokens: int, seed: int) -> FirstToken:
        prompt = random_prompt(num_tokens, seed, self._vocab_size)
        begin = perf_counter()
        seconds = self._pieces(prompt, 1)[0][0] - begin
        report = self._report()
        stats = report.prefill
        return FirstToken(num_tokens, seconds, stats.num_passes, stats.bytes_read, report.peak_anonymous_bytes)

    def _greedy(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(id for _, id in self._pieces(random_prompt(PROMPT_TOKENS, 0, self._vocab_size), num_tokens))

    def _pieces(self, prompt: list[int], num_tokens: int) -> list[tuple[float, int]]:
        """When each token arrived, and which one it was."""
        assert self._engine is not None
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        pieces = self._engine.stream(prompt, params)
        return [(perf_counter(), piece.token.token_id) for piece in pieces if piece.token is not None]

    def _report(self) -> Report:
        assert self._engine is not None and self._engine.report is not None
        return self._engine.report


def _config(setup: PipoSetup) -> EngineConfig:
    return EngineConfig(
        ram=str(setup.ram_bytes),
        context_tokens=setup.context_tokens,
        threads=setup.threads,
        schedule=setup.schedule,
        layout=setup.layout,
        prefill_chunk=setup.prefill_chunk,
    )


def _experts(report: Report) -> tuple[tuple[str, float], ...]:
    """Of decode, per pass."""
    if report.decode.experts is None:
        return ()
    total, num = report.decode.experts.total, max(report.decode.num_passes, 1)
    counts = {"needed": total.num_needed, "there": total.num_hits, "guessed": total.num_guessed,
              "missed": total.num_missed, "right": total.num_right, "foretold": total.num_foretold}  # fmt: skip
    return tuple((name, count / num) for name, count in counts.items())


def _workload(setup: PipoSetup) -> Workload | None:
    return Workload(*setup.request) if setup.request else None


def _plan(setup: PipoSetup) -> PlanFacts:
    with Engine(ModelFile(setup.path), _config(setup)) as engine:
        try:
            plan = engine.make_plan(workload=_workload(setup))
        except OverBudget as error:
            return PlanFacts(fits=False, smallest_bytes=error.smallest_bytes or 0)
        return PlanFacts(
            fits=True,
            needed_bytes=plan.placement.num_bytes,
            weight_bytes=plan.weight_bytes,
            resident_bytes=plan.in_use.resident_bytes,
            streamed_bytes=plan.in_use.streamed_bytes,
            chunk_tokens=plan.placement.chunk.num_tokens,
            repacked_types=plan.repacked_types,
            drive=plan.blueprint.drive,
            streamed_extents=tuple(_streamed_extents(engine.model, plan)),
        )


def _forecast(setup: PipoSetup, num_tokens: int) -> PassForecast:
    with Engine(ModelFile(setup.path), _config(setup)) as engine:
        plan = engine.make_plan(workload=_workload(setup))
        expected = engine.forecast(plan, PassLoad(1, num_tokens, num_tokens * 3))
    return PassForecast(expected.seconds, expected.busy[Lane.CPU], expected.busy[Lane.DRIVE])


def _streamed_extents(model: ModelFile, plan: EnginePlan) -> list[Extent]:
    """The file bytes a pass reads. The head counts as one unit here, which changes nothing about its bytes."""
    units = make_units(model.stages, plan.blueprint.layouts)
    streamed = [unit for unit, stays in zip(units, plan.in_use.resident, strict=True) if not stays]
    return [read.extent for unit in streamed for read in unit.layout.reads]


def _library() -> str:
    """Version, provider, and those features of the build that decide how fast it is."""
    lib = ggml.load()
    features = " ".join(name for name in cpu_features(lib) if name in _TELLING_FEATURES)
    return f"libggml {lib.version_text} of {lib.provider.name} ({features})"
