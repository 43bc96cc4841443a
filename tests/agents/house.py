"""The HTTP door of this process over a model with a script, and what agents said to it and heard from it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve

from actors import Runtime
from actors.engine_thread import EngineThread
from actors.tree import open_sessions
from api.foreign.hypercorn import Patience, patch
from api.http import make_app
from api.server import Server
from runtime import Settings
from runtime.durable import DirectoryStore, HistoryIdentity, SessionStore, SlabIdentity
from runtime.engine import EngineFacts
from runtime.metrics import Metrics
from tests.actors.engines import sample
from tests.agents.scripted import Line, ScriptedEngine, scripted_text

MODEL = "local-model"
Json = dict[str, Any]


@dataclass
class Exchange:
    """One request that wants an answer, and the events of that; `way` is HTTP or WebSocket."""

    way: str
    path: str
    asked: Json
    heard: list[Json] = field(default_factory=list)
    is_over: bool = False

    @property
    def is_prewarm(self) -> bool:
        return self.asked.get("generate") is False

    @property
    def said(self) -> list[Json]:
        """The items or messages that were sent."""
        said = self.asked.get("input", self.asked.get("messages"))
        return [{"content": said}] if isinstance(said, str) else list(said or ())

    @property
    def usage(self) -> Json | None:
        """The answer's usage in the dialect's own words; None where the answer broke off or told none."""
        for event in reversed(self.heard):
            found = event.get("usage") or (event.get("response") or {}).get("usage")
            if found and event.get("type") != "message_start":
                return dict(found)
        return None

    @property
    def read(self) -> Read:
        """What the answer says that it cost."""
        usage = self.usage
        assert usage is not None, f"an answer has no usage: {self.heard[-1:]}"
        told = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or usage
        output = usage["output_tokens" if "output_tokens" in usage else "completion_tokens"]
        return Read(
            told["reused"] + told["read"], told["reused"], output, told.get("broke_at"), told.get("reread_because")
        )


@dataclass(frozen=True)
class Read:
    """Tokens of a prompt, those of it that needed no reading, and those of the answer."""

    prompt: int
    reused: int
    output: int
    broke_at: str | None
    because: str | None

    @property
    def read(self) -> int:
        return self.prompt - self.reused

    @property
    def total(self) -> int:
        return self.prompt + self.output


class Recorder:
    """An ASGI application around ours, which passes everything on as it is and remembers questions and answers."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.exchanges: list[Exchange] = []
        self._has_news = trio.Event()

    async def until(self, condition: Callable[[list[Exchange]], bool]) -> None:
        """Returns once what was said so far meets the condition."""
        while not condition(self.exchanges):
            await self._has_news.wait()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await self._record_http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._record_socket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _record_http(self, scope: Any, receive: Any, send: Any) -> None:
        body, answer = bytearray(), bytearray()
        exchange = Exchange("HTTP", scope["path"], {})

        async def receive_and_note() -> Any:
            event = await receive()
            if event["type"] == "http.request":
                body.extend(event.get("body", b""))
                if not event.get("more_body"):
                    exchange.asked = json.loads(body)
                    self.exchanges.append(exchange)
            return event

        async def send_and_note(event: Any) -> None:
            if event["type"] == "http.response.body":
                answer.extend(event.get("body", b""))
                exchange.heard += _taken_events(answer)
                if not event.get("more_body") and answer.startswith(b"{"):
                    exchange.heard.append(json.loads(answer))
                exchange.is_over = not event.get("more_body")
                self._tell()
            await send(event)

        await self._app(scope, receive_and_note, send_and_note)

    async def _record_socket(self, scope: Any, receive: Any, send: Any) -> None:
        own: list[Exchange] = []

        async def receive_and_note() -> Any:
            event = await receive()
            if event["type"] == "websocket.receive":
                own.append(Exchange("WebSocket", scope["path"], json.loads(event.get("text") or event["bytes"])))
                self.exchanges.append(own[-1])
            return event

        async def send_and_note(event: Any) -> None:
            if event["type"] == "websocket.send":
                told = json.loads(event["text"])
                exchange = next(one for one in own if not one.is_over)
                exchange.heard.append(told)
                exchange.is_over = told["type"] in _LAST
                self._tell()
            await send(event)

        await self._app(scope, receive_and_note, send_and_note)

    def _tell(self) -> None:
        self._has_news.set()
        self._has_news = trio.Event()


_LAST = ("response.completed", "response.incomplete", "response.failed", "error")


def _taken_events(answer: bytearray) -> Iterator[Json]:
    """The server-sent events that have come whole, taken from the answer."""
    while (end := answer.find(b"\n\n")) >= 0:
        event, answer[: end + 2] = bytes(answer[:end]), b""
        data = event[event.find(b"data: ") + len(b"data: ") :]
        if data != b"[DONE]":
            yield json.loads(data)


@dataclass(frozen=True)
class House:
    """A server that serves at `url`."""

    url: str
    server: Server
    recorder: Recorder

    @property
    def address(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def rows(self) -> int:
        """Rows that the model has run, as the server's metrics count them."""
        return int(sample(self.server.metrics, "forward_rows_sum"))

    def answers(self) -> list[Exchange]:
        """The requests whose answers came to their end, in the order in which they were asked."""
        return [one for one in self.recorder.exchanges if one.usage and not one.is_prewarm]

    def report(self) -> str:
        """What each request cost, a line for each, for whoever runs these tests by hand."""
        lines = ["", "| way | path | asked | prompt | reused | read | answer | why |", "|" + " --- |" * 8]
        for one in self.recorder.exchanges:
            what = "prewarm" if one.is_prewarm else f"{len(one.said)} items"
            cells: list[object] = [one.way, one.path, what]
            if one.usage:
                read = one.read
                cells += [read.prompt, read.reused, read.read, read.output, read.broke_at or read.because or ""]
            else:
                cells += ["", "", "", "", "" if one.is_over else "broken off"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)

    async def spoken(self, count: int) -> None:
        """Returns once the answer asked for last has come to so many events and not to its end."""
        await self.recorder.until(lambda all_: bool(all_) and len(all_[-1].heard) > count and not all_[-1].is_over)


@asynccontextmanager
async def open_house(
    script: Sequence[Line], state: Path | None = None, bind: str = "127.0.0.1:0", **settings: Any
) -> AsyncIterator[House]:
    """A server with its HTTP door open, and a model that says what the script tells it. It keeps conversations in `state`."""
    text = scripted_text()
    engine = ScriptedEngine(script, text)
    chosen = Settings(model_label=MODEL, grpc_bind="127.0.0.1:0", **settings)

    @asynccontextmanager
    async def opening(_: Settings, metrics: Metrics) -> AsyncIterator[Runtime]:
        with EngineThread() as thread, ExitStack() as held:
            store = held.enter_context(_open_store(state, engine.facts)) if state else None
            async with open_sessions(chosen, engine, thread, text, metrics, store=store) as runtime:
                yield runtime

    server = Server(chosen, opening)
    recorder = Recorder(make_app(server))
    patch(Patience(chosen.reader_timeout_s, on_stop=lambda _: None))
    config = Config()
    config.bind = [bind]
    config.keep_alive_timeout = chosen.idle_connection_s
    serve: Callable[..., Awaitable[Any]] = hypercorn_serve
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        urls = await nursery.start(serve, recorder, config)
        house = House(urls[0], server, recorder)
        try:
            yield house
        finally:
            print(house.report())
            nursery.cancel_scope.cancel()


def _open_store(state: Path, facts: EngineFacts) -> AbstractContextManager[SessionStore]:
    slab, name = facts.slab, facts.backend
    of_slab = SlabIdentity(name, name, name, "none", "float64", "float64", slab.sink, slab.window, slab.slots)
    return DirectoryStore.open(str(state), HistoryIdentity(name, facts.vocabulary), of_slab)


def check_turns(answers: Sequence[Exchange]) -> None:
    """Each turn of a conversation cost the tokens that are new in it, and the last of the turn before, which had not run."""
    for before, after in pairwise(answers):
        new = after.read.prompt - before.read.total
        assert new > 0, "the conversation has become shorter"
        assert after.read.read <= new + 1, f"{after.read} goes on from {before.read}"


def check_rows(house: House) -> None:
    """The model ran as many rows as the answers say, none of which was broken off."""
    answers = [one.read for one in house.recorder.exchanges]
    assert house.rows == sum(one.read + one.output for one in answers)
