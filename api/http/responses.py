"""`/v1/responses`: OpenAI's Responses over HTTP and over a WebSocket, on conversations that the server holds."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

import trio
from pydantic import BaseModel
from quart import Response, request, websocket
from werkzeug.datastructures import Headers

from actors import Runtime
from actors.nursery import open_nursery
from api.affinity import ROUTE_HEADER, is_route
from api.answer import Part
from api.answering import Answers, Ending, Usage, most_prompt_tokens, open_answers
from api.dialects.responses.events import Event, ResponseWriter, as_responses_error, error_event
from api.dialects.responses.request import Frame, ResponseRequest, lane_in, read, read_frame
from api.event_stream import EventStream, named_event
from api.http.connection import MOST_BODY_BYTES, held_by, read_question
from api.http.routes import ANSWER_ERRORS, EVENTS, JSON, Door, EventKinds, Family, Operation
from api.prompting import Prompt, write_prompt
from api.question import Question
from api.reading import ReadBody
from api.server import Server
from api.traces import describe_request
from api.uploads import UploadRoom, too_much_at_once
from runtime.errors import (
    NotServing,
    PayloadTooLarge,
    PreviousResponseNotFound,
    RequestError,
    ResponseNotFound,
    UpgradeRequired,
)
from runtime.points import Point

RESPONSES = Family("/v1/responses", is_deprecated=False, as_error=as_responses_error)
# The most requests of one WebSocket that run or wait; no more are read until one ends.
_MOST_REQUESTS = 16


class ResponseObject(BaseModel):
    """OpenAI's response object."""

    id: str
    object: str
    status: str
    output: list[dict[str, Any]]


class Deleted(BaseModel):
    id: str
    object: str = "response"
    deleted: bool = True


class ResponseEvent(BaseModel):
    """One of OpenAI's events of a response, told apart by `type`."""

    type: str
    sequence_number: int


_CREATE = Operation(
    "Answers input, or what follows an earlier response, as JSON or, with `stream`, as server-sent events. The same path "
    "takes a WebSocket: `response.create` frames in, events out.",
    {200: {JSON: ResponseObject, EVENTS: EventKinds((ResponseEvent,))}},
    (*ANSWER_ERRORS, PreviousResponseNotFound),
    ResponseRequest,
)
_UPGRADE = Operation("Takes WebSockets, and refuses whoever does not ask for one.", {}, (UpgradeRequired,))
_FIND = Operation("A stored response.", {200: {JSON: ResponseObject}}, (NotServing, ResponseNotFound))
_DELETE = Operation("Forgets a stored response.", {200: {JSON: Deleted}}, (NotServing, ResponseNotFound))


def add_response_routes(door: Door) -> None:
    server = door.server

    @door.route("POST", RESPONSES.base, _CREATE, RESPONSES)
    async def create_response() -> Response:
        held = held_by(request)
        runtime = held.enter_context(server.call())
        describe_request({"gen_ai.request.model": server.label})
        asked, question = await read_question(server, read)
        turn = await held.enter_async_context(_open_turn(server, runtime, asked, question, _caller(request.headers)))
        if not asked.stream:
            while not turn.is_over:
                await turn.next()
            return Response(json.dumps(turn.response), content_type=JSON)
        response = Response(content_type=f"{EVENTS}; charset=utf-8", headers={"Cache-Control": "no-cache"})
        response.response = _TurnEvents(turn, _server_sent_event)
        return response

    @door.route("GET", RESPONSES.base, _UPGRADE, RESPONSES)
    async def upgrade() -> Response:
        raise UpgradeRequired("responses come by POST, or over a WebSocket: ask for an upgrade to one")

    @door.route("GET", f"{RESPONSES.base}/<response_id>", _FIND, RESPONSES)
    async def find_response(response_id: str) -> Response:
        with server.call() as runtime:
            record = runtime.conversations.points.record(response_id)
            if not record:
                raise ResponseNotFound("no response of this id is stored")
            return Response(record, content_type=JSON)

    @door.route("DELETE", f"{RESPONSES.base}/<response_id>", _DELETE, RESPONSES)
    async def delete_response(response_id: str) -> Response:
        with server.call() as runtime:
            if not runtime.conversations.points.record(response_id):
                raise ResponseNotFound("no response of this id is stored")
            runtime.conversations.points.forget(response_id)
            return Response(Deleted(id=response_id).model_dump_json(), content_type=JSON)

    @door.app.websocket(RESPONSES.base)
    async def respond_over_websocket() -> None:
        await websocket.accept()
        await _Socket(server, door.uploads).serve()


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who asks, as far as keys tell, and the route by which a proxy sent the request here; empty where none did."""

    owner: str
    route: str


class _Turn:
    """One response: its events in order. It is stored when its last event is made."""

    def __init__(
        self, server: Server, runtime: Runtime, asked: ResponseRequest, caller: _Caller, answers: Answers | Ending
    ) -> None:
        """`answers` is only an Ending if the request asked for no answer."""
        self._runtime = runtime
        self._asked = asked
        self._caller = caller
        self._answers = answers
        self._writer = ResponseWriter(asked, server.label, caller.route)
        self._is_begun = False
        self.is_over = False

    @property
    def response(self) -> dict[str, Any]:
        """The response so far."""
        return self._writer.response

    async def next(self) -> list[Event]:
        """Waits for the next events. Raises what ended the answer."""
        if not self._is_begun:
            self._is_begun = True
            return self._writer.begin()
        part = self._answers if isinstance(self._answers, Ending) else await self._next_part(self._answers)
        if not isinstance(part, Ending):
            return [*self._writer.take(part)]
        events = self._writer.end(part)
        self._keep(part.point)
        return events

    async def _next_part(self, answers: Answers) -> Part | Ending:
        said = await answers.next()
        assert said is not None
        return said[1]

    def progress(self) -> Event:
        return self._writer.progress()

    def fail(self, error: Exception) -> list[Event]:
        self.is_over = True
        return self._writer.fail(error)

    def _keep(self, point: Point) -> None:
        self.is_over = True
        points, asked = self._runtime.conversations.points, self._asked
        points.name(self._writer.id, point, json.dumps(self.response).encode() if asked.store is not False else b"")
        if asked.conversation_id is not None:
            points.name(_name_of(asked.conversation_id, self._caller.owner), point)


@asynccontextmanager
async def _open_turn(
    server: Server, runtime: Runtime, asked: ResponseRequest, question: Question, caller: _Caller
) -> AsyncIterator[_Turn]:
    """The turn that answers one client's request. Raises PreviousResponseNotFound, and as `open_answers`."""
    start = _start_of(runtime, asked, caller.owner)
    if asked.is_prewarm:
        prompt = await write_prompt(server.reader, runtime, question, start, most_prompt_tokens(runtime, question))
        yield _Turn(server, runtime, asked, caller, _ending_without_answer(runtime, prompt))
        return
    async with open_answers(server, runtime, question, start) as answers:
        yield _Turn(server, runtime, asked, caller, answers)


def _start_of(runtime: Runtime, asked: ResponseRequest, owner: str) -> Point | None:
    points = runtime.conversations.points
    if asked.conversation_id is not None:
        return points.named(_name_of(asked.conversation_id, owner))
    if asked.previous_response_id is None:
        return None
    start = points.named(asked.previous_response_id)
    if start is None:
        raise PreviousResponseNotFound(
            "no response of this id is held: send the whole conversation", "previous_response_id"
        )
    return start


def _name_of(conversation_id: str, owner: str) -> str:
    """The name of a conversation's last point. It has the owner in it, for clients choose ids and two may choose the same."""
    return f"conversation {owner} {conversation_id}"


def _caller(headers: Headers) -> _Caller:
    key = headers.get("Authorization") or headers.get("x-api-key") or ""
    route = headers.get(ROUTE_HEADER, "")
    return _Caller(blake2b(key.encode(), digest_size=16).hexdigest(), route if is_route(route) else "")


def _ending_without_answer(runtime: Runtime, prompt: Prompt) -> Ending:
    length = prompt.point.length
    usage = Usage(
        prompt=length,
        completion=0,
        reasoning=0,
        reused=runtime.conversations.held(prompt.point),
        evicted=max(0, length - runtime.shape.visible),
        broke_at=prompt.broke_at,
        because=prompt.because,
    )
    return Ending("stop", usage, prompt.point)


async def _read_ahead(runtime: Runtime, point: Point) -> None:
    try:
        async with runtime.permit():
            await runtime.conversations.read_ahead(point)
    except RequestError:
        pass  # The turn that continues from there will read it.


class _TurnEvents(EventStream):
    """The events of a turn, each encoded by `spell`."""

    def __init__(self, turn: _Turn, spell: Callable[[Event], bytes]) -> None:
        super().__init__()
        self._turn = turn
        self._spell = spell

    async def next_events(self) -> list[bytes]:
        events = [self._spell(event) for event in await self._turn.next()]
        if self._turn.is_over:
            self.close()
        return events

    def silence(self) -> list[bytes]:
        return [self._spell(self._turn.progress())]

    def failure(self, error: Exception) -> list[bytes]:
        return [self._spell(event) for event in self._turn.fail(error)]


def _server_sent_event(event: Event) -> bytes:
    return named_event(event["type"], json.dumps(event))


def _as_frame(event: Event) -> bytes:
    return json.dumps(event).encode()


class _Waiting(NamedTuple):
    """A frame that has been read, and what it holds of the room for uploads until its answer begins."""

    frame: Frame
    held: ExitStack


class _Socket:
    """One WebSocket: a lane for each `stream_id` with requests; those of a lane are answered one after the other."""

    def __init__(self, server: Server, uploads: UploadRoom) -> None:
        self._server = server
        self._uploads = uploads
        self._caller = _caller(websocket.headers)
        self._lanes: dict[str | None, deque[_Waiting]] = {}
        self._room = trio.Semaphore(_MOST_REQUESTS, max_value=_MOST_REQUESTS)
        self._sending = trio.Lock()

    async def serve(self) -> None:
        """Answers requests until the client leaves, or has been silent and idle for `idle_connection_s`."""
        try:
            async with open_nursery() as nursery:
                while True:
                    await self._room.acquire()
                    received = await self._next()
                    if received is None:
                        break
                    stream_id = received.frame.stream_id
                    if stream_id in self._lanes:
                        self._lanes[stream_id].append(received)
                    else:
                        self._lanes[stream_id] = deque([received])
                        nursery.start_soon(self._run_lane, stream_id)
                nursery.cancel_scope.cancel()
        finally:
            for waiting in chain(*self._lanes.values()):
                waiting.held.close()
        await websocket.close(1000)

    async def _next(self) -> _Waiting | None:
        """The next frame, read; None if none has come for `idle_connection_s`."""
        while True:
            received: str | bytes | None = None
            with trio.move_on_after(self._server.settings.idle_connection_s):
                received = await websocket.receive()
            if received is not None:
                return await self._read(received if isinstance(received, bytes) else received.encode())
            if self._room.value == _MOST_REQUESTS - 1:
                return None

    async def _read(self, body: bytes) -> _Waiting:
        server = self._server
        try:
            if len(body) > MOST_BODY_BYTES:
                raise PayloadTooLarge(f"the frame is over {MOST_BODY_BYTES} bytes: send less")
            with ExitStack() as held:
                if not self._uploads.take(len(body)):
                    raise too_much_at_once()
                held.callback(self._uploads.give_back, len(body))
                with server.call(), server.may_be_ended():
                    frame = await server.reader.read(ReadBody(read_frame, body), len(body))
                return _Waiting(frame, held.pop_all())
        except Exception as error:
            return _Waiting(Frame(lane_in(body), error), ExitStack())

    async def _run_lane(self, stream_id: str | None) -> None:
        waiting = self._lanes[stream_id]
        while waiting:
            frame, held = waiting.popleft()
            held.close()
            try:
                await self._answer(frame)
            except Exception as error:
                await self._send(_as_frame(error_event(error, frame.stream_id)))
            finally:
                self._room.release()
        del self._lanes[stream_id]

    async def _answer(self, frame: Frame) -> None:
        if isinstance(frame.read, Exception):
            raise frame.read
        asked, question = frame.read
        async with AsyncExitStack() as held:
            runtime = held.enter_context(self._server.call())
            turn = await held.enter_async_context(_open_turn(self._server, runtime, asked, question, self._caller))
            async for event in _TurnEvents(turn, _as_frame):
                await self._send(event)
            if asked.is_prewarm and (point := runtime.conversations.points.named(turn.response["id"])) is not None:
                with self._server.may_be_ended():
                    await _read_ahead(runtime, point)

    async def _send(self, event: bytes) -> None:
        async with self._sending:
            await websocket.send(event.decode())
