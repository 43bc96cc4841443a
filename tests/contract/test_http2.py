"""HTTP/2 over TLS, by Hypercorn's own options, under either worker class."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection
from typing import Any

import httpx
import pytest
from h2.connection import H2Connection
from h2.events import DataReceived

from runtime.models import SEEDLING
from tests.contract.loops import MOST_S
from tests.contract.servers import certificate_in, started

pytestmark = pytest.mark.door

TALK = {"model": SEEDLING, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}


@contextmanager
def secure(kind: str, tls: ssl.SSLContext, certificate: Path, key: Path, **settings: Any) -> Iterator[httpx.Client]:
    """A client that prefers HTTP/2, of a server that has loaded its model."""
    flags = ("--certfile", str(certificate), "--keyfile", str(key))
    with started(kind, *flags, is_awaited=False, **settings) as server:
        url = server.http.replace("http:", "https:")
        with httpx.Client(http2=True, verify=tls, base_url=url, timeout=MOST_S) as client:
            while client.get("/healthz").status_code == httpx.codes.SERVICE_UNAVAILABLE:
                pass
            yield client


class Connection:
    """One connection of HTTP/2 whose streams can be reset, which httpx has no way to do."""

    def __init__(self, socket: ssl.SSLSocket) -> None:
        self._socket = socket
        self._h2 = H2Connection()
        self._h2.initiate_connection()
        self._flush()

    def post(self, path: str, body: object) -> int:
        """The stream of a request that was sent."""
        stream = self._h2.get_next_available_stream_id()
        head = {":method": "POST", ":path": path, ":scheme": "https", ":authority": "127.0.0.1"}
        head["content-type"] = "application/json"
        self._h2.send_headers(stream, list(head.items()))
        self._h2.send_data(stream, json.dumps(body).encode(), end_stream=True)
        self._flush()
        return stream

    def receive_data(self, stream: int) -> None:
        """Returns once a part of the stream's body has come."""
        while True:
            data = self._socket.recv(65536)
            assert data, "the server has closed the connection"
            received = self._h2.receive_data(data)
            self._flush()
            if any(isinstance(event, DataReceived) and event.stream_id == stream for event in received):
                return

    def reset(self, stream: int) -> None:
        self._h2.reset_stream(stream)
        self._flush()

    def _flush(self) -> None:
        self._socket.sendall(self._h2.data_to_send())


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate_in(tmp_path_factory.mktemp("pems"))


@pytest.fixture
def tls(pems: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pems[0]))
    context.set_alpn_protocols(["h2"])
    return context


each_kind = pytest.mark.parametrize("kind", ["hypercorn-asyncio", "hypercorn-trio"])


@each_kind
def test_a_stream_that_is_reset_frees_its_permit_and_the_connection_goes_on(
    kind: str, pems: tuple[Path, Path], tls: ssl.SSLContext
) -> None:
    endless = TALK | {"stream": True, "max_tokens": 10**6, "ignore_eos": True}
    with secure(kind, tls, *pems, max_concurrent=1, http_overflow="evict", admission_policy="queue") as client:
        address = (client.base_url.host, client.base_url.port)
        with (
            create_connection(address, timeout=MOST_S) as tcp,
            tls.wrap_socket(tcp, server_hostname="127.0.0.1") as socket,
        ):
            connection = Connection(socket)
            for _ in range(5):
                # Each waits for the permit of the one before, which only its reset can give back.
                stream = connection.post("/v1/chat/completions", endless)
                connection.receive_data(stream)
                connection.reset(stream)
            answer = client.post("/v1/chat/completions", json=TALK)

    assert answer.status_code == 200


@each_kind
def test_answers_streams_and_errors_are_those_of_the_first_version(
    kind: str, pems: tuple[Path, Path], tls: ssl.SSLContext
) -> None:
    with secure(kind, tls, *pems) as client:
        whole = client.post("/v1/chat/completions", json=TALK)
        stream = client.post("/v1/chat/completions", json=TALK | {"stream": True})
        missing = client.get("/nowhere")

    assert {one.http_version for one in (whole, stream, missing)} == {"HTTP/2"}
    text = whole.json()["choices"][0]["message"]["content"]
    *events, done, nothing = stream.text.split("\n\n")
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for event in events]
    assert (done, nothing) == ("data: [DONE]", "")
    assert "".join(pieces) == text
    assert missing.status_code == 404
    assert all(one.headers["deprecation"] == "true" for one in (whole, stream, missing))
