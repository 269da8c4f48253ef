"""`pipo serve` as a user starts it, from its first line to its address."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import openai

from tests.support.command_line import TIMEOUT_S, CommandLine


@dataclass(slots=True)
class Served:
    process: subprocess.Popen[bytes]
    url: str = ""
    said: list[str] = field(default_factory=list)
    reading: threading.Thread = field(default_factory=threading.Thread)

    @property
    def engine_id(self) -> int:
        """The engine's process: the only child."""
        (line,) = subprocess.check_output(["ps", "--ppid", str(self.process.pid), "-o", "pid="]).split()
        return int(line)

    def read_on(self) -> None:
        assert self.process.stderr is not None
        self.said += [line.decode() for line in self.process.stderr]

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def end(self, number: int) -> tuple[int, float]:
        """The exit code, and the seconds it took."""
        begin = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S), time.monotonic() - begin


@contextmanager
def serving(pipo: CommandLine, *arguments: str) -> Iterator[Served]:
    served = Served(pipo.start(*arguments))
    try:
        assert served.process.stderr is not None
        for line in served.process.stderr:
            served.said.append(line.decode())
            if found := re.search(r"at (http://\S+)", served.said[-1]):
                served.url = found[1]
                break
        assert served.url, served.said
        served.reading = threading.Thread(target=served.read_on, daemon=True)
        served.reading.start()
        yield served
    finally:
        served.process.kill()
        served.process.wait()
