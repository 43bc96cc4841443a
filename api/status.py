"""A server's state for operators, in JSON. It has no session ids, because an id gives access to its session."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from actors import Runtime


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, from_attributes=True)


class SlabStatus(_Shown):
    """The shape of every slab, and how many there are; `ceiling_bytes` is the most that one can hold."""

    sink: int
    window: int
    ceiling_bytes: int
    total: int
    in_use: int


class SessionStatus(_Shown):
    """A long-lived session. Its slab holds `live_sink_tokens` and `live_window_tokens`, and no evicted tokens."""

    label: str
    history_length: int
    live_sink_tokens: int
    live_window_tokens: int
    evicted_token_count: int
    kv_live_bytes: int
    idle_seconds: float


class AdmissionStatus(_Shown):
    """HTTP completions that run and that wait, and how many may run at once."""

    max_concurrent: int
    running: int
    waiting: int
    policy: Literal["reject", "queue"]


class TurnStatus(_Shown):
    label: str
    history_length: int
    time_to_first_token_s: float


class PointTurn(_Shown):
    """The turn that led to a point: tokens of its prompt that were reused, read, and evicted by the end."""

    reused: int
    read: int
    evicted: int
    broke_at: str | None
    because: str | None


class PointStatus(_Shown):
    """A point in a conversation: its own items and tokens, and how many sessions stand there."""

    id: int
    parent_id: int | None
    is_answer: bool
    items: int
    tokens: int
    history_length: int
    sessions: int
    turn: PointTurn | None


class RuntimeStatus(_Shown):
    """`turns` are the last ones of sessions and of completions, the oldest first; `points` those of conversations, as a tree."""

    object: Literal["runtime"] = "runtime"
    model: str
    uptime_s: float
    slab: SlabStatus
    sessions: list[SessionStatus]
    admission: AdmissionStatus
    generated_tokens_total: int
    turns: list[TurnStatus]
    points: list[PointStatus]


def status_of(runtime: Runtime, model: str, uptime_s: float) -> RuntimeStatus:
    """The runtime's state now."""
    shape, load, metrics = runtime.shape, runtime.load(), runtime.metrics
    sessions = []
    for summary in runtime.list_sessions():
        live = max(0, summary.kv_live_bytes - shape.kept_bytes) // shape.token_bytes
        live_sink = min(live, shape.sink)
        sessions.append(
            SessionStatus(
                label=summary.label,
                history_length=summary.history_length,
                live_sink_tokens=live_sink,
                live_window_tokens=live - live_sink,
                evicted_token_count=summary.evicted_token_count,
                kv_live_bytes=summary.kv_live_bytes,
                idle_seconds=summary.idle_seconds,
            )
        )
    return RuntimeStatus(
        model=model,
        uptime_s=uptime_s,
        slab=SlabStatus(
            sink=shape.sink,
            window=shape.window,
            ceiling_bytes=shape.ceiling_bytes,
            total=load.slab_total,
            in_use=load.slab_in_use,
        ),
        sessions=sessions,
        admission=AdmissionStatus.model_validate(
            {
                "max_concurrent": runtime.settings.max_concurrent,
                "running": load.completions_running,
                "waiting": load.completions_waiting,
                "policy": runtime.settings.admission_policy,
            }
        ),
        generated_tokens_total=metrics.generated_token_count,
        turns=[TurnStatus.model_validate(turn) for turn in metrics.turns],
        points=[PointStatus.model_validate(point) for point in runtime.conversations.summaries()],
    )
