"""What binds the form of an answer: a JSON schema, or tools that may or must be called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from api.request import CompletionRequest
from api.request_parts import Tool
from runtime.errors import InvalidRequest
from runtime.grammar import Grammar, json_source
from runtime.text import Text
from runtime.tools import CallForm, CallReader

# A function without parameters takes none, says OpenAI.
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Bounds:
    """The tools that the template is to show, the text of every answer's grammar, and the form of calls in it.

    `param` names the field that the grammar is made of.
    """

    tools: Sequence[dict[str, Any]] = ()
    source: str | None = None
    form: CallForm | None = None
    param: str = ""

    @classmethod
    def of(cls, request: CompletionRequest, text: Text) -> Bounds:
        """Raises InvalidRequest where schemas are too long, or the model's template knows no tools."""
        if tools := request.called_tools:
            form = CallForm.of_template(text)
            called = [{"name": tool.function.name, "parameters": _parameters(tool)} for tool in tools]
            with _blaming("tools"):
                source = form.source(
                    called, is_required=request.must_call, is_parallel=request.parallel_tool_calls is not False
                )
            return cls([tool.model_dump(exclude_none=True) for tool in request.tools or ()], source, form, "tools")
        if (schema := request.schema_of_answers) is not None:
            with _blaming("response_format"):
                return cls(source=json_source(schema), param="response_format")
        return cls()

    def grammar(self, text: Text) -> Grammar | None:
        """Raises InvalidRequest where a schema cannot be followed."""
        with _blaming(self.param):
            return text.grammar(self.source) if self.source is not None else None

    def reader(self) -> CallReader | None:
        return self.form.reader() if self.form else None


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or _NO_ARGUMENTS


@contextmanager
def _blaming(param: str) -> Iterator[None]:
    """Names the field whose schema cannot be followed."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{param}: {error}", error.param or param) from error
