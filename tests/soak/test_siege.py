"""Ten minutes of 300 HTTP and 200 gRPC clients, two thirds of them rude in every way that is known here.

Polite ones are answered as if they were alone, `/healthz` answers at once, and at the end nothing is left behind.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import httpx
import psutil
import pytest
import trio
from h2.exceptions import ProtocolError

from api.client import Client, connect
from bench.servers import serving
from proto.kakeya.v1 import GenerateRequest
from runtime import Settings, Token
from runtime.errors import CapacityExhausted, NotServing, PerennialError, SessionNotFound
from tests.api.h2_client import rude as rude_http2
from tests.api.hostile import (
    CHECK,
    CONTINUATION,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    REFLECTION,
    RST_STREAM,
    SERVICE,
    SETTINGS,
    WINDOW_UPDATE,
    Peer,
    frame,
    message,
    peer_at,
    setting,
)
from tests.contract.servers import free_port
from tests.soak.test_http_load import (
    CONNECTIONS_END_S,
    ENDLESS,
    REQUESTS,
    RUDENESSES,
    SLACK_BYTES,
    Tally,
    asking,
    talk,
    until_idle,
)

pytestmark = pytest.mark.soak

SECONDS, WARM_UP_S = 600, 45
HTTP_CLIENTS, GRPC_CLIENTS = 300, 200
HISTORIES = [[3 + (7 * number + 11 * place) % 2000 for place in range(20 + 15 * number)] for number in range(8)]
DRAIN_S = 15
# A client rests up to this long after each visit, so that the two cores of a small machine carry the server and all of them.
REST_S = 8.0
EVICTED = (CapacityExhausted, SessionNotFound)
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, EOFError, ProtocolError)


# gRPC clients. Each has a connection, which it leaves as it likes.


async def floods_with_unknown_frames(peer: Peer, chance: random.Random) -> None:
    await peer.send(*[frame(chance.choice([0x42, 0x0A, 0x0C, 0x10, 0xFE]), payload=chance.randbytes(9))] * 50)
    await peer.is_answered()


async def opens_and_resets(peer: Peer, chance: random.Random) -> None:
    for _ in range(chance.randrange(1, 150)):
        number = await peer.open(CHECK, message())
        await peer.send(frame(RST_STREAM, 0, number, struct.pack(">I", 8)))


async def promises_four_gigabytes(peer: Peer, chance: random.Random) -> None:
    path = chance.choice([CHECK, REFLECTION, f"{SERVICE}/AppendTokens"])
    await peer.open(path, message(b"x" * 1000, length=2**32 - 1), ends=False)
    await trio.sleep(chance.random())


async def sends_noise_after_the_preface(peer: Peer, chance: random.Random) -> None:
    await peer.send(chance.randbytes(chance.randrange(1, 3000)))
    await peer.farewell()


async def sends_headers_without_end(peer: Peer, chance: random.Random) -> None:
    await peer.send(frame(HEADERS, 0, 1), *[frame(CONTINUATION, 0, 1, bytes(500))] * 60)
    await peer.farewell()


async def floods_with_pings(peer: Peer, chance: random.Random) -> None:
    kinds = [frame(PING, payload=bytes(8)), frame(SETTINGS), frame(WINDOW_UPDATE, payload=b"\x00\x00\x00\x01")]
    await peer.send(*[chance.choice(kinds)] * 3000)
    await peer.farewell()


async def says_nothing_over_grpc(peer: Peer, chance: random.Random) -> None:
    peer.answers_pings = False
    await peer.send()
    await trio.sleep(2 * chance.random())


HOSTILITIES = [
    *(floods_with_unknown_frames, opens_and_resets, promises_four_gigabytes, sends_noise_after_the_preface),
    *(sends_headers_without_end, floods_with_pings, says_nothing_over_grpc),
]


async def leaves_a_generation(client: Client, chance: random.Random) -> None:
    """A session of its own, and a stream that it does not take to its end."""
    async with client.session(label="rude") as session:
        await session.append(chance.choice(HISTORIES))
        async with session.generate(100_000) as events:
            for _ in range(chance.randrange(1, 30)):
                await anext(events)


async def never_reads_a_generation(address: str, chance: random.Random) -> None:
    async with connect(address) as client, client.session(label="rude") as session:
        await session.append(chance.choice(HISTORIES))
        async with peer_at(address, setting(INITIAL_WINDOW_SIZE, 0)) as peer:
            request = GenerateRequest(session_id=session.id, max_tokens=100_000)
            await peer.open(f"{SERVICE}/Generate", message(bytes(request)))
            await trio.sleep(3 * chance.random())


@dataclass
class Siege:
    """What both kinds of clients came to, on one server."""

    http: str
    grpc: str
    tally: Tally

    @property
    def ends(self) -> Counter[str]:
        return self.tally.ends

    async def polite_grpc(self, alone: list[list[int]], seed: int) -> None:
        chance = random.Random(seed)
        while True:
            with suppress(*EVICTED):
                async with connect(self.grpc) as client, client.session(label="polite") as session:
                    for _ in range(3):
                        number = chance.randrange(len(HISTORIES))
                        self.ends["grpc right" if await said(client, number) == alone[number] else "grpc wrong"] += 1
                    await session.info()
            await trio.sleep(chance.random() * REST_S)

    async def rude_grpc(self, seed: int) -> None:
        chance = random.Random(seed)
        while True:
            kind: Any = chance.choice([*HOSTILITIES, leaves_a_generation, never_reads_a_generation])
            with suppress(*BROKEN, PerennialError, AssertionError), trio.move_on_after(30):
                if kind is leaves_a_generation:
                    async with connect(self.grpc) as client:
                        await leaves_a_generation(client, chance)
                elif kind is never_reads_a_generation:
                    await never_reads_a_generation(self.grpc, chance)
                else:
                    async with peer_at(self.grpc) as peer:
                        await kind(peer, chance)
            self.ends[kind.__name__] += 1
            await trio.sleep(chance.random() * REST_S)

    async def rude_http2(self, seed: int) -> None:
        chance = random.Random(seed)
        url = httpx.URL(self.http)
        address = (url.host, url.port or 80)
        while True:
            window = chance.choice([0, 0, 1000])
            with suppress(*BROKEN), trio.move_on_after(20):
                async with rude_http2(address, window) as client:
                    for _ in range(chance.randrange(1, 6)):
                        path = chance.choice(["/openapi.json", "/metrics", "/", "/v1/chat/completions"])
                        body = talk(chance, 20) | ENDLESS | {"stream": True} if path.startswith("/v1") else None
                        number = await client.ask(path, body)
                        await trio.sleep(chance.random() / 2)
                        if chance.random() < 0.5:
                            await client.reset(number)
            self.ends["http/2"] += 1
            await trio.sleep(chance.random() * REST_S)

    async def all_round(self, seconds: float, bodies: list[object], alone: list[list[int]]) -> None:
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for number in range(HTTP_CLIENTS // 3):
                    nursery.start_soon(self.tally.polite_client, self.http, bodies, number)
                    nursery.start_soon(self.tally.rude_client, self.http, number)
                    nursery.start_soon(self.rude_http2, number)
                for number in range(GRPC_CLIENTS):
                    if number % 3:
                        nursery.start_soon(self.rude_grpc, number)
                    else:
                        nursery.start_soon(self.polite_grpc, alone, number)


async def said(client: Client, number: int) -> list[int]:
    """What a fresh session says after one of the histories; asked anew while every slab is at work or another took ours."""
    while True:
        try:
            async with client.session(label="polite") as session:
                await session.append(HISTORIES[number])
                async with session.generate(12, temperature=0.8, seed=number) as events:
                    return [event.token_id async for event in events if isinstance(event, Token)]
        except EVICTED:
            await trio.sleep(0.5)


PROBE = """
import http.client, json, sys, time
host, port = sys.argv[1], int(sys.argv[2])
taken = []
try:
    while True:
        began = time.perf_counter()
        connection = http.client.HTTPConnection(host, port, timeout=60)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        taken.append(time.perf_counter() - began)
        time.sleep(0.05)
except KeyboardInterrupt:
    print(json.dumps(taken))
"""


async def test_ten_minutes_under_siege_leave_nothing_behind_and_nobody_is_answered_wrongly(
    record: Callable[[str, str], None],
) -> None:
    http_url = f"http://127.0.0.1:{free_port()}"
    settings = Settings(
        device="cpu",
        window=252,
        capacity=48,
        max_concurrent=8,
        http_overflow="evict",
        admission_policy="queue",
        reader_timeout_s=5,
        idle_ttl_s=15,
        idle_connection_s=20,
    )
    bind = http_url.removeprefix("http://")
    async with serving(settings, "--bind", bind) as (grpc, process):
        async with httpx.AsyncClient(base_url=http_url, timeout=60) as client:
            bodies = [await asking(client)(request) for request in REQUESTS]
        async with connect(grpc) as grpc_client:
            alone = [await said(grpc_client, number) for number in range(len(HISTORIES))]

        await Siege(http_url, grpc, Tally(REST_S)).all_round(WARM_UP_S, bodies, alone)
        await quiet(http_url, process)
        before, threads, files = process.memory_info().rss, process.num_threads(), process.num_fds()
        host, _, port = bind.partition(":")
        siege = Siege(http_url, grpc, Tally(REST_S))
        async with trio.open_nursery() as nursery:
            # In a process of its own: this one is as busy as the server.
            command = [sys.executable, "-c", PROBE, host, port]
            running = partial(trio.run_process, command, capture_stdout=False, stdout=subprocess.PIPE)
            probe: trio.Process = await nursery.start(running)
            await siege.all_round(SECONDS, bodies, alone)
            probe.send_signal(signal.SIGINT)
            assert probe.stdout is not None
            taken = json.loads(b"".join([part async for part in probe.stdout]))
        await quiet(http_url, process)
        after, threads_after, files_after = process.memory_info().rss, process.num_threads(), process.num_fds()
        p99 = quantiles(taken, n=100)[98]
        assert siege.ends["wrong"] == siege.ends["grpc wrong"] == 0
        assert siege.ends["right"] > 0
        assert siege.ends["grpc right"] > 0
        assert all(siege.ends[kind.__name__] for kind in (*RUDENESSES, *HOSTILITIES, leaves_a_generation))
        assert after < before + SLACK_BYTES
        assert threads_after <= threads + 4
        assert files_after <= files + 4
        stopping = time.monotonic()
    stopped_s = time.monotonic() - stopping
    assert stopped_s < DRAIN_S
    print(dict(sorted(siege.ends.items())))
    polite = siege.ends["right"], siege.ends["grpc right"]
    record(
        f"{SECONDS} s of {HTTP_CLIENTS} HTTP and {GRPC_CLIENTS} gRPC clients, two thirds rude in every way known here, "
        f"each with a rest of at most {REST_S:.0f} s after a visit",
        f"{siege.ends.total() - sum(polite)} rude visits; {polite[0]} HTTP and {polite[1]} gRPC answers right, 0 wrong; "
        f"memory {(after - before) / 2**20:+.1f} MiB, threads {threads} to {threads_after}, files {files} to "
        f"{files_after}; `/healthz` asked {len(taken)} times: median {1e3 * median(taken):.1f} ms, "
        f"p99 {1e3 * p99:.1f}, longest {1e3 * max(taken):.1f}; SIGTERM obeyed in {stopped_s:.1f} s",
    )


async def quiet(http_url: str, process: psutil.Process) -> None:
    """Returns once every call and every connection of the siege has ended."""
    await trio.sleep(CONNECTIONS_END_S)
    with suppress(http.client.HTTPException, NotServing):
        await until_idle(http_url)
    await trio.sleep(25)
