"""The command line: one file per verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import io
import os
import signal
import sys

SIGNALLED = 128  # plus the signal's number is the exit code a shell knows


def main() -> None:
    """`pipo` as the shell calls it: parse, run the verb, turn whatever ends it into an exit code."""
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
    sys.exit(code)
