"""Conversations: what was said in them, and which sessions stand where in them."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import trio

from actors.handles import SessionHandle
from runtime.errors import CapacityExhausted, SessionFailed, SessionNotFound
from runtime.points import Point, PointTree, common_history
from runtime.slab_spec import SlabSpec

LABEL = "conversation"
# Tokens, items and answers of all conversations together; those used longest ago are forgotten beyond it.
MOST_BYTES = 256 * 2**20
# Points and turns that an operator is shown.
_MOST_SUMMARIES = 200
# What points are named by at which sessions stand.
_SESSION = "session "
# A branch of more tokens than this is kept in a slab of its own, where one can be had, when a conversation goes back behind it.
_WORTH_A_SLAB = 256
# To copy a slab for fewer tokens takes longer than to read them.
_WORTH_A_COPY = 32


class Sessions(Protocol):
    """Where sessions come from."""

    async def create_session(
        self, eos_token_ids: Iterable[int] = (), *, label: str = "", is_kept: bool = True
    ) -> SessionHandle: ...

    async def fork_session(self, session_id: str) -> SessionHandle: ...

    def find_session(self, session_id: str) -> SessionHandle: ...


@dataclass(frozen=True, slots=True)
class TurnTold:
    """What a turn's answer said of its prompt: tokens that needed no reading, that were read, and that are out of sight."""

    reused: int
    read: int
    evicted: int
    broke_at: str | None
    because: str | None


@dataclass(frozen=True, slots=True)
class PointSummary:
    """What an operator sees of a place in a conversation: the tokens that came last, and the turn that led there."""

    id: int
    parent_id: int | None
    is_answer: bool
    items: int
    tokens: int
    history_length: int
    sessions: int
    turn: TurnTold | None


@dataclass(slots=True)
class Stand:
    """A session lent to one turn: its history is the first `length` tokens of the turn's, `reused` of which need no reading.

    Whoever has it says by `leave` where in the conversation it stands in the end; without a word the session is closed.
    """

    session: SessionHandle
    length: int
    reused: int
    point: Point | None = None

    def leave(self, point: Point) -> None:
        """Says that the session stands at this point once it is given back."""
        self.point = point


class Conversations:
    """The tree of conversations, and the sessions that stand at its points. A session is lent to one turn at a time."""

    def __init__(
        self,
        sessions: Sessions,
        spec: SlabSpec,
        eos_token_ids: frozenset[int],
        points: PointTree | None = None,
        *,
        are_kept: bool = False,
    ) -> None:
        """`points` are those of an earlier server, whose sessions stand where it left them.

        Where points are not kept, sessions need not be: nobody would know where they stand.
        """
        self.points = points or PointTree(MOST_BYTES)
        self._sessions = sessions
        self._spec = spec
        self._eos_token_ids = eos_token_ids
        self._are_kept = are_kept
        # The one that was used last stands last.
        self._standing = {
            name.removeprefix(_SESSION): point
            for name in self.points.names()
            if name.startswith(_SESSION) and (point := self.points.named(name)) is not None
        }
        self._reading: dict[trio.Event, Point] = {}
        self._told: deque[tuple[int, TurnTold]] = deque(maxlen=_MOST_SUMMARIES)

    @asynccontextmanager
    async def stand(self, point: Point, cue: array[int]) -> AsyncIterator[Stand]:
        """A session that has read as much of the conversation up to a point, and of the cue, as any that is not lent.

        Raises CapacityExhausted where none is to be had.
        """
        await self._until_read(point)
        async with self._lent(point, cue) as stand:
            yield stand

    def held(self, point: Point) -> int:
        """How many tokens of the beginning of a conversation a session has that is not lent."""
        found = self._best(point, array("I"))
        return found[1] if found else 0

    async def read_ahead(self, point: Point) -> None:
        """Has a session read a conversation up to a point. Who goes on from there meanwhile waits for it."""
        is_read = trio.Event()
        self._reading[is_read] = point
        try:
            async with self._lent(point, array("I")) as stand:
                stand.leave(point)
                await stand.session.append(point.since(stand.length))
        finally:
            del self._reading[is_read]
            is_read.set()

    @asynccontextmanager
    async def _lent(self, point: Point, cue: array[int]) -> AsyncIterator[Stand]:
        stand = await self._take(point, cue)
        try:
            yield stand
        finally:
            with trio.CancelScope(shield=True):
                await self._give_back(stand)

    async def _until_read(self, point: Point) -> None:
        nodes = {each.node for each in point.path()}
        while waits := [is_read for is_read, part in self._reading.items() if part.node in nodes]:
            await waits[0].wait()

    async def _take(self, point: Point, cue: array[int]) -> Stand:
        history = point.history + cue
        while (found := self._best(point, cue)) is not None:
            session_id, length = found
            given_up = self._standing[session_id].length - length
            try:
                if given_up > min(length, _WORTH_A_SLAB):
                    with suppress(CapacityExhausted):
                        if length < _WORTH_A_COPY:
                            return await self._new_stand()
                        return await self._stand_of(await self._sessions.fork_session(session_id), history)
                stood = self._standing.pop(session_id)
                try:
                    return await self._stand_of(self._sessions.find_session(session_id), history)
                except CapacityExhausted:
                    # It sleeps on, and nothing of it has changed.
                    self._standing[session_id] = stood
                    raise
            except (SessionNotFound, SessionFailed):
                self._standing.pop(session_id, None)
                self.points.forget(_SESSION + session_id)
        return await self._new_stand()

    def tell(self, point: Point, told: TurnTold) -> None:
        """Remembers what the turn that ended at a point was told of its prompt."""
        self._told.append((point.node.id, told))

    def summaries(self) -> list[PointSummary]:
        """The points that were used last, parents before their children."""
        nodes = sorted(self.points.nodes(), key=lambda node: node.used)[-_MOST_SUMMARIES:]
        told, standing = dict(self._told), Counter(point.node.id for point in self._standing.values())
        return [
            PointSummary(
                id=node.id,
                parent_id=node.parent.node.id if node.parent and node.parent.node.parent else None,
                is_answer=node.is_answer,
                items=len(node.items),
                tokens=len(node.tokens),
                history_length=Point(node, len(node.tokens)).length,
                sessions=standing[node.id],
                turn=told.get(node.id),
            )
            for node in sorted(nodes, key=lambda node: node.id)
        ]

    def stands(self, session_id: str) -> bool:
        """Whether a session stands somewhere in a conversation."""
        return session_id in self._standing

    async def _new_stand(self) -> Stand:
        session = await self._sessions.create_session(self._eos_token_ids, label=LABEL, is_kept=self._are_kept)
        return Stand(session, 0, 0)

    async def _stand_of(self, session: SessionHandle, history: array[int]) -> Stand:
        try:
            rewound = await session.rewind(history)
        except CapacityExhausted:
            raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._give_back(Stand(session, 0, 0))
            raise
        return Stand(session, rewound.length, rewound.read)

    def _best(self, point: Point, cue: array[int]) -> tuple[str, int] | None:
        """The session that has most of the beginning of a history, and how much that is."""
        best: tuple[str, int] | None = None
        for session_id, held in self._standing.items():
            length = common_history(held, point, cue)
            if not self._spec.is_whole(held.length, length):
                continue
            if length and (best is None or length >= best[1]):
                best = (session_id, length)
        return best

    async def _give_back(self, stand: Stand) -> None:
        session, point = stand.session, stand.point
        with suppress(SessionNotFound, SessionFailed):
            length = (await session.info()).history_length
            if point is None or length < point.length:
                self.points.forget(_SESSION + session.id)
                await session.close()
                return
            if length > point.length:
                await session.rewind(point.history)
            self._standing[session.id] = point
            self.points.name(_SESSION + session.id, point)
