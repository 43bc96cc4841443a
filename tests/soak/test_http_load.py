"""Five minutes of 200 HTTP clients, half of them rude: no polite one is given a wrong body, and nothing is left behind.

Then, beside an executor that has no pause, how long a completion waits to be told that it is one too many.
"""

from __future__ import annotations

import json
import random
import re
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from statistics import median, quantiles
from typing import Any

import httpx
import pytest
import trio

from bench.servers import serving
from runtime import Settings
from tests.contract.servers import JSON, free_port

pytestmark = pytest.mark.soak

SECONDS, WARM_UP_S, CLIENTS = 300, 30, 200
REJECTING_S, PROBES = 60, 4
# An idle connection is kept for five seconds.
CONNECTIONS_END_S = 8
IDLE_WITHIN_S = 30
# What garbage collection and caches may keep.
SLACK_BYTES = 32 * 2**20
COMPLETIONS = "/v1/chat/completions"
WORDS = "the sea a ship and its crew went far over dark water to find some island with tall trees".split()
ENDLESS = {"max_tokens": 2**31 - 1, "ignore_eos": True}

Body = dict[str, Any]
Ask = Callable[[Body], Awaitable[object]]


def talk(chance: random.Random, length: int) -> Body:
    content = " ".join(chance.choice(WORDS) for _ in range(length))
    return {"model": "seedling", "messages": [{"role": "user", "content": content}]}


def polite_request(number: int) -> Body:
    """One of the requests whose answer is known: seeded, and of every form."""
    chance = random.Random(number)
    more: list[Body] = [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 3}, {"top_p": 0.7, "top_k": 40}, {"stop": "a"}]
    return (
        talk(chance, chance.choice([1, 5, 30, 150]))
        | {"seed": number, "temperature": chance.choice([0.0, 0.8, 1.5]), "max_tokens": chance.randrange(1, 40)}
        | {"stream": bool(number % 2), "ignore_eos": chance.random() < 0.5}
        | ({"stream_options": {"include_usage": True}} if number % 4 == 1 else {})
        | chance.choice(more)
    )


REQUESTS = [polite_request(number) for number in range(40)]


def asking(client: httpx.AsyncClient) -> Ask:
    """The way to ask for the body of an answer, without what is of one answer alone."""

    async def ask(request: Body) -> object:
        response = await client.post(COMPLETIONS, json=request)
        assert response.status_code == 200, response.text
        if not request["stream"]:
            return lasting(response.json())
        *events, done, nothing = response.text.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        # Answers to one prompt take turns as the executor has it; each comes in its own order.
        return sorted((lasting(json.loads(event.removeprefix("data: "))) for event in events), key=index_of)

    return ask


def lasting(body: Body) -> Body:
    return {name: value for name, value in body.items() if name not in ("id", "created")}


def index_of(event: Body) -> int:
    return event["choices"][0]["index"] if event["choices"] else 99


@dataclass
class Tally:
    """What became of the requests of clients that rest at most `rest_s` after each."""

    rest_s: float = 0.5
    ends: Counter[str] = field(default_factory=Counter)

    async def polite_client(self, http: str, alone: list[object], seed: int) -> None:
        chance = random.Random(seed)
        async with httpx.AsyncClient(base_url=http, timeout=300) as client:
            ask = asking(client)
            while True:
                number = chance.randrange(len(REQUESTS))
                self.ends["right" if await ask(REQUESTS[number]) == alone[number] else "wrong"] += 1
                await trio.sleep(chance.random() * self.rest_s / 5)

    async def rude_client(self, http: str, seed: int) -> None:
        chance = random.Random(seed)
        while True:
            rudeness = chance.choice(RUDENESSES)
            with suppress(trio.BrokenResourceError, OSError):
                async with connected(http, is_reset=chance.random() < 0.3) as stream:
                    await rudeness(stream, chance)
            self.ends[rudeness.__name__] += 1
            await trio.sleep(chance.random() * self.rest_s)


@asynccontextmanager
async def connected(http: str, *, is_reset: bool = False) -> AsyncIterator[trio.SocketStream]:
    """A connection, which ends as it may: with all said, or as when a machine goes away."""
    url = httpx.URL(http)
    async with await trio.open_tcp_stream(url.host, url.port or 80) as stream:
        if is_reset:
            stream.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        yield stream


def posted(body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return f"POST {COMPLETIONS} {JSON}{length}\r\n\r\n".encode() + body


def request_of(chance: random.Random, **more: object) -> bytes:
    length = chance.choice([1, 20, 100, 1000])
    return posted(json.dumps(talk(chance, length) | ENDLESS | {"n": chance.choice([1, 1, 3])} | more).encode())


async def read_for(stream: trio.SocketStream, seconds: float) -> None:
    with trio.move_on_after(seconds):
        while await stream.receive_some():
            pass


async def says_nothing(stream: trio.SocketStream, chance: random.Random) -> None:
    await trio.sleep(chance.random() / 5)


async def sends_noise(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(chance.randbytes(chance.randrange(1, 5000)))
    await read_for(stream, 0.2)


async def sends_half(stream: trio.SocketStream, chance: random.Random) -> None:
    whole = request_of(chance)
    await stream.send_all(whole[: chance.randrange(len(whole))])
    await read_for(stream, chance.random())


async def sends_bad_json(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(posted(chance.choice([b"", b"{", b"[" * 5000, b'{"model": 5}', b"\xff", b"null"])))
    await read_for(stream, 0.5)


async def promises_more_than_it_sends(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(posted(b'{"model":', chance.choice([10, 10**6, 10**9])))
    await read_for(stream, chance.random())


async def leaves_an_answer(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(request_of(chance))
    await read_for(stream, chance.random() * chance.choice([0.1, 0.5, 2]))


async def leaves_a_stream(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(request_of(chance, stream=True))
    await read_for(stream, chance.random() * chance.choice([0.1, 0.5, 2]))


async def leaves_a_stream_unread(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(request_of(chance, stream=True))
    await trio.sleep(chance.random() * 2)


async def does_not_wait_for_answers(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(request_of(chance) * 3)
    await read_for(stream, chance.random())


RUDENESSES = [
    *(says_nothing, sends_noise, sends_half, sends_bad_json, promises_more_than_it_sends),
    *(leaves_an_answer, leaves_a_stream, leaves_a_stream_unread, does_not_wait_for_answers),
]


async def metrics_of(http: str) -> Callable[[str], float]:
    """The sums of what /metrics says now of each name."""
    async with httpx.AsyncClient(base_url=http, timeout=30) as client:
        text = (await client.get("/metrics")).text

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^perennial_{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))

    return total


async def until_idle(http: str) -> Callable[[str], float]:
    with trio.fail_after(IDLE_WITHIN_S):
        while True:
            total = await metrics_of(http)
            if not any(map(total, ("slab_in_use", "session_active", "admission_pending"))):
                return total


async def test_five_minutes_of_rude_and_polite_clients_leave_nothing_behind_and_no_body_is_wrong(
    record: Callable[[str, str], None],
) -> None:
    http = f"http://127.0.0.1:{free_port()}"
    settings = Settings(device="cpu", window=252, http_overflow="evict", max_concurrent=8, admission_policy="queue")
    async with serving(settings, "--bind", http.removeprefix("http://")) as (_, process):
        async with httpx.AsyncClient(base_url=http, timeout=60) as client:
            alone = [await asking(client)(request) for request in REQUESTS]

        async def all_round(seconds: float) -> Tally:
            tally = Tally()
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as nursery:
                    for number in range(CLIENTS // 2):
                        nursery.start_soon(tally.polite_client, http, alone, number)
                        nursery.start_soon(tally.rude_client, http, number)
            await until_idle(http)
            await trio.sleep(CONNECTIONS_END_S)
            return tally

        await all_round(WARM_UP_S)
        before, threads, files = process.memory_info().rss, process.num_threads(), process.num_fds()

        tally = await all_round(SECONDS)

        total = await until_idle(http)
        after = process.memory_info().rss
        assert tally.ends["right"] > 0
        assert tally.ends["wrong"] == 0
        assert all(tally.ends[rudeness.__name__] for rudeness in RUDENESSES)
        assert total("cache_invariant_violations_total") == total('session_total{outcome="failed"}') == 0
        assert after < before + SLACK_BYTES
        assert process.num_threads() <= threads + 2
        assert process.num_fds() <= files + 2
        visits = sum(tally.ends[rudeness.__name__] for rudeness in RUDENESSES)
        record(
            f"{SECONDS} s of {CLIENTS} HTTP/1.1 clients without a pause, half of them rude",
            f"{visits} rude visits, {tally.ends['right']} right answers, 0 wrong; threads and files back, "
            f"memory {(after - before) / 2**20:+.1f} MiB",
        )


async def probe(http: str, waits_s: list[float], seed: int) -> None:
    """Notes how long each refusal takes, from the request's last byte but one to the answer's last."""
    chance = random.Random(seed)
    request = request_of(chance, stream=bool(seed % 2), n=1)
    async with connected(http) as stream:
        while True:
            sent = time.perf_counter()
            await stream.send_all(request)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += await stream.receive_some()
            waits_s.append(time.perf_counter() - sent)
            assert answer.startswith(b"HTTP/1.1 429 "), answer
            await trio.sleep(chance.random() / 20)


async def test_a_completion_too_many_is_told_so_while_the_executor_is_busy(
    record: Callable[[str, str], None],
) -> None:
    http = f"http://127.0.0.1:{free_port()}"
    settings = Settings(device="cpu", window=252, http_overflow="evict", max_concurrent=4, request_timeout_s=3600)
    waits_s: list[float] = []
    async with serving(settings, "--bind", http.removeprefix("http://")) as _, AsyncExitStack() as held:
        for length in (1, 1, 1, 100_000):
            stream = await held.enter_async_context(connected(http))
            body = talk(random.Random(length), length) | ENDLESS
            await stream.send_all(posted(json.dumps(body).encode()))
        with trio.fail_after(30):
            while (await metrics_of(http))("slab_in_use") < 4:
                pass
        forwards = (await metrics_of(http))("forward_rows_count")

        with trio.move_on_after(REJECTING_S):
            async with trio.open_nursery() as nursery:
                for number in range(PROBES):
                    nursery.start_soon(probe, http, waits_s, number)

        forwards = (await metrics_of(http))("forward_rows_count") - forwards
        await held.aclose()
        total = await until_idle(http)
        p99 = quantiles(waits_s, n=100)[98]
        record(
            "requests beyond `max_concurrent`, while the executor is busy",
            f"{len(waits_s)} times 429 beside {forwards:.0f} forwards: median {1e3 * median(waits_s):.1f} ms, "
            f"p99 {1e3 * p99:.1f}, longest {1e3 * max(waits_s):.1f}",
        )
        assert total('admission_total{result="admitted"}') == 4
