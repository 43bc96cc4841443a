"""Conversations: what was said in them, and which sessions stand where in them."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import trio

from actors.handles import SessionHandle
from runtime.errors import CapacityExhausted, SessionFailed, SessionNotFound
from runtime.points import Point, PointTree
from runtime.slab import SlabSpec, common_length

LABEL = "conversation"
# Tokens, items and answers of all conversations together; those used longest ago are forgotten beyond it.
MOST_BYTES = 256 * 2**20
# A branch of more tokens than this is kept in a slab of its own, where one can be had, when a conversation goes back behind it.
_WORTH_A_SLAB = 256
# To copy a slab for fewer tokens takes longer than to read them.
_WORTH_A_COPY = 32


class Sessions(Protocol):
    """Where sessions come from."""

    async def create_session(self, eos_token_ids: Iterable[int] = (), *, label: str = "") -> SessionHandle: ...

    async def fork_session(self, session_id: str) -> SessionHandle: ...

    def find_session(self, session_id: str) -> SessionHandle: ...


@dataclass(slots=True)
class Stand:
    """A session lent to one turn: `length` tokens of the turn's history are in its own, `reused` of them need no reading.

    Whoever has it sets `point` to where in the conversation it stands in the end; without one the session is closed.
    """

    session: SessionHandle
    length: int
    reused: int
    point: Point | None = None


class Conversations:
    """The tree of conversations, and the sessions that stand at its points. A session is lent to one turn at a time."""

    def __init__(self, sessions: Sessions, spec: SlabSpec, eos_token_ids: Iterable[int]) -> None:
        self.points = PointTree(MOST_BYTES)
        self._sessions = sessions
        self._spec = spec
        self._eos_token_ids = frozenset(eos_token_ids)
        # The one that was used last stands last.
        self._standing: dict[str, Point] = {}
        self._reading: dict[trio.Event, array[int]] = {}

    @asynccontextmanager
    async def stand(self, history: array[int]) -> AsyncIterator[Stand]:
        """A session whose history is a beginning of `history`: as much of it as any session has that is not lent.

        Raises CapacityExhausted where none is to be had.
        """
        await self._until_read(history)
        async with self._lent(history) as stand:
            yield stand

    def held(self, history: array[int]) -> int:
        """How many tokens of the beginning of a history a session has that is not lent."""
        found = self._best(history)
        return found[1] if found else 0

    async def read_ahead(self, point: Point) -> None:
        """Has a session read a conversation up to a point. Who goes on from there meanwhile waits for it."""
        history, is_read = point.history, trio.Event()
        self._reading[is_read] = history
        try:
            async with self._lent(history) as stand:
                await stand.session.append(history[stand.length :])
                stand.point = point
        finally:
            del self._reading[is_read]
            is_read.set()

    @asynccontextmanager
    async def _lent(self, history: array[int]) -> AsyncIterator[Stand]:
        stand = await self._take(history)
        try:
            yield stand
        finally:
            with trio.CancelScope(shield=True):
                await self._give_back(stand)

    async def _until_read(self, history: array[int]) -> None:
        while waits := [
            is_read for is_read, part in self._reading.items() if common_length(part, history) == len(part)
        ]:
            await waits[0].wait()

    async def _take(self, history: array[int]) -> Stand:
        while (found := self._best(history)) is not None:
            session_id, length = found
            given_up = self._standing[session_id].length - length
            try:
                if given_up > min(length, _WORTH_A_SLAB):
                    with suppress(CapacityExhausted):
                        if length < _WORTH_A_COPY:
                            return await self._new_stand()
                        return await self._stand_of(await self._sessions.fork_session(session_id), length)
                del self._standing[session_id]
                return await self._stand_of(self._sessions.find_session(session_id), length)
            except (SessionNotFound, SessionFailed):
                self._standing.pop(session_id, None)
        return await self._new_stand()

    async def _new_stand(self) -> Stand:
        return Stand(await self._sessions.create_session(self._eos_token_ids, label=LABEL), 0, 0)

    async def _stand_of(self, session: SessionHandle, length: int) -> Stand:
        stand = Stand(session, length, 0)
        try:
            stand.reused = await session.rewind(length)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._give_back(stand)
            raise
        return stand

    def _best(self, history: array[int]) -> tuple[str, int] | None:
        """The session that has most of the beginning of a history, and how much that is."""
        best: tuple[str, int] | None = None
        for session_id, point in self._standing.items():
            held = point.history
            length = common_length(held, history)
            if not self._spec.is_whole(len(held), length):
                continue
            if length and (best is None or length >= best[1]):
                best = (session_id, length)
        return best

    async def _give_back(self, stand: Stand) -> None:
        session, point = stand.session, stand.point
        with suppress(SessionNotFound, SessionFailed):
            length = (await session.info()).history_length
            if point is None or length < point.length:
                await session.close()
                return
            if length > point.length:
                await session.rewind(point.length)
            self._standing[session.id] = point
