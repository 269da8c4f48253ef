"""What a person sees. Data goes to stdout, everything else to stderr; colour only where a terminal wants it."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, repeat

from rich.console import Console
from rich.text import Text

Row = tuple[str, str]
MAX_CHARS = 4096  # of a message or a row: a path is no longer; what a model file says can be
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SEPARATORS = re.compile(r"[\t\n\u2028\u2029]")
_REORDERING = re.compile(r"[\u202a-\u202e\u2066-\u2069]")  # a reader would see other words than there are
_LABEL_WIDTH = 10


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process itself, with an exit code of its own


@cache
def stdout() -> Console:
    return _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


@cache
def stderr() -> Console:
    return _Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """What libraries log for their own makers is left out: `--verbose` is about pipo, and shows no request."""
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s %(name)s %(message)s", level=max(level, logging.WARNING)
    )
    logging.getLogger("pipo").setLevel(level)


def printable(text: str) -> str:
    """Without what moves a cursor or turns words around, and no longer than a person reads. Lines stay."""
    shown = _REORDERING.sub("", _CONTROLS.sub("", text[: 2 * MAX_CHARS]))
    return shown if len(shown) <= MAX_CHARS and len(text) <= 2 * MAX_CHARS else f"{shown[:MAX_CHARS]} …"


def on_one_line(text: str) -> str:
    """`printable`, and no line of its own: what a model file says must not look like a row of ours."""
    return _SEPARATORS.sub(" ", printable(text))


def print_error(message: str, hint: str | None = None) -> None:
    _print_labelled("error:", "bold red", message)
    if hint is not None:
        stderr().print()
        _print_labelled("hint:", "bold cyan", hint)


def print_warning(message: str) -> None:
    _print_labelled("warning:", "bold yellow", message)


def _print_labelled(label: str, style: str, message: str) -> None:
    text = Text("\n".join(_fitted(stderr(), printable(f"{label} {message}"), 0)))
    text.stylize(style, 0, len(label))
    stderr().print(text)


def print_note(text: str) -> None:
    """An aside, for a person."""
    stderr().print("\n".join(_fitted(stderr(), printable(text), 0)), style="dim")


def print_rows(console: Console, title: str, rows: Iterable[Row], style: str = "") -> None:
    """A title, and lines of a label and what it has."""
    lines = [(on_one_line(label), on_one_line(value)) for label, value in rows]
    label_width = max([_LABEL_WIDTH, *(len(label) for label, _ in lines)])
    console.print(Text(on_one_line(title), f"{style} bold"))
    for label, value in lines:
        left = f"  {label:<{label_width}} "
        for line in _fitted(console, value, len(left)):
            console.print(Text.assemble((left, f"{style} cyan"), (line, style)))
            left = " " * len(left)


def print_columns(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Lines under a head, as wide as their contents. What looks like a number stands on the right."""
    lines = [[on_one_line(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    is_number = [all(line[i][:1].isdigit() or not line[i] for line in lines) for i in range(len(head))]
    for line in (head, *lines):
        cells = [f"{c:>{w}}" if n else f"{c:<{w}}" for c, w, n in zip(line, widths, is_number, strict=True)]
        console.print(Text(indent + "  ".join(cells).rstrip(), "dim" if line is head else ""))


def _fitted(console: Console, text: str, indent: int) -> list[str]:
    """Cut between words where a terminal would cut anywhere; a log keeps its lines whole."""
    if not console.is_terminal:
        return [text]
    width = max(console.width - indent, 20)
    wrap = partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    return [line for paragraph in text.splitlines() for line in wrap(paragraph)] or [""]


def write_answer(text: str) -> None:
    """Show generated text at once. A terminal gets no control characters: a model must not move its cursor."""
    sys.stdout.write(_CONTROLS.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: object) -> None:
    sys.stdout.write(_json_text(value) + "\n")


def write_json_object(values: Mapping[str, object]) -> None:
    """As `write_json`, value by value; an iterator becomes a list, item by item, so that a long one takes no memory."""
    for is_first, (name, value) in zip(chain([True], repeat(False)), values.items(), strict=False):
        sys.stdout.write(f"{'{' if is_first else ','}\n  {_json_text(name)}: ")
        if isinstance(value, Iterator):
            _write_json_list(value)
        else:
            sys.stdout.write(_json_text(value, indent=2))
    sys.stdout.write("\n}\n")


def _write_json_list(items: Iterator[object]) -> None:
    separator = "[\n    "
    for item in items:
        sys.stdout.write(separator + _json_text(item, indent=4))
        separator = ",\n    "
    sys.stdout.write("[]" if separator.startswith("[") else "\n  ]")


def _json_text(value: object, indent: int = 0) -> str:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n" + " " * indent)
