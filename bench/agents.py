"""A conversation as a coding agent has it: a long head, then turns of a few new tokens; how long each takes to its first token.

Each answer is one token long, and a turn is timed until it is there: tokens of a model with random weights have no words.

Ours is asked through `/v1/responses`, each turn by the id of the one before. Then it is asked once more with everything sent
again, as after a reconnect; after a restart of the server; and from a point half-way, a fork. A peer's server is sent the
whole conversation with each turn, of which the second and the last are timed.
"""

from __future__ import annotations

import json
import math
import socket
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import psutil
import trio

from bench.figures import Figure, figure
from bench.peers.processes import PeerFailed, installed
from bench.peers.servers import SERVERS, ServerKind, peer_server
from bench.scenario import Result, Setup
from bench.servers import serving
from runtime.models import find_model
from runtime.settings import Settings
from runtime.text import Text

WINDOW = 20_476
TURNS, GENERATED = 40, 1
HEAD_TOKENS = 8_000
_PAUSE_S = 30
# What tools gave back in turn, about.
NEW_TOKENS = (37, 150, 60, 600)
LATENCY = "seconds to the first token"
OURS = "perennial"
_WORDS = "the file reads well and the tests pass so the change may go in once the page is written".split()


@dataclass(slots=True)
class Talk:
    """What was said, as a client holds it."""

    messages: list[dict[str, str]] = field(default_factory=list)
    last_id: str | None = None

    def say(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": text})


def words_of(text: Text, tokens: int, number: int) -> str:
    """Words of about so many tokens, other ones for each number."""
    said = f"{number}:"
    while len(text.encode(said)) < tokens:
        said += " " + " ".join(_WORDS[(number + index) % len(_WORDS)] for index in range(max(1, tokens // 8)))
    return said


async def first_token(url: str, input_: object, previous: str | None) -> tuple[float, str, str, dict[str, Any]]:
    """Seconds to the first token of a turn, the answer's text, its id, and what it says of its prompt."""
    body = {"model": "bench", "input": input_, "stream": True, "temperature": 0, "max_output_tokens": GENERATED}
    if previous is not None:
        body["previous_response_id"] = previous
    return await trio.to_thread.run_sync(partial(_first_token, url, body))


def _first_token(url: str, body: dict[str, Any]) -> tuple[float, str, str, dict[str, Any]]:
    asked = urllib.request.Request(
        f"{url}/v1/responses", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(asked) as answer:
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if event["type"] in ("response.completed", "response.incomplete"):
                response = event["response"]
                text = "".join(part["text"] for item in response["output"] for part in item["content"])
                took = time.perf_counter() - began
                return took, text, response["id"], response["usage"]["input_tokens_details"]
    raise RuntimeError("the answer broke off")


@asynccontextmanager
async def our_server(settings: Settings, state: str) -> AsyncIterator[str]:
    """The URL of a server that keeps its conversations in `state`."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        bind = f"127.0.0.1:{listening.getsockname()[1]}"
    async with serving(replace(settings, state_dir=state, model_label="bench"), "--bind", bind):
        yield f"http://{bind}"


async def run(setup: Setup) -> Result:
    """Ours and the peers, one after the other."""
    settings = replace(
        setup.settings, window=WINDOW, capacity=2, max_concurrent=1, idle_ttl_s=0.0, request_timeout_s=3600.0
    )
    text = Text.load(find_model(settings.model))
    result, talk = Result(WINDOW), Talk()
    with tempfile.TemporaryDirectory() as state:
        async with our_server(settings, state) as url:
            seconds, half_way = await _converse(url, text, talk)
            again, *_, told = await first_token(url, talk.messages, None)
            result.remarks.append(f"sent again whole: {told}")
            forked, *_, told = await first_token(url, words_of(text, 60, 99), half_way)
            result.remarks.append(f"from the middle: {told}")
            # Sessions that are idle leave their slabs on disk.
            await trio.sleep(_PAUSE_S)
        async with our_server(settings, state) as url:
            restarted, *_, told = await first_token(url, talk.messages, None)
            result.remarks.append(f"after a restart: {told}")
    result.figures |= {
        "turn 1": figure("s", seconds[:1]),
        "turn 2": figure("s", seconds[1:2]),
        f"turn {TURNS}": figure("s", seconds[-1:]),
        "all sent again": figure("s", [again]),
        "a fork half-way": figure("s", [forked]),
        "after a restart": figure("s", [restarted]),
    }
    await _measure_peers(setup, talk, result)
    result.series[LATENCY] = {OURS: seconds} | marks(result.figures)
    return result


def marks(figures: Mapping[str, Figure]) -> dict[str, list[float]]:
    """What was measured of single turns, as lines with gaps: ours behind the last turn, and each peer's."""
    lines: dict[str, list[float]] = {}
    for name, found in figures.items():
        who, _, turn = name.rpartition(": ")
        if who:
            line = lines.setdefault(who, [math.nan] * TURNS)
            line[int(turn.removeprefix("turn ")) - 1] = found.median
        elif not name.startswith("turn "):
            lines[f"{OURS}, {name}"] = [math.nan] * TURNS + [found.median]
    return lines


async def _converse(url: str, text: Text, talk: Talk) -> tuple[list[float], str]:
    """Seconds to the first token of every turn, and the id of the answer half-way."""
    seconds, half_way = [], ""
    talk.say("system", words_of(text, HEAD_TOKENS, 0))
    for number in range(TURNS):
        talk.say("user", words_of(text, NEW_TOKENS[number % len(NEW_TOKENS)], number + 1))
        new = talk.messages if talk.last_id is None else talk.messages[-1:]
        took, said, talk.last_id, _ = await first_token(url, new, talk.last_id)
        seconds.append(took)
        talk.say("assistant", said)
        if number == TURNS // 2:
            half_way = talk.last_id
    talk.say("user", words_of(text, NEW_TOKENS[0], TURNS + 1))
    return seconds, half_way


async def _measure_peers(setup: Setup, talk: Talk, result: Result) -> None:
    versions = await installed(setup.peers)
    for kind in SERVERS:
        if kind.package not in versions:
            result.remarks.append(f"{kind.label}: {kind.package} is not installed for {setup.peers}")
            continue
        try:
            turns = await _peer_turns(kind, setup, talk)
        except PeerFailed as error:
            result.remarks.append(f"{kind.label}: {error}")
            continue
        result.peers[kind.package] = versions[kind.package]
        for name, took in turns.items():
            result.figures[f"{kind.label}: {name}"] = figure("s", [took])


async def _peer_turns(kind: ServerKind, setup: Setup, talk: Talk) -> dict[str, float]:
    """Seconds that a peer takes for the first token of some turns."""
    turns: dict[str, float] = {}
    threads = psutil.cpu_count(logical=False) or 1
    async with peer_server(kind, setup.peers, str(find_model(setup.settings.model)), threads) as server:
        # A head, then each turn a question and its answer. Who remembers has been sent the turn before the last, too.
        for number in (1, 2, *([TURNS - 1] if kind.remembers else []), TURNS):
            began = trio.current_time()
            await server.answer(talk.messages[: 2 * number], GENERATED)
            turns[f"turn {number}"] = trio.current_time() - began
    # What was not sent turn by turn is no turn's time.
    turns.pop(f"turn {TURNS - 1}", None)
    return turns
