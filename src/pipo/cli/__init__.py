"""The command line: one file per verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

SIGNALLED = 128  # plus the signal's number is the exit code a shell knows


def main() -> None:
    """`pipo` as the shell calls it: parse, run the verb, turn whatever ends it into an exit code."""
    sys.stdout, sys.stderr = _open_stream(sys.stdout), _open_stream(sys.stderr)
    try:
        from pipo.cli.app import run_command

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to end
        code = run_command(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = SIGNALLED + signal.SIGINT
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt goes below the terminal's own ^C
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = SIGNALLED + getattr(signal, "SIGPIPE", 13)
    except OSError as error:  # a full disk, a closed stdout
        code = _say_output_failed(error)
    sys.exit(code)


def _open_stream(stream: TextIO | None) -> TextIO:
    """A stream that the caller closed (`>&-`) is one that nobody reads."""
    return stream if stream is not None else Path(os.devnull).open("w")


def _say_output_failed(error: OSError) -> int:
    """What has been said already may be lost; why must not."""
    with suppress(OSError):
        print(f"error: cannot write the output: {error.strerror or error}", file=sys.stderr, flush=True)
    with suppress(OSError):  # else the interpreter tries again at its end, and complains in its own words
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1
