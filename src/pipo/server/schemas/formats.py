"""`response_format`: what an answer must look like.

Source: OpenAI's API reference for objects and schemas; `regex` is written as Together's API has it, `grammar` as
Fireworks', in Lark.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field

from pipo.generation.request import ConstraintKind, ConstraintSpec
from pipo.server.body import Body


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, object], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]

    @property
    def constraint(self) -> ConstraintSpec | None:
        return None


class ObjectFormat(Body):
    type: Literal["json_object"]

    @property
    def constraint(self) -> ConstraintSpec:
        return ConstraintSpec(ConstraintKind.JSON_OBJECT)


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    @property
    def constraint(self) -> ConstraintSpec:
        text = json.dumps(self.json_schema.schema_, ensure_ascii=False)
        return ConstraintSpec(ConstraintKind.JSON_SCHEMA, text)


class RegexFormat(Body):
    type: Literal["regex"]
    pattern: str

    @property
    def constraint(self) -> ConstraintSpec:
        return ConstraintSpec(ConstraintKind.REGEX, self.pattern)


class GrammarFormat(Body):
    type: Literal["grammar"]
    grammar: str

    @property
    def constraint(self) -> ConstraintSpec:
        return ConstraintSpec(ConstraintKind.GRAMMAR, self.grammar)


AnyFormat = Annotated[
    TextFormat | ObjectFormat | SchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")
]
