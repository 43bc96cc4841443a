"""Clients of servers that come and go: turns that are asked for until they are given, and what they should have been."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TypeVar

import trio

from actors import Runtime
from api.client import Client, ClientSession
from runtime import Done, Token
from runtime.errors import (
    CapacityExhausted,
    EngineFailed,
    HistoryMismatch,
    NotServing,
    SessionFailed,
    SessionMoved,
    StorageFailed,
)
from runtime.events import Event

# What a client is told while its session moves, or its replica is no more. It asks again.
PASSING = (SessionMoved, NotServing, SessionFailed, EngineFailed, StorageFailed, CapacityExhausted)
UNHEARD = -1

R = TypeVar("R")


@dataclass
class Turn:
    """What was appended, and what came; -1 for a token that was recorded and not heard of."""

    given: list[int]
    seed: int
    drawn: list[int] = field(default_factory=list)


@dataclass
class Seen:
    """What one session's client knows of it, and how often it was told to ask again."""

    session_id: str = ""
    turns: list[Turn] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    reread: int = 0
    digest: bytes = b""

    @property
    def length(self) -> int:
        return sum(len(turn.given) + len(turn.drawn) for turn in self.turns)


async def asked(seen: Seen, call: Callable[[], Awaitable[R]]) -> R:
    """The answer to a call that changes nothing, asked until there is one."""
    while True:
        try:
            return await call()
        except PASSING as error:
            seen.told[type(error).__name__] += 1
            await trio.sleep(0.3)


async def append(session: ClientSession, seen: Seen, turn: Turn) -> None:
    """Appends once, however often it has to be asked for."""
    length = seen.length
    while True:
        try:
            appended = await session.append(turn.given, expected_history_length=length)
        except PASSING as error:
            seen.told[type(error).__name__] += 1
            await trio.sleep(0.3)
        except HistoryMismatch:
            # An earlier try was recorded, and its answer lost.
            info = await asked(seen, session.info)
            assert info.history_length == length + len(turn.given)
            break
        else:
            assert appended.history_length == length + len(turn.given)
            seen.reread += appended.reread_token_count
            break
    seen.turns.append(turn)


async def draw(session: ClientSession, seen: Seen, turn: Turn, count: int) -> None:
    """Draws so many tokens, begun again wherever it was broken off."""
    while len(turn.drawn) < count:
        try:
            async with session.generate(count - len(turn.drawn), temperature=0.8, seed=turn.seed) as events:
                last: Event | None = None
                async for event in events:
                    last = event
                    if isinstance(event, Token):
                        turn.drawn.append(event.token_id)
            # A stream that was cut ends with an error, and never as one that is complete.
            assert isinstance(last, Done)
            seen.reread += last.reread_token_count
        except PASSING as error:
            seen.told[type(error).__name__] += 1
            await trio.sleep(0.3)
            info = await asked(seen, session.info)
            unheard = info.history_length - seen.length
            assert 0 <= unheard <= count - len(turn.drawn), (seen.session_id, unheard)
            turn.drawn += [UNHEARD] * unheard


async def begin(client: Client, seen: Seen) -> ClientSession:
    """A new session."""
    session = await asked(seen, client.create_session)
    seen.session_id = session.id
    return session


async def take_turn(session: ClientSession, seen: Seen, chance: random.Random) -> None:
    """Appends some tokens and draws some."""
    turn = Turn([chance.randrange(3, 2000) for _ in range(chance.randrange(2, 30))], chance.randrange(2**32))
    await append(session, seen, turn)
    await draw(session, seen, turn, chance.randrange(10, 80))


async def take_turns(
    session: ClientSession, seen: Seen, chance: random.Random, pause_s: float, over: trio.Event
) -> None:
    """Turns with pauses, of `pause_s` on average, until it is `over`."""
    while not over.is_set():
        await take_turn(session, seen, chance)
        with trio.move_on_after(chance.expovariate(1 / pause_s)):
            await over.wait()


async def end(session: ClientSession, seen: Seen) -> None:
    """Checks that the session is as long as its client knows, and keeps the digest of its history."""
    info = await asked(seen, session.info)
    assert info.history_length == seen.length
    seen.digest = info.history_digest


async def undisturbed(runtime: Runtime, seen: Seen) -> bytes:
    """Checks every token of a session against those of one server that nothing happens to; the digest of its history."""
    session = await runtime.create_session()
    history = array("I")
    for turn in seen.turns:
        await session.append(turn.given)
        drawn: list[int] = []
        async with session.generate(len(turn.drawn), temperature=0.8, seed=turn.seed) as events:
            async for event in events:
                if isinstance(event, Token):
                    drawn.append(event.token_id)
        assert [one if one != UNHEARD else other for one, other in zip(turn.drawn, drawn, strict=True)] == drawn
        history.extend([*turn.given, *drawn])
    await session.close()
    return blake2b(history.tobytes()).digest()


def told_in_all(everyone: list[Seen]) -> str:
    """How often clients were told to ask again, by the error that told them."""
    told = sum((seen.told for seen in everyone), Counter[str]())
    return ", ".join(f"{count} {name}" for name, count in sorted(told.items())) or "nothing"
