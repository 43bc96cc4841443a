"""What the gRPC door costs: one stream through it, against the same generation embedded, in turns."""

from __future__ import annotations

import statistics
from typing import Any, Protocol

import trio

from actors import open_runtime
from api.client import connect
from bench.flatness import spread
from bench.servers import serving
from runtime.events import Done, Token
from runtime.settings import Settings

REPEATS = 7
PROMPT = [5, 6, 7, 8]


class Session(Protocol):
    """What an embedded session and a client's have in common here."""

    async def append(self, token_ids: list[int], /) -> object: ...
    def generate(self, max_tokens: int, /) -> Any: ...
    async def close(self) -> int: ...


async def seconds_a_token(session: Session, count: int) -> float:
    """Seconds a token, of a generation's tokens but the first."""
    await session.append(PROMPT)
    async with session.generate(count) as events:
        first = last = 0.0
        async for event in events:
            if isinstance(event, Token):
                last = trio.current_time()
                first = first or last
            assert isinstance(event, Token | Done)
    await session.close()
    return (last - first) / (count - 1)


async def run(settings: Settings) -> dict[str, Any]:
    """Medians of both ways on the settings' model, their difference, and it as a share of a token's time."""
    count = 200 if settings.model == "seedling" else 24
    embedded, through_door = [], []
    async with (
        open_runtime(settings) as runtime,
        serving(settings) as (address, _),
        connect(address) as client,
    ):
        for repeat in range(REPEATS + 1):
            inside = await seconds_a_token(await runtime.create_session(), count)
            outside = await seconds_a_token(await client.create_session(), count)
            if repeat:
                embedded.append(inside)
                through_door.append(outside)
    differences = [outside - inside for inside, outside in zip(embedded, through_door, strict=True)]
    return {
        "tokens": count,
        "embedded_s_a_token": spread(embedded),
        "grpc_s_a_token": spread(through_door),
        "overhead_s_a_token": spread(differences),
        "ratio": statistics.median(through_door) / statistics.median(embedded),
    }
