"""The real `pipo` as a user runs it: in a pipe or on a terminal, with settings and caches of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BINARY = Path(sys.executable).with_name("pipo")
TIMEOUT_S = 120.0  # for machines that are busy with something else
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])")


@dataclass(frozen=True, slots=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class CommandLine:
    """Runs pipo in an environment that the user's own settings do not reach."""

    environment: Mapping[str, str]

    @classmethod
    def in_folder(cls, folder: Path, model: Path) -> CommandLine:
        """`smollm2` is the name of `model`; what pipo keeps, it keeps in `folder`."""
        models = folder / "cache" / "pipo" / "models"
        models.mkdir(parents=True)
        (models / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(model)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PIPO_") or k == "PIPO_GGML"}
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
            kept.pop(name, None)
        own = {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "TERM": "xterm",
            "PIPO_THREADS": "1",  # two that wait for each other crawl on a machine that is busy with something else
        }
        return cls(kept | own)

    def __call__(self, *arguments: str, stdin: str | bytes = "", **environment: str) -> Ended:
        """Run to the end."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [BINARY, *arguments],
            input=data,
            capture_output=True,
            env={**self.environment, **environment},
            timeout=TIMEOUT_S,
            check=False,
        )
        return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(
        self, *arguments: str, stdin: int | IO[bytes] = subprocess.PIPE, stdout: int | IO[bytes] = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        """Start with pipes and let it run."""
        pipe, command = subprocess.PIPE, [BINARY, *arguments]
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=pipe, env=self.environment)

    def on_terminal(self, *arguments: str, **environment: str) -> Terminal:
        return Terminal([str(BINARY), *arguments], {**self.environment, **environment})


class Terminal:
    """A command on a terminal of its own, which is 100 columns wide: what is typed there may be Ctrl-C."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(self._ours, (40, 100))
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.shown = ""  # with escape sequences
        self._seen = 0  # of the plain text

    @property
    def plain(self) -> str:
        return _ESCAPES.sub("", self.shown).replace("\r", "")

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, text: str) -> str:
        """Wait until `text` is shown after what was expected before; what came up to it."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.plain[self._seen :]:
            assert time.monotonic() < deadline and self._read(), f"no {text!r} in {self.plain[self._seen :]!r}"
        start = self._seen
        self._seen = self.plain.index(text, start) + len(text)
        return self.plain[start : self._seen]

    def wait(self) -> int:
        """The exit code; everything shown until then is kept."""
        while self._read():
            pass
        code = self.process.wait(TIMEOUT_S)
        os.close(self._ours)
        return code

    def _read(self) -> bool:
        """Take what was shown next. False when there is no more."""
        if not select.select([self._ours], [], [], TIMEOUT_S)[0]:
            return False
        try:
            data = os.read(self._ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)
