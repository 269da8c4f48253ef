"""What goes between the asking process and the engine's: pickled messages with their lengths, over two pipes."""

from __future__ import annotations

import pickle
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipo.base.config import EngineConfig
from pipo.base.errors import PipoError
from pipo.generation.events import Command, Event
from pipo.planner.predict import Workload
from pipo.serving.contract import EngineInfo

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """An engine that is to be started in a process of its own.

    `config.ram` limits both processes together. Of that `asking_bytes` are the asking process's, which the ledger
    calls `asking`, as in "server" or "job": it promises to stay below. `workload` is what the plan is made for; None:
    a typical one. `most_sequences`, where it is given, replaces the config's number: as many, by halves down to one, as
    leave each ENOUGH_CONTEXT tokens, or what the model or the config has where that is less.
    """

    model: Path
    config: EngineConfig
    asking: str
    asking_bytes: int
    context_tokens: int | None = None
    workload: Workload | None = None
    most_sequences: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Since the last one."""

    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class StatsWanted:
    """EngineStats are the answer."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """In measuring the machine, 0 to 1 of a step."""

    step: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Started:
    """Requests may come."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not be started, or not go on."""

    error: PipoError


@dataclass(frozen=True, slots=True)
class Said:
    """What a pass gave."""

    events: tuple[Event, ...]


class Wire:
    """One end of both pipes. Threads: `send` from any, `receive` from one."""

    def __init__(self, source: IO[bytes], target: IO[bytes]) -> None:
        self._source = source
        self._target = target
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Waits while the pipe is full. Raises OSError where the other side has gone."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._target.write(_LENGTH.pack(len(data)) + data)
            self._target.flush()

    def receive(self) -> object:
        """Raises EOFError where the other side has gone, in the middle of a message or between two."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def _read(self, num_bytes: int) -> bytes:
        data = self._source.read(num_bytes)
        if len(data) < num_bytes:
            raise EOFError
        return data

    def close(self) -> None:
        """This end of what the other side reads: it finds the end. What is being sent is sent first."""
        with suppress(OSError), self._lock:  # the other side may have gone already
            self._target.close()
