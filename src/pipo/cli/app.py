"""The command line as typer knows it, and what its errors look like."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, cast

import typer

from pipo import __version__
from pipo.base.errors import PipoError
from pipo.cli.batch import batch
from pipo.cli.bench import bench
from pipo.cli.chat import chat
from pipo.cli.doctor import doctor
from pipo.cli.eval import evaluate
from pipo.cli.flags import Call, spread
from pipo.cli.list import list_models
from pipo.cli.pack import pack
from pipo.cli.plan import plan
from pipo.cli.pull import pull
from pipo.cli.rm import rm
from pipo.cli.run import run
from pipo.cli.serve import serve
from pipo.cli.show import show
from pipo.cli.signals import Terminated, raising_on_sigterm
from pipo.cli.terminal import print_error, printable, set_up_logging, stderr
from pipo.cli.verify import verify

# click.UsageError, wherever this version of typer keeps its click
_ParseError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
_OUTPUT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO}  # of a write to no named file: our own output
_KEY_FLAG = "--api-key"
_USAGE, _FAILURE, _SIGTERM = 2, 1, 143

app = typer.Typer(
    help="Run language models larger than your memory.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_VERBS: dict[str, Callable[..., None]] = {
    "run": run,
    "chat": chat,
    "serve": serve,
    "batch": batch,
    "pull": pull,
    "list": list_models,
    "rm": rm,
    "show": show,
    "plan": plan,
    "pack": pack,
    "verify": verify,
    "eval": evaluate,
    "bench": bench,
    "doctor": doctor,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(spread(_verb))


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"pipo {__version__}")
        raise typer.Exit


def _print_devices(is_wanted: bool) -> None:
    if is_wanted:
        from pipo.cli.doctor import device_lines

        try:
            print("\n".join(device_lines()))
        except PipoError as error:
            print_error(error.message, error.hint)
            raise typer.Exit(error.exit_code) from error
        raise typer.Exit


@app.callback()
def _pipo(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and end.")
    ] = False,
    list_devices: Annotated[
        bool,
        typer.Option(
            "--list-devices", callback=_print_devices, is_eager=True, help="Show what --device can name and end."
        ),
    ] = False,
) -> None:
    pass


def run_command(arguments: Sequence[str]) -> int:
    """Parse and run; the exit code. KeyboardInterrupt and BrokenPipeError are left to the caller."""
    try:
        call = app(arguments or ["--help"], prog_name="pipo", standalone_mode=False)
    except _ParseError as error:
        where = error.ctx.command_path if error.ctx is not None else "pipo"
        print_error(error.format_message().strip(), f"{where} --help")
        return _USAGE
    return _run(call) if isinstance(call, Call) else int(call or 0)


def _run(call: Call) -> int:
    is_verbose = call.output.verbose
    set_up_logging(quiet=call.output.quiet, verbose=is_verbose)
    try:
        with raising_on_sigterm():
            call.run()
    except Terminated:
        return _SIGTERM
    except PipoError as error:
        print_error(error.message, error.hint)
        if is_verbose and error.__cause__ is not None:
            stderr().print(printable(f"caused by {error.__cause__!r}"), style="dim")
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in _OUTPUT_ERRNOS or error.filename is not None:
            _print_bug(error, is_verbose)
            return _FAILURE
        raise
    except Exception as error:  # noqa: BLE001 - a bug of ours: say so, and keep the traceback for those who ask
        _print_bug(error, is_verbose)
        return _FAILURE
    return 0


def _print_bug(error: Exception, is_verbose: bool) -> None:
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = None if is_verbose else f"--verbose shows where; please report it with {_command_line()}"
    print_error(f"pipo has a bug: {what}", hint)
    if is_verbose:
        import traceback

        traceback.print_exception(error)


def _command_line() -> str:
    import shlex

    return shlex.join(["pipo", *_without_keys(sys.argv[1:])])


def _without_keys(arguments: Sequence[str]) -> list[str]:
    """What is shown may be posted somewhere."""
    shown = [f"{_KEY_FLAG}=…" if each.startswith(f"{_KEY_FLAG}=") else each for each in arguments]
    return ["…" if i and shown[i - 1] == _KEY_FLAG else each for i, each in enumerate(shown)]
