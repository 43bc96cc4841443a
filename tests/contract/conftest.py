"""Servers that many tests share: each takes seconds to start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.models import SEEDLING, find_model
from runtime.text import Text
from tests.contract.openai_clients import CLIENTS, Client
from tests.contract.servers import KINDS, LONGEST_LINE, ServerProcess, complaints, hangups, started
from tests.contract.stubs import Stubs, make_stubs

KEYS = ("first-key", "second-key")
LABEL = "a label"
# How long a besieged server waits for a client that asks for nothing, and for one that does not read, in seconds.
IDLE_S, UNREAD_S = 3, 8
# Tokens that a session on the keyed server can see, 4 of them sinks.
VISIBLE = 256


@pytest.fixture(scope="session", autouse=True)
def usual_hangups() -> Iterator[None]:
    """Servers are told to stop by SIGHUP too, although the tests may run under `nohup`."""
    with hangups(signal.SIG_DFL):
        yield


@pytest.fixture(scope="session")
def plain() -> Iterator[ServerProcess]:
    """`perennial serve` without any setting."""
    with started("perennial") as server:
        yield server


@pytest.fixture(scope="session")
def hypercorn_asyncio() -> Iterator[ServerProcess]:
    with started("hypercorn-asyncio") as server:
        yield server


@pytest.fixture(scope="session")
def hypercorn_trio() -> Iterator[ServerProcess]:
    with started("hypercorn-trio") as server:
        yield server


_OF_KIND = dict(zip(KINDS, ("plain", "hypercorn_asyncio", "hypercorn_trio"), strict=True))


@pytest.fixture(scope="session", params=KINDS)
def server(request: pytest.FixtureRequest) -> ServerProcess:
    """A server of each kind, as it is without any setting."""
    found: ServerProcess = request.getfixturevalue(_OF_KIND[request.param])
    return found


@pytest.fixture(scope="session", params=KINDS)
def besieged(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server of each kind that is short of everything, patience included. Whatever it goes through, it ends well."""
    flags = () if request.param == "perennial" else ("--keep-alive", str(IDLE_S))
    patience: dict[str, Any] = {"reader_timeout_s": UNREAD_S, "idle_connection_s": IDLE_S}
    with started(request.param, *flags, capacity=2, max_concurrent=1, http_overflow="evict", **patience) as server:
        yield server
        assert server.stop() == 0
    assert complaints("".join(server.said)) == []
    assert max(map(len, server.said)) <= LONGEST_LINE


# Each kind of server and each form of OpenAI's client, though not each pair of them.
@pytest.fixture(
    scope="module",
    params=[("perennial", "sync"), ("hypercorn-asyncio", "async"), ("hypercorn-trio", "sync")],
    ids="-".join,
)
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    kind, form = request.param
    with CLIENTS[form](request.getfixturevalue(_OF_KIND[kind])) as client:
        yield client


@pytest.fixture(scope="session")
def keyed() -> Iterator[ServerProcess]:
    """A server with keys, a label and a short window, which takes one completion at a time and evicts what is too long."""
    settings: dict[str, Any] = {"sink": 4, "window": VISIBLE - 4, "http_overflow": "evict", "max_concurrent": 1}
    with started("perennial", api_keys=",".join(KEYS), model_label=LABEL, **settings) as server:
        yield server


@pytest.fixture(scope="session")
def hurried() -> Iterator[ServerProcess]:
    """A server that gives a completion six seconds, and one that waits for another a quarter of one."""
    settings: dict[str, Any] = {
        "admission_policy": "queue",
        "queue_max_wait_s": 0.25,
        "max_concurrent": 1,
        "http_overflow": "evict",
    }
    with started("hypercorn-trio", request_timeout_s=6, **settings) as server:
        yield server


@pytest.fixture(scope="session")
def text() -> Text:
    """The tokenizer of the model that the servers run."""
    return Text.load(find_model(SEEDLING))


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Stubs:
    """A stock gRPC client's modules."""
    return make_stubs(tmp_path_factory.mktemp("stubs"))
