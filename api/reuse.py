"""What answers in all dialects report about the prompt: how much of it was held already."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from api.answering import Usage


class Reuse(BaseModel):
    """Tokens of the prompt that were reused, that were read, and that were evicted by the end.

    `broke_at` names the first item of the request that differs from what was held of the conversation, and `reread_because`
    says why what was held could not be used.
    """

    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)

    reused: int
    read: int
    evicted: int
    broke_at: str | None = None
    reread_because: str | None = None


def reuse_of(usage: Usage) -> Reuse:
    return Reuse(
        reused=usage.reused,
        read=usage.read,
        evicted=usage.evicted,
        broke_at=usage.broke_at,
        reread_because=usage.because,
    )
