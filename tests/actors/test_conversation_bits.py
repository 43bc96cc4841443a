"""What is drawn in a conversation, bit for bit what a session of its own would draw that is fed the same tokens."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import pytest

from actors import Runtime, SessionHandle, open_runtime
from runtime import Settings, Token
from runtime.durable import DirectoryStore
from runtime.events import Overflow
from runtime.items import Message
from runtime.points import Point
from runtime.script import Head

CUE = "<|im_end|>\n<|im_start|>assistant\n"
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}]
Drawn = list[Token]


def chance(seed: int, count: int) -> list[int]:
    return [random.Random(seed).randrange(3, 2000) for _ in range(count)]


def settings(state: Path, **more: Any) -> Settings:
    return Settings(model="seedling", device="cpu", sink=4, window=1020, state_dir=str(state), **more)


def point_after(runtime: Runtime, *seeds: tuple[int, int]) -> Point:
    """The point of a conversation of which each part has tokens by chance: a seed and how many."""
    points = runtime.conversations.points
    point = points.root(Head())
    for seed, count in seeds:
        point = points.grow(point, [Message("user", f"{seed} {count}")], array("I", chance(seed, count)))
    return point


async def drawn(session: SessionHandle, sampling: dict[str, Any]) -> Drawn:
    """Tokens with the logits that they were drawn from, as far as logprobs tell: equal ones are of equal bits."""
    async with session.generate(6, top_logprobs=20, **sampling) as events:
        return [event async for event in events if isinstance(event, Token)]


async def in_conversation(runtime: Runtime, point: Point, sampling: dict[str, Any]) -> tuple[Drawn, int]:
    """What is drawn after a point, and how much of its prompt needed no reading."""
    cue = array("I", runtime.text.encode(CUE))
    async with runtime.conversations.stand(point, cue) as stand:
        stand.leave(point)
        await stand.session.append((point.history + cue)[stand.length :])
        return await drawn(stand.session, sampling), stand.reused


async def alone(runtime: Runtime, point: Point, sampling: dict[str, Any]) -> Drawn:
    async with runtime.completion(runtime.text.eos_token_ids, Overflow.EVICT) as completion:
        session, _ = completion.open(array("I"))
        await session.append(point.history + array("I", runtime.text.encode(CUE)))
        return await drawn(session, sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
async def test_after_going_on_going_back_a_copy_sleep_and_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    # A slow disk costs the conversation no slab that was to be left there.
    monkeypatch.setattr(DirectoryStore, "leaving_s", 1e9)
    head, long, other = (1, 90), (2, 300), (3, 40)
    async with open_runtime(settings(tmp_path, capacity=2)) as runtime:

        async def check(*parts: tuple[int, int]) -> int:
            point = point_after(runtime, *parts)
            tokens, reused = await in_conversation(runtime, point, sampling)
            assert tokens == await alone(runtime, point, sampling)
            return reused

        assert await check(head) == 0
        assert await check(head, (4, 50)) == 90  # on
        assert await check(head, (5, 50)) == 90  # back
        assert await check(head, long) >= 90
        assert await check(head, other) == 90  # on a copy
        assert await check(head, long, (6, 9)) == 390
        for _ in range(2):
            # Both slabs go to somebody else: the conversation's sessions sleep.
            await (await runtime.create_session()).append(chance(9, 20))
        await check(head, long, (7, 9))  # What was not on disk yet is read again.

    async with open_runtime(settings(tmp_path, capacity=2)) as runtime:
        again = point_after(runtime, head, long, (7, 9), (8, 12))
        tokens, reused = await in_conversation(runtime, again, sampling)
        assert tokens == await alone(runtime, again, sampling)
        assert reused == 399


async def test_past_the_window(tmp_path: Path) -> None:
    async with open_runtime(settings(tmp_path, capacity=1)) as runtime:
        parts = [(seed, 400) for seed in range(10, 15)]
        for count in range(1, 6):
            point = point_after(runtime, *parts[:count])
            tokens, reused = await in_conversation(runtime, point, {})
            assert reused == 400 * (count - 1)
            assert tokens == await alone(runtime, point, {})
