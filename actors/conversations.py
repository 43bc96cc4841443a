"""Conversations: what was said in them, and which sessions stand where in them."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import trio

from actors.handles import SessionHandle
from runtime.durable import Terms
from runtime.errors import CapacityExhausted, RequestError, SessionFailed, SessionMoved, SessionNotFound
from runtime.points import Point, PointTree, common_history
from runtime.slab_spec import SlabSpec

_LABEL = "conversation"
# Bound on the tokens, items and answers of all conversations together. Beyond it the least recently used are forgotten.
MOST_BYTES = 256 * 2**20
# The most points, and the most turns, that an operator is shown.
_MOST_SUMMARIES = 200
# Prefix of the names under which the tree remembers at which point a session stands.
_SESSION = "session "
# When a conversation goes back to an earlier point, the branch that it leaves keeps its slab if it is longer than this and
# another slab is free.
_WORTH_A_SLAB = 256
# Copying a slab for fewer tokens takes longer than reading them again.
_WORTH_A_COPY = 32


class Sessions(Protocol):
    """What makes and finds sessions: the runtime."""

    async def create_session_of(self, terms: Terms, *, is_kept: bool) -> SessionHandle: ...

    async def fork_session(self, session_id: str) -> SessionHandle: ...

    def find_session(self, session_id: str) -> SessionHandle: ...


@dataclass(frozen=True, slots=True)
class TurnReport:
    """What a turn's answer reported about its prompt: tokens reused, tokens read, and tokens evicted."""

    reused: int
    read: int
    evicted: int
    broke_at: str | None
    because: str | None


@dataclass(frozen=True, slots=True)
class PointSummary:
    """What an operator sees of one point in a conversation: its own tokens, and the turn that led to it."""

    id: int
    parent_id: int | None
    is_answer: bool
    items: int
    tokens: int
    history_length: int
    sessions: int
    turn: TurnReport | None


@dataclass(slots=True)
class Stand:
    """A session lent to one turn: it holds the first `length` tokens of the turn's prompt, `reused` of which its slab has read.

    Its borrower calls `leave` with the point at which the session ends up; if it does not, the session is closed.
    """

    session: SessionHandle
    length: int
    reused: int
    point: Point | None = None

    def leave(self, point: Point) -> None:
        """Records the point at which the session stands when it is given back."""
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

        If points are not kept on disk, sessions are not either: after a restart nobody would know where they stand.
        """
        self.points = points or PointTree(MOST_BYTES)
        self._sessions = sessions
        self._spec = spec
        self._eos_token_ids = eos_token_ids
        self._are_kept = are_kept
        # The ids of sessions that are not lent, in order of use, the most recently used last; where they stand the tree knows.
        self._standing = dict.fromkeys(
            name.removeprefix(_SESSION) for name in self.points.names() if name.startswith(_SESSION)
        )
        self._reading: dict[trio.Event, Point] = {}
        self._reports: deque[tuple[int, TurnReport]] = deque(maxlen=_MOST_SUMMARIES)

    @asynccontextmanager
    async def stand(self, point: Point, cue: array[int]) -> AsyncIterator[Stand]:
        """Lends the session that has read most of the conversation up to `point` and of the `cue` after it.

        Raises CapacityExhausted if no slab is free.
        """
        await self._wait_until_read(point, cue)
        async with self._lend(point, cue) as stand:
            yield stand

    def held(self, point: Point) -> int:
        """How many of the conversation's first tokens the best session that is not lent has read."""
        found = self._best(point, array("I"))
        return found[2] if found else 0

    async def read_ahead(self, point: Point) -> None:
        """Makes a session read a conversation up to `point`. Turns that continue from there wait until it has."""
        is_read = trio.Event()
        self._reading[is_read] = point
        try:
            async with self._lend(point, array("I")) as stand:
                stand.leave(point)
                await stand.session.append(point.since(stand.length))
        finally:
            del self._reading[is_read]
            is_read.set()

    @asynccontextmanager
    async def _lend(self, point: Point, cue: array[int]) -> AsyncIterator[Stand]:
        stand = await self._take(point, cue)
        try:
            yield stand
        finally:
            with trio.CancelScope(shield=True):
                await self._give_back(stand)

    async def _wait_until_read(self, point: Point, cue: array[int]) -> None:
        """Waits while a beginning of this history is being read."""
        while waits := [
            is_read for is_read, part in self._reading.items() if common_history(part, point, cue) == part.length
        ]:
            await waits[0].wait()

    async def _take(self, point: Point, cue: array[int]) -> Stand:
        history = point.history + cue
        while (found := self._best(point, cue)) is not None:
            session_id, stood, length = found
            given_up = stood.length - length
            try:
                if given_up > min(length, _WORTH_A_SLAB):
                    with suppress(CapacityExhausted):
                        if length < _WORTH_A_COPY:
                            return await self._new_stand()
                        return await self._stand_of(await self._sessions.fork_session(session_id), history)
                    if self._best(point, cue) != found:
                        # Another turn took the session meanwhile, or left one that is better.
                        continue
                del self._standing[session_id]
                try:
                    return await self._stand_of(self._sessions.find_session(session_id), history, stood)
                except CapacityExhausted:
                    # The session is still asleep and unchanged.
                    self._standing[session_id] = None
                    raise
            except (SessionNotFound, SessionFailed):
                self._standing.pop(session_id, None)
                self.points.forget(_SESSION + session_id)
        return await self._new_stand()

    def record_turn(self, point: Point, report: TurnReport) -> None:
        """Remembers for operators what the turn that ended at `point` reported about its prompt."""
        self._reports.append((point.node.id, report))

    def summaries(self) -> list[PointSummary]:
        """The most recently used points, parents before their children."""
        nodes = self.points.latest(_MOST_SUMMARIES)
        reports, standing = dict(self._reports), Counter(point.node.id for _, point in self._stands())
        return [
            PointSummary(
                id=node.id,
                parent_id=node.parent.node.id if node.parent and node.parent.node.parent else None,
                is_answer=node.is_answer,
                items=len(node.items),
                tokens=len(node.tokens),
                history_length=Point(node, len(node.tokens)).length,
                sessions=standing[node.id],
                turn=reports.get(node.id),
            )
            for node in sorted(nodes, key=lambda node: node.id)
        ]

    def stands(self, session_id: str) -> bool:
        """Whether this session stands at some point."""
        return session_id in self._standing

    async def _new_stand(self) -> Stand:
        terms = Terms(self._eos_token_ids, label=_LABEL, is_lent=True)
        session = await self._sessions.create_session_of(terms, is_kept=self._are_kept)
        return Stand(session, 0, 0)

    async def _stand_of(self, session: SessionHandle, history: array[int], stood: Point | None = None) -> Stand:
        """Lends a session, which `stood` at a point, to a turn whose prompt is `history`."""
        try:
            rewound = await session.rewind(history)
        except CapacityExhausted:
            raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._give_back(Stand(session, 0, 0, stood))
            raise
        return Stand(session, rewound.length, rewound.read)

    def _stands(self) -> Iterator[tuple[str, Point]]:
        """The sessions that are not lent and where each stands, the most recently used last."""
        for session_id in self._standing:
            if (point := self.points.named(_SESSION + session_id)) is not None:
                yield session_id, point

    def _best(self, point: Point, cue: array[int]) -> tuple[str, Point, int] | None:
        """The session that shares the longest beginning with this history, where it stands, and that beginning's length.

        None if no session shares any.
        """
        best: tuple[str, Point, int] | None = None
        for session_id, held in self._stands():
            length = common_history(held, point, cue)
            if not self._spec.is_whole(held.length, length):
                continue
            if length and (best is None or length >= best[2]):
                best = (session_id, held, length)
        return best

    async def _give_back(self, stand: Stand) -> None:
        """Remembers where the session stands from now on. One of which nobody would know, or no longer, is closed."""
        session, point = stand.session, stand.point
        try:
            length = (await session.info()).history_length
            if point is None or length < point.length or not point.node.is_held:
                self.points.forget(_SESSION + session.id)
                await session.close()
                return
            if length > point.length:
                await session.rewind(point.history)
        except (SessionNotFound, SessionMoved, SessionFailed):
            self.points.forget(_SESSION + session.id)
            return
        except RequestError:
            # It fell asleep meanwhile, with its whole history, and cannot be woken now.
            if point is None:
                return
        self._standing[session.id] = None
        self.points.name(_SESSION + session.id, point)
        self._forget_ended()

    def _forget_ended(self) -> None:
        """Forgets the sessions that were evicted and are not kept: those that were used least recently."""
        for session_id in [*self._standing]:
            try:
                self._sessions.find_session(session_id)
            except SessionNotFound:
                del self._standing[session_id]
                self.points.forget(_SESSION + session_id)
            else:
                break
