"""A WebSocket on `/v1/responses` while a frame is being read: it is answered, whatever becomes of the reading."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from actors import Runtime
from api.http import http_door
from api.reader import Reader, ReadingFailed
from api.reading import ReadBody
from api.server import Server
from runtime import Settings
from runtime.metrics import Metrics
from runtime.settings import split_address
from tests.actors.engines import LedgerEngine, open_lab
from tests.api.agents import Lane, open_lane

ASKED = {"type": "response.create", "model": "seedling", "input": "hello", "max_output_tokens": 2}


class Desk:
    """Reads when it may, or fails."""

    def __init__(self) -> None:
        self.reader: Reader | None = None
        self.begun = trio.Event()
        self.may_read = trio.Event()
        self.failing = False

    async def read(self, task: ReadBody[Any], size_bytes: int) -> Any:
        if self.failing:
            raise ReadingFailed("KeyError at somewhere.py:5")
        self.begun.set()
        await self.may_read.wait()
        assert self.reader is not None
        return await self.reader.read(task, size_bytes)


class DeskServer(Server):
    """A server that reads at a desk of the test's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.desk = Desk()

    @property
    def reader(self) -> Any:
        self.desk.reader = super().reader
        return self.desk


@asynccontextmanager
async def open_socket() -> AsyncIterator[tuple[Desk, Lane]]:
    @asynccontextmanager
    async def opening(_: Settings, metrics: Metrics) -> AsyncIterator[Runtime]:
        async with open_lab(LedgerEngine(), metrics) as runtime:
            yield runtime

    server = DeskServer(Settings(), opening, is_warmed=False)
    async with trio.open_nursery() as nursery:
        http = (await nursery.start(http_door, server, "127.0.0.1:0")).removeprefix("http://")
        await nursery.start(server.run)
        async with open_lane(split_address(http)) as lane:
            yield server.desk, lane
        nursery.cancel_scope.cancel()


async def last_word(lane: Lane) -> dict[str, Any]:
    while (event := await lane.receive())["type"] not in ("response.completed", "response.incomplete", "error"):
        pass
    return event


async def test_a_frame_that_is_being_read_when_the_socket_has_been_silent_for_long_is_answered(
    mock_clock: MockClock,
) -> None:
    async with open_socket() as (desk, lane):
        await lane.send(ASKED)
        await desk.begun.wait()
        mock_clock.jump(Settings().idle_connection_s + 1)
        desk.may_read.set()

        assert (await last_word(lane))["type"] != "error"


async def test_a_frame_that_cannot_be_read_by_a_fault_of_ours_is_told_so_and_the_socket_goes_on() -> None:
    async with open_socket() as (desk, lane):
        desk.may_read.set()
        desk.failing = True
        await lane.send(ASKED)
        told = await last_word(lane)
        desk.failing = False
        await lane.send(ASKED)

        assert (told["type"], told["status"], told["error"]["type"]) == ("error", 500, "server_error")
        assert (await last_word(lane))["type"] != "error"


async def test_a_frame_that_is_not_read_is_told_so_on_its_lane() -> None:
    async with open_socket() as (desk, lane):
        desk.failing = True
        for stream_id in ("one", 'two "quoted"'):
            await lane.send(ASKED | {"input": '"stream_id": "none"', "stream_id": stream_id})

            assert (await last_word(lane))["stream_id"] == stream_id


@pytest.mark.parametrize("spelled", [r"\q", r"\ud800"])
async def test_a_frame_that_is_not_read_may_spell_its_lane_amiss(spelled: str) -> None:
    async with open_socket() as (desk, lane):
        desk.failing = True
        await lane.send_text(f'{{"stream_id": "{spelled}"}}')
        told = await last_word(lane)
        await lane.send(ASKED)

        assert "stream_id" not in told
        assert (await last_word(lane))["type"] == "error"
