"""`/v1/messages` as clients write it. Source: Anthropic's API reference, "Create a Message"."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from pipo.generation.request import ConstraintKind, ConstraintSpec, SamplingParams
from pipo.server.answer_reader import ToolChoice, ToolDict
from pipo.server.body import Body
from pipo.server.errors import invalid
from pipo.server.schemas.sampling import MAX_COUNT, Positive, Stop


class CacheControl(Body):
    """Taken and not needed: prompts that begin alike are computed once in any case."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]
    cache_control: CacheControl | None = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ToolUseBlock | ThinkingBlock, Field(discriminator="type")]


class FromUser(Body):
    role: Literal["user"]
    content: str | list[UserBlock]


class FromAssistant(Body):
    role: Literal["assistant"]
    content: str | list[AssistantBlock]


AnyTurn = Annotated[FromUser | FromAssistant, Field(discriminator="role")]


class ClientTool(Body):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    input_schema: dict[str, object]
    cache_control: CacheControl | None = None


class Choice(Body):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedToolChoice(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class Metadata(Body):
    user_id: str | None = None


class NoThinking(Body):
    type: Literal["disabled"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, object], Field(alias="schema")]


class OutputConfig(Body):
    format: SchemaFormat | None = None


class ConversationBody(Body):
    """What both routes take."""

    model: str
    messages: Annotated[list[AnyTurn], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ClientTool], Field(max_length=128)] | None = None
    tool_choice: Annotated[Choice | NamedToolChoice, Field(discriminator="type")] | None = None
    thinking: NoThinking | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None

    @property
    def constraint(self) -> ConstraintSpec | None:
        if self.output_config is None or self.output_config.format is None:
            return None
        return ConstraintSpec(ConstraintKind.JSON_SCHEMA, json.dumps(self.output_config.format.schema_))

    @property
    def choice(self) -> ToolChoice:
        """Raises ApiError."""
        tools = [_openai_tool(tool) for tool in self.tools or []]
        if self.tool_choice is None:
            return ToolChoice(tools)
        if not tools:
            raise invalid("tool_choice needs tools", "tool_choice")
        mode = {"any": "required"}.get(self.tool_choice.type, self.tool_choice.type)
        if isinstance(self.tool_choice, NamedToolChoice):
            mode = self.tool_choice.name
            if mode not in {tool.name for tool in self.tools or []}:
                raise invalid(f"there is no tool {mode!r:.80}", "tool_choice")
        return ToolChoice(tools, mode, not self.tool_choice.disable_parallel_tool_use)

    @property
    def continues(self) -> bool:
        """The answer goes on where the last message ends."""
        return self.messages[-1].role == "assistant"

    def template_messages(self) -> list[dict[str, object]]:
        """As templates read them: results of tools are messages of their own. Raises ApiError."""
        found: list[dict[str, object]] = []
        if self.system:
            found.append({"role": "system", "content": _joined(self.system)})
        for message in self.messages:
            found += _of_user(message) if isinstance(message, FromUser) else [_of_assistant(message)]
        return found


class MessagesBody(ConversationBody):
    max_tokens: Positive
    stream: bool = False
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def params(self, max_tokens: int) -> SamplingParams:
        """Raises UsageError."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        wanted: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(SamplingParams(max_tokens=max_tokens, stop=tuple(self.stop_sequences or ())), **wanted)


class CountBody(ConversationBody):
    pass


def _openai_tool(tool: ClientTool) -> ToolDict:
    function: dict[str, object] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _of_user(message: FromUser) -> list[dict[str, object]]:
    """Results first: that is where a conversation goes on after calls."""
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    results = [block for block in message.content if isinstance(block, ToolResultBlock)]
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    found: list[dict[str, object]] = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result_text(block)} for block in results
    ]
    return found + ([{"role": "user", "content": "".join(texts)}] if texts or not results else [])


def _result_text(block: ToolResultBlock) -> str:
    text = _joined(block.content or "")
    return f"error: {text}" if block.is_error else text


def _of_assistant(message: FromAssistant) -> dict[str, object]:
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content}
    found: dict[str, object] = {
        "role": "assistant",
        "content": "".join(block.text for block in message.content if isinstance(block, TextBlock)),
    }
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    if thoughts:
        found["reasoning_content"] = "".join(thoughts)
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    if calls:
        found["tool_calls"] = calls
    return found


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
