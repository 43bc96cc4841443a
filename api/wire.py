"""Converts between the core's values and the messages of `kakeya.v1`, for the server and for its client."""

from __future__ import annotations

from proto.kakeya.v1 import (
    AppendTokensResponse,
    GenerateDone,
    GenerateDoneStopReason,
    GenerateResponse,
    GetModelInfoResponse,
    GetSessionInfoResponse,
    HistoryTruncated,
    ListSessionsResponseSession,
    ListSnapshotsResponseSnapshot,
)
from proto.kakeya.v1 import Overflow as WireOverflow
from runtime import errors, events
from runtime.errors import InvalidRequest, InvariantViolation, PerennialError, SessionFailed
from runtime.sessions import Appended, ModelInfo, SessionInfo, SessionSummary, Snapshot

PACKAGE = "kakeya.v1"
SERVICE = f"{PACKAGE}.RuntimeService"
ERROR_KEY = "x-perennial-error"
"""The trailing metadata that says which error ended a call, as `error_on_wire` spells it."""

OVERFLOWS = {WireOverflow.EVICT: events.Overflow.EVICT, WireOverflow.ERROR: events.Overflow.ERROR}

_STOP_REASONS = {
    events.StopReason.MAX_TOKENS: GenerateDoneStopReason.MAX_TOKENS,
    events.StopReason.EOS: GenerateDoneStopReason.EOS,
    events.StopReason.TRUNCATED: GenerateDoneStopReason.TRUNCATED,
}
_REASONS = {on_wire: reason for reason, on_wire in _STOP_REASONS.items()}


def error_on_wire(error: PerennialError) -> str:
    """The name of the error's class and, after a space, the field or the invariant that the error names."""
    match error:
        case InvalidRequest(param=str(about)) | InvariantViolation(kind=about):
            # Metadata takes no other characters.
            known = about if about.isascii() and about.isprintable() else ""
        case _:
            known = ""
    return f"{type(error).__name__} {known}".strip()


def error_of(spelled: str, message: str) -> PerennialError | None:
    """The error that `error_on_wire` spelled; None for one that this version does not know."""
    name, _, about = spelled.partition(" ")
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PerennialError)):
        return None
    if issubclass(kind, InvariantViolation):
        return kind(message, about)
    return kind(message, about or None) if issubclass(kind, InvalidRequest) else kind(message)


def frame_of(event: events.Event) -> GenerateResponse:
    match event:
        case events.Token(token_id):
            return GenerateResponse(token_id=token_id)
        case events.HistoryTruncated(count):
            return GenerateResponse(truncated=HistoryTruncated(dropped_token_count=count))
        case events.Done(stop_reason, count, prefill_duration_s, total_duration_s, proposed, accepted, reread):
            done = GenerateDone(
                stop_reason=_STOP_REASONS[stop_reason],
                generated_token_count=count,
                prefill_duration_seconds=prefill_duration_s,
                total_duration_seconds=total_duration_s,
                proposed_token_count=proposed,
                accepted_token_count=accepted,
                reread_token_count=reread,
            )
            return GenerateResponse(done=done)


def event_of(frame: GenerateResponse) -> events.Event:
    """Raises SessionFailed for a frame of a later version."""
    match frame:
        case GenerateResponse(token_id=int() as token_id):
            return events.Token(token_id)
        case GenerateResponse(truncated=HistoryTruncated(dropped_token_count=count)):
            return events.HistoryTruncated(count)
        case GenerateResponse(done=GenerateDone() as done) if done.stop_reason in _REASONS:
            return events.Done(
                _REASONS[done.stop_reason],
                done.generated_token_count,
                done.prefill_duration_seconds,
                done.total_duration_seconds,
                done.proposed_token_count,
                done.accepted_token_count,
                done.reread_token_count,
            )
        case _:
            raise SessionFailed("the server sent an event that this client does not know: use a newer client")


def appended_on_wire(appended: Appended) -> AppendTokensResponse:
    return AppendTokensResponse(
        history_length=appended.history_length,
        evicted_token_count=appended.evicted_token_count,
        history_digest=appended.history_digest,
        reread_token_count=appended.reread_token_count,
    )


def appended_of(reply: AppendTokensResponse) -> Appended:
    return Appended(reply.history_length, reply.evicted_token_count, reply.history_digest, reply.reread_token_count)


# Fields of the same name and meaning on both sides. The counts of broken invariants stay 0, because a session with one has
# failed and answers no more.
_INFO_FIELDS = (
    "history_length",
    "kv_live_bytes",
    "kv_ceiling_bytes",
    "evicted_token_count",
    "sink",
    "window",
    "idle_seconds",
    "history_digest",
)


def info_on_wire(info: SessionInfo) -> GetSessionInfoResponse:
    return GetSessionInfoResponse(**{name: getattr(info, name) for name in _INFO_FIELDS})


def info_of(reply: GetSessionInfoResponse) -> SessionInfo:
    return SessionInfo(**{name: getattr(reply, name) for name in _INFO_FIELDS})


def model_on_wire(info: ModelInfo) -> GetModelInfoResponse:
    return GetModelInfoResponse(
        model=info.model,
        vocabulary=info.vocabulary,
        tokenizer_digest=info.tokenizer_digest,
        eos_token_ids=sorted(info.eos_token_ids),
        kernel_class=info.kernel_class,
    )


def model_of(reply: GetModelInfoResponse) -> ModelInfo:
    eos_token_ids = frozenset(reply.eos_token_ids)
    return ModelInfo(reply.model, reply.vocabulary, reply.tokenizer_digest, eos_token_ids, reply.kernel_class)


def summary_on_wire(summary: SessionSummary) -> ListSessionsResponseSession:
    return ListSessionsResponseSession(
        client_label=summary.label,
        history_length=summary.history_length,
        evicted_token_count=summary.evicted_token_count,
        kv_live_bytes=summary.kv_live_bytes,
        idle_seconds=summary.idle_seconds,
    )


def summary_of(wire: ListSessionsResponseSession) -> SessionSummary:
    return SessionSummary(
        label=wire.client_label,
        history_length=wire.history_length,
        evicted_token_count=wire.evicted_token_count,
        kv_live_bytes=wire.kv_live_bytes,
        idle_seconds=wire.idle_seconds,
    )


def snapshot_on_wire(snapshot: Snapshot) -> ListSnapshotsResponseSnapshot:
    return ListSnapshotsResponseSnapshot(
        snapshot_id=snapshot.snapshot_id,
        client_label=snapshot.label,
        history_length=snapshot.history_length,
        size_bytes=snapshot.size_bytes,
        saved_at=snapshot.saved_at,
    )


def snapshot_of(wire: ListSnapshotsResponseSnapshot) -> Snapshot:
    return Snapshot(wire.snapshot_id, wire.client_label, wire.history_length, wire.size_bytes, wire.saved_at)
