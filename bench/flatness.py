"""Whether turn 150 is as fast as turn 1, and a session far past its window as fast and small as a young one.

Through gRPC, against a server process of its own, on the model given.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import psutil
import trio

from api.client import Client, ClientSession, connect
from bench.servers import serving
from runtime.events import Token
from runtime.settings import Settings

APPENDED, GENERATED = 60, 32


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of one turn: to its first token, and in all."""

    first_token_s: float
    total_s: float


async def turn(session: ClientSession, number: int) -> Turn:
    """One turn: an append, then a generation to its full length."""
    began = trio.current_time()
    await session.append([3 + (7 * number + offset) % 1000 for offset in range(APPENDED)])
    first = None
    async with session.generate(GENERATED) as events:
        async for event in events:
            if first is None and isinstance(event, Token):
                first = trio.current_time()
    assert first is not None
    return Turn(first - began, trio.current_time() - began)


async def many_turns(client: Client, turns: int, sessions: int) -> list[list[Turn]]:
    """`turns` turns on each of `sessions` sessions that run side by side: one list for each session."""
    taken: list[list[Turn]] = [[] for _ in range(sessions)]

    async def run(mine: list[Turn]) -> None:
        async with client.session() as session:
            for number in range(turns):
                mine.append(await turn(session, number))

    async with trio.open_nursery() as nursery:
        for mine in taken:
            nursery.start_soon(run, mine)
    return taken


async def side_by_side(client: Client, turns: int = 150, sessions: int = 8) -> dict[str, Any]:
    """Mean of the last ten turns over the mean of the first ten, in all sessions."""
    taken = await many_turns(client, turns, sessions)
    first = statistics.mean(one.total_s for mine in taken for one in mine[:10])
    last = statistics.mean(one.total_s for mine in taken for one in mine[-10:])
    per_turn = [statistics.mean(mine[number].total_s for mine in taken) for number in range(turns)]
    return {
        "turns": turns,
        "sessions": sessions,
        "first_ten_s": first,
        "last_ten_s": last,
        "ratio": last / first,
        "per_turn_s": per_turn,
    }


async def far_past_the_window(
    client: Client, server: psutil.Process, repeats: int = 5, turns: int = 20
) -> dict[str, Any]:
    """Time to first token of turn 20 over that of turn 2, medians of `repeats` sessions, and the server's memory."""
    second, last, resident = [], [], []
    for _ in range(repeats):
        async with client.session() as session:
            taken = []
            for number in range(turns):
                taken.append(await turn(session, number))
                resident.append(server.memory_info().rss)
            second.append(taken[1].first_token_s)
            last.append(taken[-1].first_token_s)
    return {
        "turns": turns,
        "turn_2_first_token_s": spread(second),
        "last_turn_first_token_s": spread(last),
        "ratio": statistics.median(last) / statistics.median(second),
        "resident_bytes_after_first_session": resident[turns - 1],
        "resident_bytes_at_the_end": resident[-1],
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


async def run(settings: Settings) -> dict[str, Any]:
    """Both measurements on a fresh server."""
    async with serving(settings) as (address, process), connect(address) as client:
        await many_turns(client, 3, 2)
        return {
            "far_past_the_window": await far_past_the_window(client, process),
            "side_by_side": await side_by_side(client),
        }
