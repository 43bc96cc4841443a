"""The client for programs without an event loop: the same calls, each of which waits for its answer.

The calls run in an event loop in a thread of their own; one client may be used from several threads.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from api.client import Client, ClientEvents, ClientSession, connect
from runtime.events import Event
from runtime.sessions import Appended, ModelInfo, Saved, SessionInfo, SessionSummary, Snapshot


@contextmanager
def connect_sync(address: str, *, key: str = "", tls: ssl.SSLContext | None = None) -> Iterator[SyncClient]:
    """As `api.client.connect`."""
    with (
        start_blocking_portal(name="perennial client") as portal,
        portal.wrap_async_context_manager(connect(address, key=key, tls=tls)) as client,
    ):
        yield SyncClient(portal, client)


class SyncClient:
    """As `api.client.Client`, with the same arguments, answers and errors."""

    def __init__(self, portal: BlockingPortal, client: Client) -> None:
        self._portal = portal
        self._client = client

    def create_session(self, eos_token_ids: Iterable[int] = (), **options: Any) -> SyncSession:
        return self._wrap(self._portal.call(partial(self._client.create_session, eos_token_ids, **options)))

    @contextmanager
    def session(self, eos_token_ids: Iterable[int] = (), **options: Any) -> Iterator[SyncSession]:
        with self._portal.wrap_async_context_manager(self._client.session(eos_token_ids, **options)) as session:
            yield self._wrap(session)

    def restore_session(self, snapshot_id: str) -> SyncSession:
        return self._wrap(self._portal.call(self._client.restore_session, snapshot_id))

    def list_snapshots(self) -> list[Snapshot]:
        return self._portal.call(self._client.list_snapshots)

    def delete_snapshot(self, snapshot_id: str) -> int:
        return self._portal.call(self._client.delete_snapshot, snapshot_id)

    def find_session(self, session_id: str) -> SyncSession:
        return self._wrap(self._client.find_session(session_id))

    def model_info(self) -> ModelInfo:
        return self._portal.call(self._client.model_info)

    def list_sessions(self) -> list[SessionSummary]:
        return self._portal.call(self._client.list_sessions)

    def _wrap(self, session: ClientSession) -> SyncSession:
        return SyncSession(self._portal, session)


class SyncSession:
    """As `api.client.ClientSession`, with the same arguments, answers and errors."""

    def __init__(self, portal: BlockingPortal, session: ClientSession) -> None:
        self.id = session.id
        self._portal = portal
        self._session = session

    def append(self, token_ids: Iterable[int], expected_history_length: int | None = None) -> Appended:
        return self._portal.call(self._session.append, token_ids, expected_history_length)

    @contextmanager
    def generate(self, max_tokens: int, **sampling: Any) -> Iterator[Iterator[Event]]:
        with self._portal.wrap_async_context_manager(self._session.generate(max_tokens, **sampling)) as events:
            yield self._each(events)

    def info(self) -> SessionInfo:
        return self._portal.call(self._session.info)

    def fork(self) -> SyncSession:
        return SyncSession(self._portal, self._portal.call(self._session.fork))

    def save(self) -> Saved:
        return self._portal.call(self._session.save)

    def close(self) -> int:
        return self._portal.call(self._session.close)

    def _each(self, events: ClientEvents) -> Iterator[Event]:
        # StopAsyncIteration does not pass through a future.
        while (event := self._portal.call(anext, events, None)) is not None:
            yield event
