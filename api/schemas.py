"""Bodies that the HTTP door answers outside of any dialect: health, models and errors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Answered(BaseModel):
    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)


class Model(_Answered):
    """`context_length` is the most tokens that the model sees at once; other servers call it `max_model_len`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["perennial"] = "perennial"
    context_length: int
    max_model_len: int


class ModelList(_Answered):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(_Answered):
    status: str
    model: str


class ErrorBody(_Answered):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(_Answered):
    error: ErrorBody
