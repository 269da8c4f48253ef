"""The engine's own process: what the asking one starts, and what ends with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace

from pipo.base.config import EngineConfig
from pipo.base.errors import EngineDied, OverBudget, PipoError
from pipo.base.units import format_size
from pipo.engine import Engine
from pipo.generation.events import Cancel, Event
from pipo.generation.inbox import CommandQueue
from pipo.generation.waiting import DEFAULT_QUEUE
from pipo.hardware.budget import ram_bytes
from pipo.hardware.memory import PeakSampler
from pipo.model_file import ModelFile
from pipo.plan import TYPICAL
from pipo.plan_facts import served_plan_dict
from pipo.planner.placement import smallest_ram_text
from pipo.serving.contract import EngineInfo, EngineStats
from pipo.serving.wire import Asked, EngineSetup, Failed, Progressed, Said, Started, StatsWanted, Wire

LOOK_S = 1.0  # for the asking process: its end also closes the pipe, unless a child of it holds that open
ENOUGH_CONTEXT = 4096  # tokens, for which an engine that may choose answers fewer at a time
CLOSE_S = 10.0  # a read that is stuck is left behind after this


def main() -> None:
    """Serve whoever holds the other ends of standard input and output, until that closes them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the asking process, which ends this one
    wire = _take_standard_streams()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        setup = wire.receive()
        assert isinstance(setup, EngineSetup)
        with _start(setup, wire) as engine:
            _Service(engine, wire).run()
    except (EOFError, BrokenPipeError):
        pass  # nobody is there to be told
    except PipoError as error:
        _tell(wire, error)
    except BaseException as error:
        _tell(wire, EngineDied(f"the engine failed: {error!r}", hint="this is a fault of pipo: please report it"))
        raise  # its traceback goes to standard error


def _take_standard_streams() -> Wire:
    """What anybody prints goes to standard error from now on."""
    wire = Wire(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return wire


def _end_with(parent_id: int) -> None:
    while os.getppid() == parent_id:
        threading.Event().wait(LOOK_S)
    os._exit(1)


def _tell(wire: Wire, error: PipoError) -> None:
    with suppress(OSError):
        wire.send(Failed(error))


def _start(setup: EngineSetup, wire: Wire) -> Engine:
    """Raises what opening, planning and starting raise."""
    limit = ram_bytes(setup.config.ram)
    config = replace(setup.config, ram=str(limit))  # what is free changes as it is taken
    model = _open(setup, limit)
    if setup.most_sequences is not None:
        config = replace(config, num_sequences=_affordable_sequences(setup, model, config))
    engine = _charged(setup, model, config)
    try:
        workload = setup.workload or replace(TYPICAL, num_sequences=config.num_sequences)

        def tell(step: str, fraction: float) -> None:
            wire.send(Progressed(step, fraction))

        engine.start(engine.make_plan(setup.context_tokens, workload=workload, on_probe=tell))
        wire.send(Started(_info(engine)))
    except BaseException:
        engine.close()
        raise
    return engine


def _affordable_sequences(setup: EngineSetup, model: ModelFile, config: EngineConfig) -> int:
    context = setup.context_tokens or config.context_tokens or min(model.manifest.hyper.context_tokens, ENOUGH_CONTEXT)
    num_sequences = setup.most_sequences or 1
    while num_sequences > 1:
        with closing(_charged(setup, model, replace(config, num_sequences=num_sequences))) as engine:
            try:
                engine.make_plan(context)
                break
            except OverBudget:
                num_sequences //= 2
    return num_sequences


def _charged(setup: EngineSetup, model: ModelFile, config: EngineConfig) -> Engine:
    engine = Engine(model, config)
    engine.charge(setup.asking, setup.asking_bytes)
    engine.charge("queue", DEFAULT_QUEUE.num_bytes)
    return engine


def _open(setup: EngineSetup, limit_bytes: int) -> ModelFile:
    """Raises OverBudget where building the tokenizer would take more than the asking process leaves."""
    try:
        return ModelFile(setup.model, limit_bytes - setup.asking_bytes)
    except OverBudget as error:
        smallest = (error.smallest_bytes or 0) + setup.asking_bytes
        message = f"{error.message} · {setup.asking} {format_size(setup.asking_bytes)} besides"
        hint = f"the smallest --ram that builds it is {smallest_ram_text(smallest)}"
        raise OverBudget(message, smallest_bytes=smallest, hint=hint) from None


def _info(engine: Engine) -> EngineInfo:
    plan = engine.plan
    assert plan is not None
    return EngineInfo(
        model=engine.model.manifest.name,
        context_tokens=plan.context_tokens,
        num_sequences=engine.config.num_sequences,
        limit_bytes=plan.limit_bytes,
        adapters=tuple(str(each) for each in engine.adapters),
        plan=served_plan_dict(engine.model, plan),
    )


class _Service:
    """Hears commands on a thread of its own while the engine computes on another."""

    def __init__(self, engine: Engine, wire: Wire) -> None:
        self._engine = engine
        self._wire = wire
        self._inbox = CommandQueue()
        self._peak = PeakSampler()

    def run(self) -> None:
        """Until the asking process closes its end. Raises Cancelled then, where requests were open."""
        threading.Thread(target=self._hear, name="hear", daemon=True).start()
        self._engine.serve(self._inbox, self._deliver)

    def _deliver(self, events: Sequence[Event]) -> None:
        self._peak.sample()
        if events:
            self._wire.send(Said(tuple(events)))

    def _hear(self) -> None:
        try:
            while True:
                self._take(self._wire.receive())
        except EOFError:
            pass
        finally:
            late = threading.Timer(CLOSE_S, os._exit, (1,))
            late.daemon = True
            late.start()
            self._inbox.close()
            self._engine.cancel()

    def _take(self, message: object) -> None:
        if isinstance(message, StatsWanted):
            self._wire.send(self._stats())
            return
        assert isinstance(message, Asked)
        self._inbox.put(message.commands)
        for command in message.commands:
            if isinstance(command, Cancel):
                self._engine.batcher.cancel(command.request_id)  # at once, where only its pass is in the way

    def _stats(self) -> EngineStats:
        engine, totals = self._engine, self._engine.totals
        batcher = engine.batcher
        return EngineStats(
            num_waiting=batcher.num_waiting,
            num_running=batcher.num_running,
            num_unread=batcher.num_unread,
            prompt_tokens=batcher.counters.prompt_tokens,
            cached_tokens=batcher.counters.cached_tokens,
            completion_tokens=batcher.counters.completion_tokens,
            num_passes=totals.num_passes,
            bytes_read=totals.bytes_read,
            compute_s=totals.compute_s,
            wall_s=totals.wall_s,
            stall_s={cause.value: seconds for cause, seconds in totals.stall_s.items()},
            ledger=engine.ledger_breakdown,
            limit_bytes=engine.plan.limit_bytes if engine.plan else 0,
            anonymous_bytes=self._peak.sample(),
            peak_bytes=self._peak.peak_bytes,
        )
