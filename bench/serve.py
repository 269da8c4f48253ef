"""The child's side: `python -m bench.serve KIND` answers requests from stdin on stdout until stdin ends."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any, Protocol

from bench.messages import Failure, Request


class Subject(Protocol):
    """What a child serves."""

    def answer(self, request: Request[Any]) -> object:
        """Raises TypeError for a request it does not serve."""

    def close(self) -> None: ...


def _pipo() -> Subject:
    from bench.engines.pipo_engine import PipoEngine

    return PipoEngine()


def _xllamacpp() -> Subject:
    from bench.engines.xllamacpp_engine import XllamacppEngine

    return XllamacppEngine()


def _llama_cpp_python() -> Subject:
    from bench.engines.native_engine import NativeEngine

    return NativeEngine()


def _drive() -> Subject:
    from bench.engines.drive_reader import DriveReader

    return DriveReader()


def _accelerate() -> Subject:
    from bench.engines.accelerate_engine import AccelerateEngine

    return AccelerateEngine()


def _airllm() -> Subject:
    from bench.engines.airllm_engine import AirllmEngine

    return AirllmEngine()


def _neurostream() -> Subject:
    from bench.engines.neurostream_engine import NeurostreamEngine

    return NeurostreamEngine()


# each imports only its own: a child's memory is measured
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "pipo": _pipo,
    "xllamacpp": _xllamacpp,
    "llama-cpp-python": _llama_cpp_python,
    "drive": _drive,
    "accelerate": _accelerate,
    "airllm": _airllm,
    "neurostream": _neurostream,
}


def serve(subject: Subject) -> None:
    # libraries print what they like: stdout is ours alone
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(subject, request), answers)
        answers.flush()


def _answer(subject: Subject, request: Request[Any]) -> object:
    try:
        return subject.answer(request)
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises
        return Failure(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    subject = SUBJECTS[sys.argv[1]]()
    try:
        serve(subject)
    finally:
        subject.close()
