"""Work in another process, whose interpreter lock and memory are its own: what it returns, or the error it raises."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar, cast

from pipo.base.errors import PipoError

T = TypeVar("T")
_SPAWN = multiprocessing.get_context("spawn")  # a fork would take this process's memory and threads along


def run_in_child(work: Callable[..., T], *args: object) -> T:
    """What `work(*args)` returns, pickled. Raises PipoError where it does, or where the process dies."""
    ours, process = start_child(_call, work, *args)
    try:
        return cast(T, receive(ours))
    finally:
        stop_child(ours, process)


def start_child(work: Callable[..., None], *args: object) -> tuple[Connection, BaseProcess]:
    """Start `work(connection, *args)` in a process that ends when this one does."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_run, args=(work, theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def receive(connection: Connection) -> object:
    """The next thing a child sends. Raises PipoError: what it sent instead, or that it is gone."""
    try:
        found = connection.recv()
    except (EOFError, OSError) as error:
        raise PipoError(
            "a process that reads ahead has died", hint="--resume goes on; the memory may not do"
        ) from error
    if isinstance(found, PipoError):
        raise found
    return found


def stop_child(connection: Connection, process: BaseProcess) -> None:
    """At once: it holds nothing that is to be kept."""
    connection.close()
    process.terminate()
    process.join()


def _run(work: Callable[..., None], connection: Connection, *args: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal: the parent ends its children
    try:
        work(connection, *args)
    except PipoError as error:
        connection.send(error)
    except (ConnectionError, EOFError):  # nobody listens any more
        return


def _call(connection: Connection, work: Callable[..., object], *args: object) -> None:
    connection.send(work(*args))
