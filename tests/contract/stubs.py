"""A stock grpcio client, made from the proto file alone."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.contract.loops import MOST_S

PROMPT = [3 + (11 * place) % 2000 for place in range(20)]
# Longer than any test lets a stream run.
ENDLESS = 100_000


@dataclass(frozen=True)
class Stubs:
    """The modules that protoc makes of the proto file."""

    messages: Any
    services: Any


def make_stubs(folder: Path) -> Stubs:
    source = Path(__file__).parents[2] / "proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}", f"--python_out={folder}"]
    subprocess.run([*command, f"--grpc_python_out={folder}", "kakeya/v1/runtime.proto"], check=True)
    sys.path.insert(0, str(folder))
    names = ("kakeya.v1.runtime_pb2", "kakeya.v1.runtime_pb2_grpc")
    return Stubs(*(importlib.import_module(name) for name in names))


class Stock:
    """The service through a stock client: methods by their names, requests by their fields."""

    def __init__(
        self, stubs: Stubs, channel: grpc.Channel, key: str = "", metadata: Iterable[tuple[str, str]] = ()
    ) -> None:
        self.channel = channel
        self.messages = stubs.messages
        self._stub = stubs.services.RuntimeServiceStub(channel)
        self._metadata = (*((("authorization", f"Bearer {key}"),) if key else ()), *metadata)

    def call(self, method: str, *, timeout: float = MOST_S, **fields: Any) -> Any:
        """The response, or the stream of responses."""
        return getattr(self._stub, method)(self._request(method, fields), timeout=timeout, metadata=self._metadata)

    def begin(self, method: str, **fields: Any) -> Any:
        """The future response of a call that has been sent."""
        request = self._request(method, fields)
        return getattr(self._stub, method).future(request, timeout=MOST_S, metadata=self._metadata)

    def _request(self, method: str, fields: dict[str, object]) -> Any:
        return getattr(self.messages, f"{method}Request")(**fields)

    def create(self, prompt: Iterable[int] = (), **fields: Any) -> str:
        """The id of a new session that holds `prompt`."""
        session_id: str = self.call("CreateSession", **fields).session_id
        if tokens := list(prompt):
            self.append(session_id, tokens)
        return session_id

    def append(self, session_id: str, token_ids: Iterable[int], **fields: Any) -> Any:
        return self.call("AppendTokens", session_id=session_id, token_ids=list(token_ids), **fields)

    def stream(self, session_id: str, max_tokens: int, **fields: Any) -> Any:
        return self.call("Generate", session_id=session_id, max_tokens=max_tokens, **fields)

    def generated(self, session_id: str, max_tokens: int, **fields: Any) -> list[int]:
        return tokens_of(list(self.stream(session_id, max_tokens, **fields)))

    def info(self, session_id: str) -> Any:
        return self.call("GetSessionInfo", session_id=session_id)

    def close(self, session_id: str) -> int:
        length: int = self.call("CloseSession", session_id=session_id).final_history_length
        return length


@contextmanager
def stock(stubs: Stubs, address: str, key: str = "", **options: Any) -> Iterator[Stock]:
    with grpc.insecure_channel(address, **options) as channel:
        yield Stock(stubs, channel, key)


@contextmanager
def refused(code: grpc.StatusCode) -> Iterator[list[str]]:
    """Expects the block's call to be refused with `code`; afterwards the list holds the words."""
    words: list[str] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield words
    assert caught.value.code() is code, caught.value
    words.append(caught.value.details())


def kinds_of(frames: Sequence[Any]) -> list[str]:
    return [frame.WhichOneof("payload") for frame in frames]


def tokens_of(frames: Sequence[Any]) -> list[int]:
    return [frame.token_id for frame in frames if frame.WhichOneof("payload") == "token_id"]


def digest_of(token_ids: Iterable[int]) -> bytes:
    little_endian = b"".join(token_id.to_bytes(4, "little") for token_id in array("I", token_ids))
    return hashlib.blake2b(little_endian).digest()
