"""Our client raises the errors that an embedded runtime would, whatever status each has on the wire."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from grpclib import GRPCError, Status

from actors import Runtime
from api.client import ClientSession, connect
from api.grpc import grpc_door
from api.server import Server
from runtime import Settings, errors
from runtime.errors import InvalidRequest, InvariantViolation, PerennialError, SessionFailed, SnapshotMismatch
from runtime.metrics import Metrics
from tests.actors.engines import LedgerEngine, open_lab
from tests.api.test_client_streams import heard

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PerennialError)]


class Failing:
    """A runtime none of whose sessions can be found, for one reason after the other."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.error: PerennialError = SessionFailed("unset")

    def find_session(self, _: str) -> Any:
        raise self.error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


@asynccontextmanager
async def failing() -> AsyncIterator[tuple[Failing, str]]:
    """A runtime and the address of a server that has it."""
    made: list[Failing] = []

    @asynccontextmanager
    async def opening(_: Settings, metrics: Metrics) -> AsyncIterator[Any]:
        async with open_lab(LedgerEngine(), metrics) as runtime:
            made.append(Failing(runtime))
            yield made[0]

    server = Server(Settings(grpc_bind="127.0.0.1:0"), opening, is_warmed=False)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(grpc_door, server)
        await nursery.start(server.run)
        yield made[0], address
        nursery.cancel_scope.cancel()


def made(kind: type[PerennialError]) -> PerennialError:
    return kind("words", "inv2") if issubclass(kind, InvariantViolation) else kind("words")


async def generates(session: ClientSession) -> None:
    async with session.generate(3) as events:
        await anext(events)


async def test_each_error_comes_out_of_the_client_as_it_went_into_the_wire() -> None:
    async with failing() as (runtime, address), connect(address) as client:
        session = client.find_session("one")
        for kind in KINDS:
            runtime.error = made(kind)
            for call in (session.info, partial(generates, session)):
                with pytest.raises(kind) as raised:
                    await call()
                assert type(raised.value) is kind
                assert str(raised.value) == "words"
                assert vars(raised.value) == vars(runtime.error)


@pytest.mark.parametrize("param", ["token_ids", None, "naïve", "two words", "a\nb"])
async def test_an_invalid_request_names_its_field_where_metadata_can(param: str | None) -> None:
    async with failing() as (runtime, address), connect(address) as client:
        runtime.error = InvalidRequest("words", param)
        with pytest.raises(InvalidRequest) as raised:
            await client.find_session("one").info()

    assert raised.value.param == (param if param in ("token_ids", "two words") else None)


@pytest.mark.parametrize("named", [None, "NoSuchError", "ClassVar", "contextmanager", "__name__"])
def test_a_server_that_names_no_error_that_we_know_is_understood_by_its_status(named: str | None) -> None:
    _, raised = asyncio.run(heard(GRPCError(Status.FAILED_PRECONDITION, "words"), named))

    assert type(raised) is SnapshotMismatch
    assert str(raised) == "words"
