"""One model and one budget: everybody in the same memory limit, taking turns with the bare drive between them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.child import Child
from bench.host_memory import take_memory
from bench.lab import Lab, Unmeasurable
from bench.messages import FolderSetup, LlamaSetup, PipoSetup, PlanFacts, Prepare, Start
from bench.model_files import copied, drop_cached
from bench.peers.entrants import TORCH_BYTES, Entrant
from bench.peers.environments import NotInstalled, ensure_python
from bench.peers.seat import Opened, Seat
from bench.raw_drive import RawDrive
from pipo.base.units import MIB, format_size
from pipo.hardware.memory import available_memory

log = logging.getLogger(__name__)
BATCH = 8
_BATCH_PASSES = 2
_PREPARE_LIMIT_S = 300.0  # AirLLM writes the checkpoint once more, a file per layer


@dataclass(frozen=True, slots=True)
class Ground:
    """What everybody is given: `folder` holds the same weights for those who read no GGUF. `share` of the file.

    A toy is smaller than the process around it: its budget is one that holds it, or one that streams.
    """

    share: float
    folder: Path | None
    environments: Path
    is_toy: bool = False

    @property
    def is_tight(self) -> bool:
        return self.share < 1

    def ram_bytes(self, lab: Lab) -> int:
        """Raises Unmeasurable."""
        if not self.is_toy:
            return int(lab.file_bytes * self.share)
        return lab.tight_bytes() if self.is_tight else lab.roomy_bytes


@dataclass(slots=True)
class Score:
    """What a contest gave. `raw` is the read rate before each round, in bytes/s; empty where nothing streams."""

    facts: PlanFacts
    ram_bytes: int
    pipo: Seat
    resident: Seat | None
    peers: list[Seat]
    drive: RawDrive | None
    raw: list[float] = field(default_factory=list)

    @property
    def seats(self) -> list[Seat]:
        return [self.pipo, *([self.resident] if self.resident else []), *self.peers]


@contextmanager
def contest(lab: Lab, ground: Ground, entrants: Sequence[Entrant]) -> Iterator[Score]:
    """Everybody, not yet started: `run` does the rest. Raises ChildFailed, Unmeasurable."""
    ram_bytes = ground.ram_bytes(lab)
    setup = lab.answering(ram_bytes)
    facts = _plan(lab, setup, ground, len(entrants))
    drive = lab.open_drive(facts) if facts.streamed_bytes else None
    with ExitStack() as stack:
        pipo = Seat("pipo", lambda: lab.open_limited(setup), Start(setup))
        like = lab.resident_like(facts) if ground.is_tight else None
        resident = None if like is None else Seat("pipo resident", _outside(lab), Start(like))
        peers = list(_peers(lab, ground, ram_bytes, entrants, stack))
        score = Score(facts, ram_bytes, pipo, resident, peers, drive)
        for seat in score.seats:
            stack.callback(seat.close)
        yield score


def _plan(lab: Lab, setup: PipoSetup, ground: Ground, num_peers: int) -> PlanFacts:
    wanted = int(1.15 * lab.file_bytes * (num_peers + 1))
    if not ground.is_tight and wanted > available_memory().limit_bytes:
        raise Unmeasurable(f"all engines at once want {format_size(wanted)}: name fewer --peers")
    lab.plan(lab.setup(lab.roomy_bytes))  # measures the drive with every way to read that a budget might allow
    facts = lab.plan(setup)
    if not facts.fits:
        raise Unmeasurable(
            f"pipo needs {format_size(facts.smallest_bytes)}, the budget is {format_size(setup.ram_bytes)}"
        )
    return facts


def _outside(lab: Lab) -> Callable[[], Opened]:
    """No limit: it tells how long computing alone takes."""
    return lambda: (lab.open_free("pipo"), None)


def _peers(lab: Lab, ground: Ground, ram_bytes: int, entrants: Sequence[Entrant], stack: ExitStack) -> Iterator[Seat]:
    num_caching = 0
    for entrant in entrants:
        path = lab.path
        if entrant.uses_cache:
            num_caching += 1
            if ground.is_tight and num_caching > 1:
                path = stack.enter_context(copied(lab.path, entrant.title.split()[-1]))
        yield _seat(lab, ground, ram_bytes, entrant, path)


def _seat(lab: Lab, ground: Ground, ram_bytes: int, entrant: Entrant, path: Path) -> Seat:
    setup = _setup(lab, ground, ram_bytes, entrant, path)
    try:
        python = _python(lab, entrant, ground.environments)
    except NotInstalled as error:
        return Seat(entrant.title, _outside(lab), Start(setup), entrant.footnote, f"not available: {error}")
    if entrant.kind == "airllm" and isinstance(setup, FolderSetup):
        _prepare(lab, entrant, setup, python)

    def open() -> Opened:
        return lab.open_peer(entrant.kind, ram_bytes, python)

    return Seat(entrant.title, open, Start(setup), entrant.footnote)


def _python(lab: Lab, entrant: Entrant, environments: Path) -> str:
    """Its own interpreter; ours for a llama.cpp that lies somewhere, ready built."""
    if entrant.kind == "llama-cpp-python" and lab.settings.native_site is not None:
        return sys.executable
    return ensure_python(entrant.kind, entrant.packages, environments)


def _prepare(lab: Lab, entrant: Entrant, setup: FolderSetup, python: str) -> None:
    with Child(entrant.kind, environment={"PYTHONPATH": ""}, python=python) as child:
        child.ask(Prepare(setup), _PREPARE_LIMIT_S)


def _setup(lab: Lab, ground: Ground, ram_bytes: int, entrant: Entrant, path: Path) -> LlamaSetup | FolderSetup:
    if not entrant.mode:
        kept_bytes = max(ram_bytes - TORCH_BYTES, MIB)
        return FolderSetup(ground.folder or path, kept_bytes, lab.settings.num_threads, lab.vocab_size)
    fits_native = entrant.kind == "llama-cpp-python" and not ground.is_tight
    setup = lab.llama_setup("default" if fits_native else entrant.mode)
    return replace(setup, path=path, num_sequences=BATCH)


def run(lab: Lab, score: Score) -> None:
    """Start everybody, then rounds; what was measured lies in the score, however this ends. Raises ChildFailed."""
    drop_cached(lab.path)
    if score.drive:
        score.drive.sweep("before")
    take_memory(score.ram_bytes)
    for seat in score.seats:
        _begin(lab, seat)
    for round_idx in range(lab.settings.rounds):
        log.info("round=%d", round_idx + 1)
        _round(lab, score, round_idx)
    for seat in (score.pipo, *score.peers):
        log.info("prompt and batch of=%r", seat.title)
        seat.read_prompt(lab.settings.prompt_tokens)
        seat.decode_batch(BATCH, _BATCH_PASSES)


def _round(lab: Lab, score: Score, round_idx: int) -> None:
    """Whoever goes first changes from round to round."""
    if score.drive:
        score.drive.sample("between")
        score.raw.append(score.drive.samples[-1].best.bytes_per_s)
    shift = round_idx % len(score.seats)
    for seat in score.seats[shift:] + score.seats[:shift]:
        seat.decode(lab.settings.passes)


def _begin(lab: Lab, seat: Seat) -> None:
    if seat.failure:
        return
    path = seat.start_request.setup.path
    for file in (lab.path, *(path.rglob("*") if path.is_dir() else [path])):
        if file.is_file():
            drop_cached(file)
    seat.start()
    seat.warm_up()
    log.info("started=%r failure=%r", seat.title, seat.failure)
