"""`/v1/chat/completions` as clients write it. Source: OpenAI's API reference, "Create chat completion"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from pipo.generation.request import ConstraintSpec
from pipo.server.answer_reader import ToolChoice
from pipo.server.body import Body
from pipo.server.errors import invalid
from pipo.server.schemas.formats import AnyFormat
from pipo.server.schemas.sampling import MAX_LOGPROBS, Positive, SamplingBody

_OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "range"}


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class FunctionCall(Body):
    name: str
    arguments: str

    def as_object(self) -> dict[str, object]:
        """Raises ApiError where it is not one."""
        try:
            found = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise invalid(f"the arguments of the call of {self.name!r:.80} are no JSON object", "messages")
        return found


class Call(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    name: str | None = None
    refusal: None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedChoice(Body):
    type: Literal["function"]
    function: FunctionName


class ChatBody(SamplingBody):
    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: AnyFormat | None = None
    safety_identifier: str | None = None  # as `user`
    chat_template_kwargs: dict[str, object] | None = None

    @property
    def answer_tokens(self) -> int | None:
        """Raises ApiError where both names are there and differ."""
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise invalid("max_tokens and max_completion_tokens differ", "max_completion_tokens")
        return next(iter(both), None)

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def constraint(self) -> ConstraintSpec | None:
        return None if self.response_format is None else self.response_format.constraint

    @property
    def choice(self) -> ToolChoice:
        """Raises ApiError."""
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or []]
        names = [tool.function.name for tool in self.tools or []]
        if not tools and (self.tool_choice not in (None, "none") or self.parallel_tool_calls is not None):
            raise invalid("tool_choice and parallel_tool_calls need tools", "tool_choice")
        if len(set(names)) < len(names):
            raise invalid("two tools have the same name", "tools")
        return ToolChoice(tools, self._mode(names), self.parallel_tool_calls is not False)

    def _mode(self, names: Sequence[str]) -> str:
        if not isinstance(self.tool_choice, NamedChoice):
            return self.tool_choice or "auto"
        name = self.tool_choice.function.name
        if name not in names:
            raise invalid(f"there is no tool {name!r:.80}", "tool_choice")
        return name

    @property
    def variables(self) -> dict[str, object]:
        """Of the template. Raises ApiError for those that are not a client's."""
        taken = next(iter((self.chat_template_kwargs or {}).keys() & _OWN_VARIABLES), None)
        if taken is not None:
            raise invalid(f"the template's variable {taken!r} is not to be set", "chat_template_kwargs")
        return self.chat_template_kwargs or {}

    def template_messages(self) -> list[dict[str, object]]:
        """As templates read them: contents are strings, arguments of calls objects. Raises ApiError."""
        return [_template_message(message) for message in self.messages]


def _template_message(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage) -> dict[str, object]:
    role = "system" if message.role == "developer" else message.role
    found: dict[str, object] = {"role": role, "content": _joined(message.content)}
    if message.name is not None:
        found["name"] = message.name
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.content is None and not message.tool_calls:
            raise invalid("a message of the assistant has neither content nor tool_calls", "messages")
        if message.reasoning_content is not None:
            found["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            found["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return found


def _template_call(call: Call) -> dict[str, object]:
    function = {"name": call.function.name, "arguments": call.function.as_object()}
    return {"id": call.id, "type": "function", "function": function}


def _joined(content: Content | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or [])
