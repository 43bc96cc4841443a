"""Two minutes of clients that behave as badly as they can; at the end the server stands where it began."""

from __future__ import annotations

import random
import re
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import trio

from api.client import Client, connect
from bench.servers import serving
from runtime import Settings
from runtime.errors import PerennialError

pytestmark = pytest.mark.soak

SECONDS, CLIENTS = 120, 12
# What garbage collection and caches may keep.
SLACK_BYTES = 24 * 2**20


async def behave(client: Client, chance: random.Random) -> None:
    """One session, used well or badly."""
    session = await client.create_session(eos_token_ids=[chance.randrange(2000)])
    with trio.move_on_after(chance.choice([0.05, 0.3, 5.0])):
        for _ in range(chance.randrange(1, 4)):
            await session.append([chance.randrange(2048) for _ in range(chance.randrange(200))])
            sampling: dict[str, Any] = {"temperature": chance.choice([0.0, 1.0]), "seed": chance.randrange(2**64)}
            async with session.generate(chance.randrange(1, 100), **sampling) as events:
                for _ in range(chance.randrange(1, 100)):
                    if await anext(events, None) is None:
                        break
                    if chance.random() < 0.02:
                        await trio.sleep(chance.random())
    if chance.random() < 0.7:
        await session.close()


async def misbehave(address: str, chance: random.Random) -> None:
    """Bytes that are no gRPC, or the beginning of some."""
    host, _, port = address.rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
    async with stream:
        try:
            await stream.send_all(chance.choice([b"", preface, preface[:9]]) + chance.randbytes(chance.randrange(2000)))
            with trio.move_on_after(0.2):
                await stream.receive_some()
        except trio.BrokenResourceError:
            pass


async def rude_client(address: str, seed: int) -> None:
    chance = random.Random(seed)
    with trio.move_on_after(SECONDS):
        while True:
            if chance.random() < 0.2:
                await misbehave(address, chance)
                continue
            async with connect(address) as client:
                # Leaving this block with calls under way drops the connection.
                with trio.move_on_after(chance.choice([0.2, 2.0, 10.0])):
                    while True:
                        with suppress(PerennialError):
                            await behave(client, chance)


def metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^perennial_{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))


async def test_two_minutes_of_chaos_leave_nothing_behind(record: Callable[[str, str], None]) -> None:
    http = f"127.0.0.1:{_free_port()}"
    settings = Settings(device="cpu", window=124, capacity=6, idle_ttl_s=2)
    async with serving(settings, "--bind", http) as (address, process):

        def metrics() -> str:
            with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as reply:
                text: str = reply.read().decode()
                return text

        async def all_round(seconds: float) -> None:
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as nursery:
                    for number in range(CLIENTS):
                        nursery.start_soon(rude_client, address, number)

        await all_round(20)
        await trio.sleep(5)
        before = process.memory_info().rss
        threads, files = process.num_threads(), process.num_fds()

        await all_round(SECONDS)

        # Sessions that were left behind are evicted when their time is over.
        await trio.sleep(5)
        text = await trio.to_thread.run_sync(metrics)
        assert metric(text, "slab_in_use") == metric(text, "session_active") == 0
        assert metric(text, "cache_invariant_violations_total") == 0
        assert metric(text, 'session_total{outcome="failed"}') == 0
        assert process.num_threads() <= threads + 2
        assert process.num_fds() <= files + 2
        assert process.memory_info().rss < before + SLACK_BYTES
        async with connect(address) as client, client.session() as session:
            assert (await session.append([5, 6, 7])).history_length == 3
        record(
            f"{SECONDS} s of {CLIENTS} gRPC clients that leave, ask too much, or speak no HTTP/2",
            f"{metric(text, 'generated_tokens_total'):.0f} tokens given, 0 sessions failed; memory, threads and files back",
        )


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
