"""What the requests of all dialects have in common: how strictly they are checked, and how a fault is reported."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from runtime.checks import short_repr
from runtime.errors import InvalidRequest, MalformedRequest, ModelNotFound

MOST_TOKENS = 2**31 - 1
MOST_TOOLS = 1024
_FIELD = re.compile(r"[a-z]\w*")
_TYPES = frozenset({"str", "int", "float", "bool", "list", "dict"})

# Agents join the names of a server and its tool with dots, slashes and colons.
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


def _whole(number: object) -> object:
    return int(number) if isinstance(number, float) and number.is_integer() else number


# In JSON, and so in its schemas, 4.0 is an integer.
AS_WHOLE = BeforeValidator(_whole)

# -1 means as many as there is room for.
MostTokens = Annotated[int, Field(ge=1, le=MOST_TOKENS), AS_WHOLE] | Literal[-1]


def _without_infinity(found: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        raise ValueError("JSON has neither NaN nor infinity, nor a number that is too large") from None
    return found


# Answers quote such objects, and no client could read NaN in one.
JsonObject = Annotated[dict[str, Any], AfterValidator(_without_infinity)]


class Asked(BaseModel):
    """Checks types strictly and ignores unknown fields, for agents' clients send fields that we do not know."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def is_same(one: object, other: object) -> bool:
    """Whether two values are equal in JSON, where 0 is not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def limit_of(most_tokens: int | None) -> int | None:
    """The most tokens that an answer may have; None if the client does not say."""
    return MOST_TOKENS if most_tokens == -1 else most_tokens


class Unsupported(Exception):
    """A field that is known but not supported has a value that asks for something."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class AskedBody(Asked):
    """The body of a request. Fields in `NEUTRAL` are known but not supported: they may only have values that ask for nothing."""

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {}

    model: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, asked: object) -> object:
        if isinstance(asked, dict):
            for name, neutral in cls.NEUTRAL.items():
                value = asked.get(name)
                if value is not None and not any(is_same(value, one) for one in neutral):
                    raise Unsupported(name)
        return asked

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises MalformedRequest if `body` is not JSON, or InvalidRequest that names the wrong field."""
        try:
            return cls.model_validate_json(body)
        except Unsupported as error:
            raise InvalidRequest(f"{error.name} is not supported by this server: leave it out", error.name) from None
        except ValidationError as error:
            raise _refusal(error) from None

    def check_model(self, label: str) -> None:
        """Raises ModelNotFound if the request names another model than the one that runs."""
        if self.model != label:
            raise no_such_model(self.model)


def no_such_model(name: str) -> ModelNotFound:
    """The refusal of a model other than the one that runs."""
    return ModelNotFound(f"no model {short_repr(name)} here: GET /v1/models names the one there is", "model")


def describe_neutral(schema: dict[str, Any], kind: type[AskedBody]) -> None:
    """Adds to a body's schema the fields that are known but not supported."""
    words = "Known and not supported: only values that ask for nothing are taken."
    schema["properties"] |= {
        name: {"enum": [None, *neutral], "description": words} for name, neutral in kind.NEUTRAL.items()
    }


def _refusal(error: ValidationError) -> InvalidRequest:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Of a union, the member that validated furthest is what the client meant.
    first = max(errors, key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        return MalformedRequest(f"the body is not JSON: {first['msg']}")
    # pydantic's locations also name members of unions; a client knows only fields and indices.
    path = [part for part in first["loc"] if isinstance(part, int) or (_FIELD.fullmatch(part) and part not in _TYPES)]
    param = ".".join(str(part) for part in path) or None
    return InvalidRequest(f"{param or 'the body'}: {first['msg']}", param)
