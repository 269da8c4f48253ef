"""One engine of a contest: its process, what it has done, and why it can do no more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean
from typing import TypeVar

from bench.anonymous_peak import AnonymousPeak
from bench.cgroup import Cgroup
from bench.child import Child, ChildFailed
from bench.messages import Decode, DecodeBatch, FirstToken, Greedy, Passes, Prefill, Request, Start

R = TypeVar("R")
START_LIMIT_S = 60.0
TOKEN_LIMIT_S = 60.0
WORK_LIMIT_S = 60.0  # for a whole prompt, and for a whole batch
GREEDY_TOKENS = 6  # that are compared
_WATCH_S = 0.05

Opened = tuple[Child, Cgroup | None]


@dataclass(slots=True)
class Turn:
    """Decode passes of one round. `bytes_read` per pass, the one over the prompt counted as one of them."""

    passes: Passes
    bytes_read: float

    @property
    def seconds(self) -> float:
        return mean(self.passes.seconds)


@dataclass(slots=True)
class Seat:
    """`failure` is empty as long as the engine lives. Nothing here raises ChildFailed."""

    title: str
    open: Callable[[], Opened]
    start_request: Start
    footnote: str = ""
    failure: str = ""
    library: str = ""
    token_ids: tuple[int, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    prompt: FirstToken | str = ""
    batch: Passes | str = ""
    _child: Child | None = None
    _group: Cgroup | None = None
    _peaks: list[AnonymousPeak] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        self.failure = ""
        self._child, self._group = self.open()
        self._peaks.append(self._stack.enter_context(AnonymousPeak(self._child.pid, _WATCH_S)))
        started = self._ask(self.start_request, START_LIMIT_S)
        if not isinstance(started, str):
            self.library = started.library

    def warm_up(self) -> None:
        """The first pass loads whatever stays; its tokens are those that are compared."""
        token_ids = self._ask(Greedy(GREEDY_TOKENS), GREEDY_TOKENS * TOKEN_LIMIT_S)
        self.token_ids = () if isinstance(token_ids, str) else token_ids

    def decode(self, num_passes: int) -> None:
        if self.failure:
            return
        assert self._child is not None
        before = self._child.bytes_read
        passes = self._ask(Decode(num_passes), (num_passes + 1) * TOKEN_LIMIT_S)
        if not isinstance(passes, str):
            self.turns.append(Turn(passes, (self._child.bytes_read - before) / (num_passes + 1)))

    def read_prompt(self, num_tokens: int) -> None:
        self.prompt = self._once(Prefill(num_tokens, seed=1), WORK_LIMIT_S)

    def decode_batch(self, num_sequences: int, num_passes: int) -> None:
        self.batch = self._once(DecodeBatch(num_sequences, num_passes), WORK_LIMIT_S)

    @property
    def peak_anonymous_bytes(self) -> int:
        return max((peak.peak_bytes for peak in self._peaks), default=0)

    @property
    def peak_charged_bytes(self) -> int:
        """Page cache included."""
        return self._group.peak_bytes if self._group else 0

    def close(self) -> None:
        self._stack.close()

    def _once(self, request: Request[R], limit_s: float) -> R | str:
        """What it cannot do is no failure of its other work: it is started again."""
        if not self.turns:
            return self.failure
        if self.failure:
            self.start()
        answer = self._ask(request, limit_s)
        if isinstance(answer, str) and self._child is not None and self._child.is_alive:
            self.failure = ""
        return answer

    def _ask(self, request: Request[R], limit_s: float) -> R | str:
        """The answer, or why there is none."""
        if self.failure or self._child is None:
            return self.failure
        try:
            return self._child.ask(request, limit_s)
        except ChildFailed as failure:
            self.failure = str(failure).strip().replace("\n", " ")
            return self.failure
