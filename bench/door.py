"""What the gRPC door costs: one stream through it, against the same generation embedded, in turns."""

from __future__ import annotations

from typing import Any, Protocol

import trio

from actors import open_runtime
from api.client import connect
from bench.figures import figure, over, repeats
from bench.models import QWEN3_06B
from bench.scenario import Result, Setup
from bench.servers import serving
from runtime.events import Done, Token

BUDGET_S = 30
PROMPT = [5, 6, 7, 8]


class Session(Protocol):
    """What an embedded session and a client's have in common here."""

    async def append(self, token_ids: list[int], /) -> object: ...
    def generate(self, max_tokens: int, /) -> Any: ...
    async def close(self) -> int: ...


async def milliseconds_a_token(session: Session, count: int) -> float:
    """Of a generation's tokens but the first."""
    await session.append(PROMPT)
    async with session.generate(count) as events:
        first = last = 0.0
        async for event in events:
            if isinstance(event, Token):
                last = trio.current_time()
                first = first or last
            assert isinstance(event, Token | Done)
    await session.close()
    return 1000 * (last - first) / (count - 1)


async def run(setup: Setup) -> Result:
    """Milliseconds a token both ways, and what the door adds."""
    settings = setup.settings
    count = 8 if setup.model == QWEN3_06B else 200
    inside, outside = [], []
    async with (
        open_runtime(settings) as runtime,
        serving(settings) as (address, _),
        connect(address) as client,
    ):
        await milliseconds_a_token(await runtime.create_session(), 2)
        await milliseconds_a_token(await client.create_session(), 2)
        for _ in repeats(BUDGET_S):
            inside.append(await milliseconds_a_token(await runtime.create_session(), count))
            outside.append(await milliseconds_a_token(await client.create_session(), count))
    embedded, through_door = figure("ms", inside), figure("ms", outside)
    added = [door - without for door, without in zip(outside, inside, strict=True)]
    return Result(
        runtime.facts.slab.window,
        {
            "a token, embedded": embedded,
            "a token, through gRPC": through_door,
            "what the door adds to a token": figure("ms", added),
            "through gRPC over embedded": over(through_door, embedded),
        },
    )
