"""What every measurement works with: the settings, one model, and child processes that end with the block."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType

from bench.cgroup import Cgroup, limit_around, memory_limit, reason_against
from bench.child import Child
from bench.messages import Forecast, LlamaSetup, PassForecast, PipoSetup, Plan, PlanFacts, Start
from bench.providers import Provider, importable
from bench.raw_drive import RawDrive
from pipo.base.cores import available_cores
from pipo.base.units import GIB, MIB
from pipo.formats.checkpoint import open_checkpoint
from pipo.hardware.drive import ALL_COMBOS, FULL_S, QUICK_COMBOS
from pipo.transfer.disk import DriveSettings


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure. `share` of the file is the tight budget."""

    rounds: int = 5
    passes: int = 3  # of decode, per round
    short_prompt_tokens: int = 16
    prompt_tokens: int = 512
    context_tokens: int = 1024
    combos: tuple[DriveSettings, ...] = ALL_COMBOS  # ways to read the drive
    drive_s: float = FULL_S  # for all of them
    threads: int | None = None  # of every engine; None: all cores, among which pipo may choose
    share: float = 0.55
    native_site: Path | None = None
    cache_folder: Path = Path()  # of the engines: their own probe of the drive is made once per run

    @property
    def num_threads(self) -> int:
        """Of engines that have to be told."""
        return self.threads or available_cores()


ANSWER = (8, 256)  # tokens of prompt and answer, where decode is what is measured
FULL = Settings()
QUICK = Settings(rounds=2, prompt_tokens=64, context_tokens=256, combos=QUICK_COMBOS, drive_s=0.2)


class Unmeasurable(Exception):
    """This question cannot be put to this model here."""


@dataclass(frozen=True, slots=True)
class Running:
    """An engine that has started, and the limit it lives in."""

    child: Child
    library: str
    start_s: float
    group: Cgroup | None = None


class Lab:
    """One model's bench. Leaving it ends every child, then removes the limits."""

    def __init__(self, settings: Settings, path: Path) -> None:
        self.settings = settings
        self.path = path
        self.file_bytes = path.stat().st_size
        self._exit = ExitStack()
        self._num_groups = 0

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def roomy_bytes(self) -> int:
        """A budget in which everything is resident."""
        return self.file_bytes + self.file_bytes // 4 + GIB

    @property
    def reason_against_limits(self) -> str | None:
        return reason_against()

    def setup(self, ram_bytes: int) -> PipoSetup:
        return PipoSetup(self.path, ram_bytes, self.settings.context_tokens, self.settings.threads)

    def answering(self, ram_bytes: int) -> PipoSetup:
        """The same, planned as `pipo run` plans: for a short prompt and its answer."""
        return replace(self.setup(ram_bytes), request=ANSWER)

    def plan(self, setup: PipoSetup) -> PlanFacts:
        """What pipo would do, asked of a process that plans and nothing else."""
        return self._planner.ask(Plan(setup))

    def forecast(self, request: Forecast) -> PassForecast:
        return self._planner.ask(request)

    @contextmanager
    def started(self, setups: Mapping[str, PipoSetup]) -> Iterator[dict[str, Running]]:
        """An engine for each, until the block ends. Raises ChildFailed."""
        with ExitStack() as stack:
            environment = {"XDG_CACHE_HOME": str(self.settings.cache_folder)}
            children = {name: stack.enter_context(Child("pipo", environment=environment)) for name in setups}
            yield {name: self._started(child, Start(setups[name]), None) for name, child in children.items()}

    @cached_property
    def _planner(self) -> Child:
        return self._open("pipo", None)

    def tight_bytes(self) -> int:
        """A budget that streams: the share of the file that was asked for; for small files the largest of a few.

        Raises Unmeasurable.
        """
        # the roomy plan first: it measures the drive with every way to read that a budget might allow
        roomy = self.plan(self.setup(self.roomy_bytes))
        smallest = self.plan(self.setup(MIB)).smallest_bytes
        spare = roomy.needed_bytes - smallest
        wanted = [int(self.file_bytes * self.settings.share), *(smallest + spare // part for part in (2, 4, 8, 16))]
        for ram_bytes in (*wanted, smallest):
            if self.plan(self.setup(ram_bytes)).streamed_bytes:
                return ram_bytes
        raise Unmeasurable(f"{self.path.name} is so small that no budget makes it stream")

    def resident_like(self, facts: PlanFacts) -> PipoSetup:
        """All resident, with the kernels and the chunk of another plan: its compute without its transfers."""
        roomy = replace(self.setup(self.roomy_bytes), prefill_chunk=facts.chunk_tokens)
        candidates = [replace(roomy, layout=layout) for layout in ("auto", "plain", "repacked")]
        same = [s for s in candidates if self.plan(s).repacked_types == facts.repacked_types]
        return (same or candidates)[0]

    def start_pipo(self, setup: PipoSetup, provider: Provider | None = None) -> Running:
        """Raises ChildFailed."""
        return self._started(self._open("pipo", None, provider), Start(setup), None)

    def start_limited(self, setup: PipoSetup) -> Running:
        """Inside the limit that its budget must live in, where there can be one. Raises ChildFailed."""
        child, group = self.open_limited(setup)
        return self._started(child, Start(setup), group)

    def open_limited(self, setup: PipoSetup) -> tuple[Child, Cgroup | None]:
        """The same, to be started by the caller."""
        group = None if self.reason_against_limits else self._limit(setup.ram_bytes)
        return self._open("pipo", group), group

    def start_llama(self, kind: str, *, limit_for: int | None = None) -> Running:
        """All in memory as its defaults have it, or mapped inside the limit of a budget. Raises ChildFailed."""
        setup = self.llama_setup("default" if limit_for is None else "mapped")
        group = self._limit(limit_for) if limit_for is not None else None
        return self._started(self._open(kind, group), Start(setup), group)

    def llama_setup(self, mode: str) -> LlamaSetup:
        settings = self.settings
        return LlamaSetup(
            self.path, settings.context_tokens, settings.num_threads, self.vocab_size, mode, settings.native_site
        )

    @cached_property
    def vocab_size(self) -> int:
        return open_checkpoint(self.path).manifest.hyper.vocab_size

    def open_free(self, kind: str) -> Child:
        """Without a limit; to be started by the caller."""
        return self._open(kind, None)

    def open_peer(self, kind: str, ram_bytes: int, python: str) -> tuple[Child, Cgroup | None]:
        """Inside the limit of a budget, under the interpreter of its own environment; to be started by the caller."""
        group = None if self.reason_against_limits else self._limit(ram_bytes)
        return self._open(kind, group, python=python), group

    def open_drive(self, facts: PlanFacts) -> RawDrive:
        """Reads what a plan would stream."""
        child, settings = self._open("drive", None), self.settings
        return RawDrive(child, self.path, facts.streamed_extents, settings.combos, settings.drive_s)

    def _started(self, child: Child, request: Start, group: Cgroup | None) -> Running:
        answer = child.ask(request)
        return Running(child, answer.library, answer.seconds, group)

    def _open(
        self, kind: str, group: Cgroup | None, provider: Provider | None = None, *, python: str = sys.executable
    ) -> Child:
        environment = {"XDG_CACHE_HOME": str(self.settings.cache_folder)}
        if python != sys.executable:
            environment["PYTHONPATH"] = ""  # its own packages and ours from the working folder, nothing else
        if provider is not None:
            environment["PIPO_GGML"] = str(provider.folder)
        return self._exit.enter_context(Child(kind, group=group, environment=environment, python=python))

    def _limit(self, ram_bytes: int) -> Cgroup:
        self._num_groups += 1
        return self._exit.enter_context(memory_limit(str(self._num_groups), limit_around(ram_bytes)))


def peers(settings: Settings) -> list[str]:
    """Kinds of llama.cpp that can be run here."""
    kinds = ["xllamacpp"] if importable("xllamacpp") else []
    if settings.native_site is not None or importable("llama_cpp"):
        kinds.append("llama-cpp-python")
    return kinds
