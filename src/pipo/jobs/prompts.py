"""What a row asks for: a conversation or a plain text, how to sample, what the answer must look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipo.base.errors import UsageError
from pipo.generation.request import ConstraintSpec, SamplingParams
from pipo.jobs.openai_lines import COMPLETIONS, body_of, constraint_of, params_of
from pipo.jobs.table import Contents, Values
from pipo.text.prompt_template import PromptTemplate

PROMPT, MESSAGES, TEXT = "prompt", "messages", "text"  # columns that are taken where nobody names one


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How prompts are made of rows. Everything can be pickled."""

    params: SamplingParams
    template: str | None = None
    column: str | None = None
    system: str | None = None
    is_raw: bool = False
    constraint: ConstraintSpec | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Of one row. `prompt` is a text, or messages for the chat template."""

    prompt: str | Sequence[Mapping[str, object]]
    params: SamplingParams
    constraint: ConstraintSpec | None
    has_limit: bool  # on the tokens of its answer, that somebody asked for


class PromptSource:
    """`columns` are those it reads of a row; None: all of them.

    Raises UsageError for settings that this table cannot be read with.
    """

    def __init__(self, settings: PromptSettings, contents: Contents) -> None:
        self._settings = settings
        self._is_openai = contents.is_openai
        self._template: PromptTemplate | None = None
        self.columns: frozenset[str] | None = None
        if contents.is_openai:
            _check_openai(settings)
        elif settings.template is not None:
            self._template = PromptTemplate(settings.template)
            self.columns = self._template.columns
            _check_there(self._template.needed, contents, "the prompt template reads")
        else:
            self._column = _column(settings.column, contents)
            self.columns = frozenset([self._column])

    @property
    def needs_chat_template(self) -> bool:
        """Whatever the rows say."""
        return not (self._is_openai or self._settings.is_raw)

    def ask(self, row: Values) -> Asked:
        """Raises UsageError for a row that cannot be asked."""
        settings = self._settings
        if self._is_openai:
            return self._openai(row)
        found = self._template.render(row) if self._template else _value(row, self._column)
        has_limit = settings.params.max_tokens is not None
        if not settings.is_raw:
            messages = _messages(_said_by_user(found), settings.system)
            return Asked(messages, settings.params, settings.constraint, has_limit)
        if not isinstance(found, str):
            raise UsageError("messages need the chat template, which --raw leaves out")
        return Asked(found, settings.params, settings.constraint, has_limit)

    def _openai(self, row: Values) -> Asked:
        body = body_of(row)
        params = params_of(body, self._settings.params)
        constraint = constraint_of(body) or self._settings.constraint
        if row["url"] == COMPLETIONS:
            prompt = body["prompt"]
            if not isinstance(prompt, str):
                raise UsageError(f"prompt must be one text in a batch, found {prompt!r:.100}")
            return Asked(prompt, params, constraint, params.max_tokens is not None)
        return Asked(_messages(body["messages"], None), params, constraint, params.max_tokens is not None)


def _check_openai(settings: PromptSettings) -> None:
    for flag, value in (
        ("--prompt-template", settings.template),
        ("--prompt-column", settings.column),
        ("--system", settings.system),
        ("--raw", settings.is_raw or None),
    ):
        if value is not None:
            raise UsageError(f"{flag} has no meaning for OpenAI's batch lines: each has a body of its own")


def _check_there(needed: frozenset[str], contents: Contents, who: str) -> None:
    missing = sorted(needed - set(contents.columns))
    if missing:
        raise UsageError(
            f"{who} {', '.join(map(repr, missing)):.200}, the table has {_listed(contents)}",
            hint="a column of the table, spelt as it is there",
        )


def _column(wanted: str | None, contents: Contents) -> str:
    if wanted is not None:
        _check_there(frozenset([wanted]), contents, "--prompt-column is")
        return wanted
    known = [name for name in (PROMPT, MESSAGES, TEXT) if name in contents.columns]
    if known:
        return known[0]
    if len(contents.columns) == 1:
        return contents.columns[0]
    raise UsageError(
        f"which column is the prompt? The table has {_listed(contents)}",
        hint="--prompt-column NAME, or --prompt-template TEXT with {{ NAME }} in it",
    )


def _listed(contents: Contents) -> str:
    return f"{', '.join(map(repr, contents.columns)):.500}"


def _value(row: Values, column: str) -> str | list[object]:
    if column not in row:
        raise UsageError(f"the row has no {column!r}")
    value = row[column]
    if not isinstance(value, str | list):
        raise UsageError(f"{column!r} must be a text or a list of messages, found {value!r:.100}")
    return value


def _said_by_user(prompt: str | list[object]) -> list[object]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _messages(found: object, system: str | None) -> list[Mapping[str, object]]:
    """Raises UsageError for what is no conversation of texts."""
    if not isinstance(found, list) or not found:
        raise UsageError(f"messages must be a list of them, found {found!r:.100}")
    messages = [_message(each) for each in found]
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise UsageError("the row has a system message of its own", hint="leave --system out")
    return [{"role": "system", "content": system}, *messages]


def _message(found: object) -> Mapping[str, object]:
    """Its content is a text, or OpenAI's list of parts that are."""
    if not isinstance(found, dict) or not isinstance(found.get("role"), str):
        raise UsageError(f"a message must be an object with a role and content, found {found!r:.100}")
    content = found.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise UsageError(f"the content of a message must be a text, found {content!r:.100}")
    return {**found, "content": content}
