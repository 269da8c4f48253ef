"""Chat templates: the Jinja sources that models bring along, rendered as Hugging Face `transformers` does.

A template is a stranger's program. It runs in Jinja's sandbox: no attribute that begins with an underscore, no
change to what it is given, no file, no import. What is bounded besides: numbers from `range` (per rendering),
`*` and `**`, the length of the result. What is not: a template can still build a large string by doubling a small one
again and again, or by padding, and take hours by loops in loops over a list that it made once. Batch jobs, which render
a user's own templates, bound time and memory of the process besides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn, Protocol

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipo.base.errors import MalformedFile, PipoError, UsageError

TEMPLATE_KEY = "tokenizer.chat_template"
MAX_RENDERED_CHARS = 1 << 24  # 16 Mi; the longest contexts are about a million tokens of four characters
MAX_RANGE_STEPS = 1_000_000
MAX_REPEATED_ITEMS = 1 << 20
MAX_POWER_BITS = 1 << 12
MAX_QUOTED_CHARS = 400  # of what a template says in an error

_RAW_HINT = "--raw sends the prompt without a template"

Message = Mapping[str, object]


class TextMetadata(Protocol):
    """The part of a model file's metadata that is read here."""

    def get(self, key: str) -> object | None: ...


class ChatTemplate:
    """A compiled template. Threads: any.

    Raises MalformedFile where the source is not a template.
    """

    def __init__(self, source: str, bos_token: str | None, eos_token: str | None) -> None:
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            self._template = sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise MalformedFile(
                f"the chat template is not valid Jinja, line {error.lineno}: {said(error.message)}", hint=_RAW_HINT
            ) from error
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:  # nested too deep
            raise MalformedFile(f"the chat template does not compile: {said(error)}", hint=_RAW_HINT) from error

    @classmethod
    def from_metadata(cls, metadata: TextMetadata, bos_token: str | None, eos_token: str | None) -> ChatTemplate:
        """The model's own template. Raises UsageError where it has none."""
        source = metadata.get(TEMPLATE_KEY)
        if source is None:
            raise UsageError(f"the model has no chat template (key {TEMPLATE_KEY!r})", hint=_RAW_HINT)
        if not isinstance(source, str):
            raise MalformedFile(f"key {TEMPLATE_KEY!r} is {source!r}, wanted a string")
        return cls(source, bos_token, eos_token)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The conversation as the model was trained to read it; encode it with `Tokenizer.encode_chat`.

        `variables` are for the template alone (`enable_thinking`, …). Raises UsageError with the template's words
        where it refuses the messages, MalformedFile where it fails or grows beyond the bounds.
        """
        context: dict[str, object] = {
            **self._tokens,
            **(variables or {}),
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render_bounded(self._template, context)
        except _Refusal as error:
            raise UsageError(
                f"the chat template refuses the messages: {said(error.message)}", hint=_RAW_HINT
            ) from error
        except PipoError:
            raise
        except Exception as error:  # a template can raise whatever its expressions do
            message = f"the chat template failed: {type(error).__name__}: {said(error)}"
            raise MalformedFile(message, hint=_RAW_HINT) from error


def render_bounded(template: jinja2.Template, context: Mapping[str, object]) -> str:
    """The text of a template of `sandbox`. Raises MalformedFile beyond the bounds, and what it raises."""
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate({"range": _BoundedRange(), **context}):
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise _out_of_bounds(f"text of more than {MAX_RENDERED_CHARS} characters")
    return "".join(pieces)


def said(words: object) -> str:
    """A template's words in a message of ours: on one line, so that they cannot look like a hint, and not many."""
    return f"{' '.join(str(words).split()):.{MAX_QUOTED_CHARS}}"


class _Refusal(jinja2.TemplateError):
    """`raise_exception` of a template."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012, Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class _BoundedRange:
    """Jinja's `range`, with one bound for all calls of a rendering."""

    def __init__(self) -> None:
        self._steps_left = MAX_RANGE_STEPS

    def __call__(self, *args: int) -> range:
        numbers = range(*args)
        self._steps_left -= min(len(numbers), MAX_RANGE_STEPS + 1)
        if self._steps_left < 0:
            raise _out_of_bounds(f"more than {MAX_RANGE_STEPS} numbers from range()")
        return numbers


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "**":
            _check_power(left, right)
        else:
            _check_repetition(left, right)
            _check_repetition(right, left)
        return super().call_binop(context, operator, left, right)


def _check_power(base: object, exponent: object) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_POWER_BITS:
        raise _out_of_bounds(f"a number of about {base.bit_length() * exponent} bits")


def _check_repetition(items: object, times: object) -> None:
    if isinstance(items, (str, bytes, list, tuple)) and isinstance(times, int):
        num_items = len(items) * times
        if num_items > MAX_REPEATED_ITEMS:
            raise _out_of_bounds(f"a repetition to {num_items} items")


def _out_of_bounds(what: str) -> MalformedFile:
    return MalformedFile(f"the chat template wants {what}", hint=_RAW_HINT)


def sandbox(undefined: type[jinja2.Undefined] = jinja2.Undefined) -> jinja2.Environment:
    """What a stranger's template is compiled in; render it with `render_bounded`."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        undefined=undefined,
        optimized=False,  # with what `finalize` has, nothing is computed while a template is compiled
        finalize=_as_it_is,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    del environment.globals["lipsum"]  # text of any length
    return environment


@jinja2.pass_context
def _as_it_is(context: Context, value: object) -> object:
    """Needs a context, so that {{ 'x'|center(10000000000) }} is not a constant, which Jinja would compute at once."""
    return value


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes <, > and & for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
