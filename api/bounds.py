"""Constraints on the form of an answer: a JSON schema, or tools that may or must be called."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from runtime.errors import InvalidRequest, MalformedRequest
from runtime.grammar import Grammar, check_source, json_source
from runtime.text import Text
from runtime.tools import CallForm, CallReader

# As OpenAI documents it, a function without `parameters` takes none.
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_ARGUMENTS = {"type": "object"}

# A grammar for some 500 optional properties fails while an answer is generated, and not when it is compiled.
_MOST_PROPERTIES = 256

_log = logging.getLogger("perennial.api")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. The schema of a `strict` tool is followed exactly, or the request is refused."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The tool in the form that chat templates expect."""
        told = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {name: value for name, value in told.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tools may be called: none, some (None for all), and whether one of them must be, or several may."""

    names: frozenset[str] | None = None
    is_required: bool = False
    is_parallel: bool = True

    def check(self, offered: Iterable[str]) -> None:
        """Raises MalformedRequest if a call is required and none of the tools offered may be called."""
        if self.is_required and not any(self.names is None or name in self.names for name in offered):
            raise MalformedRequest("tool_choice asks for a tool that tools does not hold", "tool_choice")


NO_CALLS = Choice(frozenset())


@dataclass(frozen=True, slots=True)
class Bounds:
    """The text of the grammar for every answer, and the form of calls in it. `param` names the field that it comes from."""

    source: str | None = None
    form: CallForm | None = None
    param: str = ""

    @classmethod
    def of_tools(
        cls,
        tools: Sequence[Tool],
        choice: Choice,
        text: Text,
        schema: Mapping[str, Any] | None = None,
        schema_param: str = "",
    ) -> Bounds:
        """For an answer that may call tools, or else is JSON of `schema`, if there is one, which came in `schema_param`.

        Raises InvalidRequest where a schema cannot be followed, or the model's template knows no tools.
        """
        called = [tool for tool in tools if choice.names is None or tool.name in choice.names]
        if not called:
            if schema is not None:
                return cls.of_schema(schema, schema_param)
            return cls.without_calls(text) if tools else cls()
        form = CallForm.of_template(text)
        rules = [
            {"name": tool.name, "parameters": _schema_to_follow(index, tool, form)} for index, tool in enumerate(called)
        ]
        if schema is not None:
            if form.begins_as_json:
                raise MalformedRequest(
                    f"{schema_param} cannot be had beside tools with this model: send one of them", schema_param
                )
            with _naming_field(schema_param):
                check_source(json_source(schema))
        with _naming_field("tools"):
            source = form.source(rules, is_required=choice.is_required, is_parallel=choice.is_parallel, schema=schema)
        return cls(source, form, "tools")

    @classmethod
    def without_calls(cls, text: Text) -> Bounds:
        """For an answer without calls, although the prompt shows tools."""
        try:
            form = CallForm.of_template(text)
        except MalformedRequest:
            return cls()
        return cls(form.source_without_calls(), None, "tools")

    @classmethod
    def of_schema(cls, schema: Mapping[str, Any], param: str) -> Bounds:
        """For an answer in JSON. Raises InvalidRequest if the schema is too long."""
        with _naming_field(param):
            return cls(json_source(schema), param=param)

    def grammar(self, text: Text) -> Grammar | None:
        """Raises InvalidRequest where a schema cannot be followed."""
        with _naming_field(self.param):
            return _compile(self.source, text) if self.source is not None else None

    def reader(self) -> CallReader | None:
        return self.form.reader() if self.form else None


def _schema_to_follow(index: int, tool: Tool, form: CallForm) -> Mapping[str, Any]:
    """The schema that a tool's arguments will follow; a tool that is not `strict` may get a looser one."""
    parameters = tool.parameters or _NO_ARGUMENTS
    spelled = json.dumps(parameters)
    if (reason := _fault_in(spelled, form)) is None:
        return parameters
    if tool.strict:
        raise InvalidRequest(f"tools.{index} ({tool.name}): {reason}", f"tools.{index}")
    lenient = {**parameters, "x-guidance": {"lenient": True}}
    if _fault_in(json.dumps(lenient), form) is None:
        _log.warning("the schema of a tool is followed in part: index=%d", index)
        return lenient
    _log.warning("the schema of a tool is not followed, any object will do: index=%d", index)
    return _ANY_ARGUMENTS


@lru_cache(maxsize=32)
def _compile(source: str, text: Text) -> Grammar:
    return text.grammar(source)


@lru_cache(maxsize=512)  # Agents send the same tools with every request.
def _fault_in(parameters: str, form: CallForm) -> str | None:
    """Why a tool's arguments cannot be constrained by this schema; None if they can."""
    schema = json.loads(parameters)
    if (count := _property_count(schema)) > _MOST_PROPERTIES:
        return f"the schema has {count} properties, and {_MOST_PROPERTIES} can be followed"
    tool = {"name": "f", "parameters": schema}
    try:
        check_source(form.source([tool], is_required=True, is_parallel=False))
    except InvalidRequest as error:
        return str(error)
    return None


def _property_count(schema: Any) -> int:
    if isinstance(schema, dict):
        properties = schema.get("properties")
        own = len(properties) if isinstance(properties, dict) else 0
        return own + sum(map(_property_count, schema.values()))
    return sum(map(_property_count, schema)) if isinstance(schema, list) else 0


@contextmanager
def _naming_field(param: str) -> Iterator[None]:
    """Adds the field's name to errors about a schema that cannot be followed."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{param}: {error}", error.param or param) from error
