"""What the requests of all dialects have in common: how strict they are, and how a fault in one is told."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError, model_validator

from runtime.errors import InvalidRequest, MalformedRequest, ModelNotFound

MOST_TOKENS = 2**31 - 1
MOST_TOOLS = 1024
_FIELD = re.compile(r"[a-z]\w*")

# Agents put dots, slashes and colons between a server and its tool.
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


def _whole(number: object) -> object:
    return int(number) if isinstance(number, float) and number.is_integer() else number


# In JSON, and so in its schemas, 4.0 is an integer.
AS_WHOLE = BeforeValidator(_whole)


class Asked(BaseModel):
    """Strict, and blind to what it does not know, as JSON from agents' clients wants it."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def is_same(one: object, other: object) -> bool:
    """Whether they are equal in JSON, where 0 is not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class Unsupported(Exception):
    """A field that is known and not supported asks for something."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class AskedBody(Asked):
    """The body of a request. What `NEUTRAL` names is known and not supported: only values that ask for nothing pass."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {}

    model: str

    @model_validator(mode="before")
    @classmethod
    def _nothing_unsupported(cls, asked: object) -> object:
        if isinstance(asked, dict):
            for name, neutral in cls.NEUTRAL.items():
                value = asked.get(name)
                if value is not None and not any(is_same(value, one) for one in neutral):
                    raise Unsupported(name)
        return asked

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises MalformedRequest where `body` is not JSON, InvalidRequest naming the field that is wrong."""
        try:
            return cls.model_validate_json(body)
        except Unsupported as error:
            raise InvalidRequest(f"{error.name} is not supported by this server: leave it out", error.name) from None
        except ValidationError as error:
            raise _refusal(error) from None

    def check_model(self, label: str) -> None:
        """Raises ModelNotFound where another model is asked for than the one there is."""
        if self.model != label:
            raise ModelNotFound(f"no model {self.model!r} here: GET /v1/models names the one there is", "model")


def describe_neutral(schema: dict[str, Any], kind: type[AskedBody]) -> None:
    """Adds to a body's schema the fields that are refused by their names."""
    words = "Known and not supported: only values that ask for nothing are taken."
    schema["properties"] |= {
        name: {"enum": [None, *neutral], "description": words} for name, neutral in kind.NEUTRAL.items()
    }


def _refusal(error: ValidationError) -> InvalidRequest:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a union's members the one that got furthest is what the client meant.
    first = max(errors, key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        return MalformedRequest(f"the body is not JSON: {first['msg']}")
    # Places in a union are named after its members too; a client knows only fields and indices.
    path = [part for part in first["loc"] if isinstance(part, int) or (_FIELD.fullmatch(part) and part != "str")]
    param = ".".join(str(part) for part in path) or None
    return InvalidRequest(f"{param or 'the body'}: {first['msg']}", param)
