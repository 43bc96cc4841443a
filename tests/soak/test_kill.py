"""`kill -9` at any moment costs nothing that was acknowledged, and the session goes on with the tokens it would have given."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors import open_runtime
from api.client import connect
from bench.servers import serving
from runtime import Settings, Token
from runtime.errors import NotServing
from tests.actors.engines import generated

pytestmark = pytest.mark.soak

PROMPT = [3 + (11 * place) % 2000 for place in range(100)]
KILLS = 50
# Frames that a server had handed to its sockets when it was killed: recorded, and not seen by the client.
_ON_THEIR_WAY = 200
SAMPLING: dict[str, Any] = {"temperature": 0.8, "seed": 5}


async def test_fifty_kills_in_the_middle_of_a_generation_change_nothing(
    tmp_path: Path, record: Callable[[str, str], None]
) -> None:
    settings = Settings(device="cpu", window=124, state_dir=str(tmp_path / "state"))
    chance = random.Random(0)
    acknowledged: list[int] = []
    session_id = ""
    for kill in range(KILLS + 1):
        with_server = serving(settings, dies=kill < KILLS)
        async with with_server as (address, process), connect(address) as client:
            if not session_id:
                session = await client.create_session(label="killed")
                session_id = session.id
                await session.append(PROMPT)
            session = client.find_session(session_id)
            length = (await session.info()).history_length
            assert len(PROMPT) + len(acknowledged) <= length <= len(PROMPT) + len(acknowledged) + _ON_THEIR_WAY
            unseen = length - len(PROMPT) - len(acknowledged)
            acknowledged += [-1] * unseen
            at = chance.randrange(1, 60)
            try:
                async with session.generate(200, **SAMPLING) as events:
                    async for event in events:
                        if isinstance(event, Token):
                            acknowledged.append(event.token_id)
                            at -= 1
                        if at == 0:
                            if kill < KILLS:
                                os.kill(process.pid, signal.SIGKILL)
                            else:
                                break
            except NotServing:
                assert kill < KILLS
    async with open_runtime(Settings(device="cpu", window=124)) as runtime:
        whole = await runtime.create_session()
        await whole.append(PROMPT)
        expected = await generated(whole, len(acknowledged), **SAMPLING)
    assert [token for token in acknowledged if token != -1]
    assert [one if one != -1 else other for one, other in zip(acknowledged, expected, strict=True)] == expected
    record(
        f"{KILLS} times `kill -9` at a random moment of a generation, with `state_dir`",
        f"0 of {len(acknowledged)} acknowledged tokens lost or changed",
    )
