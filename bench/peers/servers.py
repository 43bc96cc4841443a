"""Peers' OpenAI-compatible servers, and one turn with such a server: the whole history is sent again each time."""

from __future__ import annotations

import json
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import trio

from actors.nursery import open_nursery
from bench.peers.processes import PeerFailed, environment, last_words, made_gguf

LONGEST_START_S = 120
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ServerKind:
    """How a peer's server is started: `command(interpreter, model's directory, port, threads)`.

    One that `remembers` goes on from the conversation that it answered last; another reads each one whole.
    """

    label: str
    package: str
    command: Callable[[str, str, int, int], Awaitable[list[str]]]
    remembers: bool = True


async def _llama_cpp(interpreter: str, directory: str, port: int, threads: int) -> list[str]:
    dtype = json.loads((Path(directory) / "config.json").read_text())["dtype"]
    path = await made_gguf(interpreter, directory, "BF16" if dtype == "bfloat16" else "F32")
    # A context of 0 is the model's own. Its own default keeps the logits of every token of a prompt.
    flags = {"model": path, "n_ctx": 0, "logits_all": False, "n_threads": threads, "n_threads_batch": threads}
    flags |= {"host": HOST, "port": port}
    words = (word for name, value in flags.items() for word in (f"--{name}", str(value)))
    return [interpreter, "-m", "llama_cpp.server", *words]


async def _transformers(interpreter: str, directory: str, port: int, threads: int) -> list[str]:
    return [str(Path(interpreter).with_name("transformers")), "serve", directory, "--host", HOST, "--port", str(port)]


async def _mlx(interpreter: str, directory: str, port: int, threads: int) -> list[str]:
    return [interpreter, "-m", "mlx_lm", "server", "--model", directory, "--host", HOST, "--port", str(port)]


SERVERS = (
    ServerKind("llama_cpp.server", "llama-cpp-python", _llama_cpp),
    ServerKind("transformers serve", "transformers", _transformers, remembers=False),
    ServerKind("mlx_lm.server", "mlx-lm", _mlx),
)


class PeerServer:
    """A server that answers."""

    def __init__(self, url: str, model: str, process: psutil.Process) -> None:
        self._url = url
        self._model = model
        self._process = process

    @property
    def resident_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    async def answer(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        """The greedy answer to a conversation. Raises PeerFailed with what the server says instead."""
        body = {"model": self._model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        reply = await trio.to_thread.run_sync(_request, f"{self._url}/chat/completions", body, abandon_on_cancel=True)
        return str(reply["choices"][0]["message"]["content"] or "")


@asynccontextmanager
async def peer_server(kind: ServerKind, interpreter: str, directory: str, threads: int) -> AsyncIterator[PeerServer]:
    """A server of this kind with the model in `directory`, for the block. Raises PeerFailed where it does not start."""
    port = _free_port()
    command = await kind.command(interpreter, directory, port, threads)
    with tempfile.TemporaryFile() as log:
        async with open_nursery() as nursery:
            how = {"env": environment(), "stdout": log, "stderr": log, "check": False, "deliver_cancel": _kill}
            process = await nursery.start(partial(trio.run_process, command, **how))
            server = PeerServer(f"http://{HOST}:{port}/v1", directory, psutil.Process(process.pid))
            if not await _answers(server, process):
                log.seek(0)
                raise PeerFailed(last_words(log.read()))
            yield server
            nursery.cancel_scope.cancel()


async def _kill(process: trio.Process) -> None:
    """Some wait for their clients when they are told to end, and there is nothing to lose."""
    process.kill()


async def _answers(server: PeerServer, process: trio.Process) -> bool:
    """True once it does, with its model loaded; False when it has ended. Raises PeerFailed with what it says instead."""
    said = ""
    with trio.move_on_after(LONGEST_START_S):
        while process.returncode is None:
            try:
                await server.answer([{"role": "user", "content": "Hello"}], 1)
            except PeerFailed as error:
                said = str(error)
                await trio.sleep(0.1)
            else:
                return True
        return False
    raise PeerFailed(f"no answer within {LONGEST_START_S} s: {said}")


def _request(url: str, body: dict[str, Any]) -> Any:
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise PeerFailed(f"{error.code}: {said[:200]}") from None
    except (OSError, ValueError) as error:
        raise PeerFailed(str(error)) from None


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        return int(listening.getsockname()[1])
