"""Whether turn 150 is as fast as turn 1, and a session far past its window as fast and small as a young one.

Through gRPC, against a server process of its own, on the model given.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import psutil
import trio

from api.client import Client, ClientSession, connect
from bench.figures import Figure, figure, over
from bench.scenario import Result, Setup
from bench.servers import serving
from runtime.events import Token

APPENDED, GENERATED = 60, 32


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of one turn: to its first token, and in all."""

    first_token_s: float
    total_s: float


async def turn(session: ClientSession, token_ids: list[int], generated: int) -> Turn:
    """One turn: an append, then a generation to its full length."""
    began = trio.current_time()
    await session.append(token_ids)
    first = None
    async with session.generate(generated) as events:
        async for event in events:
            if first is None and isinstance(event, Token):
                first = trio.current_time()
    assert first is not None
    return Turn(first - began, trio.current_time() - began)


def some_tokens(number: int) -> list[int]:
    """What the turn of this number appends."""
    return [3 + (7 * number + offset) % 1000 for offset in range(APPENDED)]


async def many_turns(client: Client, turns: int, sessions: int) -> list[list[Turn]]:
    """`turns` turns on each of `sessions` sessions that run side by side: one list for each session."""
    taken: list[list[Turn]] = [[] for _ in range(sessions)]

    async def run(mine: list[Turn]) -> None:
        async with client.session() as session:
            for number in range(turns):
                mine.append(await turn(session, some_tokens(number), GENERATED))

    async with trio.open_nursery() as nursery:
        for mine in taken:
            nursery.start_soon(run, mine)
    return taken


async def side_by_side(client: Client, turns: int = 150, sessions: int = 8) -> tuple[dict[str, Figure], list[float]]:
    """Mean of the last ten turns over the mean of the first ten, in all sessions; and the mean of each turn."""
    taken = await many_turns(client, turns, sessions)
    means = [statistics.mean(mine[number].total_s for mine in taken) for number in range(turns)]
    first, last = statistics.mean(means[:10]), statistics.mean(means[-10:])
    figures = {
        f"a turn, {sessions} sessions side by side": figure("s", means),
        "mean of the last ten turns over the first ten's": figure("x", [last / first]),
    }
    return figures, means


async def far_past_the_window(
    client: Client, server: psutil.Process, repeats: int = 3, turns: int = 20
) -> dict[str, Figure]:
    """Time to first token of turn 20 over that of turn 2, medians of `repeats` sessions, and the server's memory."""
    second, last, resident = [], [], []
    for _ in range(repeats):
        async with client.session() as session:
            taken = []
            for number in range(turns):
                taken.append(await turn(session, some_tokens(number), GENERATED))
                resident.append(server.memory_info().rss)
            second.append(taken[1].first_token_s)
            last.append(taken[-1].first_token_s)
    early, late = figure("s", second), figure("s", last)
    return {
        "to the first token, turn 2": early,
        f"to the first token, turn {turns}": late,
        f"to the first token, turn {turns} over turn 2": over(late, early),
        "resident memory, end over first session": figure("x", [resident[-1] / resident[turns - 1]]),
    }


async def run(setup: Setup) -> Result:
    """Both measurements on a fresh server."""
    async with serving(setup.settings) as (address, process), connect(address) as client:
        await many_turns(client, 3, 2)
        async with client.session() as session:
            window = (await session.info()).window
        alone = await far_past_the_window(client, process)
        together, means = await side_by_side(client)
    return Result(window, alone | together, {"seconds a turn": {"mean of the sessions": means}})
