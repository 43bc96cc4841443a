"""Reads requests in processes of its own, which it kills when they take too long."""

from __future__ import annotations

import logging
import math
import os
import pickle
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from subprocess import DEVNULL, PIPE
from typing import Any, TypeVar

import outcome
import trio

from actors.nursery import open_nursery
from api.reading import LENGTH, Fault, Job, Nothing, Read, Task, Terms
from runtime.errors import DeadlineExceeded, InvalidRequest, NotServing, RequestError
from runtime.text import Text

# The time that reading may take: a fixed part, and a part for each MiB of the body, in seconds.
_LIMIT_S = 10.0
_LIMIT_S_PER_MIB = 5.0
# The time that a process may take to start, in seconds.
_START_S = 60.0
# A body of at most this size never waits behind a longer one, in bytes.
_SMALL_BYTES = 2**16

# Signals sent to all processes of a server are meant for the server; its calls, and the readers that they need, go on while
# it drains. The imports of tokenizers and of a dialect, which take longest, are done before there is anything to read.
_PROGRAM = """
import signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
import api.dialects.chat.request
from transformers import PreTrainedTokenizerFast
from api.reading import main
main()
"""

_log = logging.getLogger("perennial.api")


R = TypeVar("R")


class ReadingFailed(Exception):
    """A fault of ours kept a request from being read. The message names the place, and nothing of the request."""


class _NotStarted(Exception):
    """There is no process to read with. The message says why."""


@dataclass(eq=False)
class _Asked:
    """A task that waits, the size of what it reads, and its result."""

    task: Task[Any]
    size_bytes: int
    answer: outcome.Maybe[Any] | None = None
    is_answered: trio.Event = field(default_factory=trio.Event)

    @property
    def limit_s(self) -> float:
        return _LIMIT_S + _LIMIT_S_PER_MIB * self.size_bytes / 2**20

    def give(self, answer: outcome.Maybe[Any]) -> None:
        self.answer = answer
        self.is_answered.set()


class Reader:
    """Runs tasks in order, except that short ones may overtake longer ones."""

    def __init__(self, text: Text, terms: Terms, request_timeout_s: float, ahead: trio.Process | None) -> None:
        self._text = text
        self._terms = terms
        self._request_timeout_s = request_timeout_s
        self._ahead = ahead
        self._waiting: list[_Asked] = []
        # The first free desk is taken, so the second starts a process only for tasks that cannot wait for the first.
        self._desks = [_Desk(_SMALL_BYTES), _Desk(math.inf)]

    def begin(self, nursery: trio.Nursery) -> None:
        """Starts the desks in this nursery."""
        for desk in self._desks:
            nursery.start_soon(self._sit_at, desk)

    async def warm(self) -> None:
        """Returns once a process is there to read with, or the log says why there is none: then a request tries again."""
        asked = _Asked(Nothing(), 0)
        self._ask(asked)
        await asked.is_answered.wait()

    @property
    def waiting(self) -> int:
        """The number of tasks that no desk has taken."""
        return len(self._waiting)

    async def read(self, task: Task[R], size_bytes: int) -> R:
        """The result of a task that reads `size_bytes`. Raises what is wrong with them, or DeadlineExceeded.

        If the caller leaves early the process finishes the task within its time, so that others need not wait for a new
        process.
        """
        asked = _Asked(task, size_bytes)
        self._ask(asked)
        try:
            with trio.fail_after(self._request_timeout_s):
                await asked.is_answered.wait()
        except trio.TooSlowError:
            limit = self._request_timeout_s
            raise DeadlineExceeded(f"not read within {limit:g} s: ask for less, or raise request_timeout_s") from None
        finally:
            if asked in self._waiting:
                self._waiting.remove(asked)
        assert asked.answer is not None
        read: R = asked.answer.unwrap()
        return read

    def _ask(self, asked: _Asked) -> None:
        self._waiting.append(asked)
        self._assign()

    def _assign(self) -> None:
        """Gives each free desk the first task that it may take."""
        for desk in self._desks:
            found = next((asked for asked in self._waiting if asked.size_bytes <= desk.most_bytes), None)
            if desk.is_free and found is not None:
                self._waiting.remove(found)
                desk.give(found)

    async def _sit_at(self, desk: _Desk) -> None:
        while True:
            asked = await desk.next()
            ahead, self._ahead = self._ahead, None
            try:
                async with _reading_process(self._text, self._terms, ahead) as reading:
                    while True:
                        asked.give(await reading.read(asked))
                        self._next_at(desk)
                        if reading.is_broken:
                            break
                        asked = await desk.next()
            except _NotStarted as error:
                _log.error("no process to read a request with: %s", error)
                asked.give(
                    outcome.Error(NotServing("there is no room to read this request now: try again in a moment"))
                )
                self._next_at(desk)

    def _next_at(self, desk: _Desk) -> None:
        desk.is_free = True
        self._assign()


@asynccontextmanager
async def process_ahead() -> AsyncIterator[trio.Process | None]:
    """A process for a reader that is opened in the block, or None if the system has no room for one now.

    It loads its modules while the model is loaded.
    """
    try:
        process = await _start_process()
    except _NotStarted:
        yield None
        return
    async with _ended(process):
        yield process


@asynccontextmanager
async def open_reader(
    text: Text, terms: Terms, request_timeout_s: float, ahead: trio.Process | None = None
) -> AsyncIterator[Reader]:
    """A reader, whose first process is the one `ahead`; its processes have ended when the block has."""
    reader = Reader(text, terms, request_timeout_s, ahead)
    async with open_nursery() as nursery:
        reader.begin(nursery)
        yield reader
        nursery.cancel_scope.cancel()


class _Desk:
    """A place where one task runs at a time. It takes no task of more than `most_bytes`."""

    def __init__(self, most_bytes: float) -> None:
        self.most_bytes = most_bytes
        self.is_free = True
        self._give, self._given = trio.open_memory_channel[_Asked](1)

    def give(self, asked: _Asked) -> None:
        self.is_free = False
        self._give.send_nowait(asked)

    async def next(self) -> _Asked:
        return await self._given.receive()


class _Process:
    """A process that reads requests. It has been given a `Text` and `Terms`."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._received = bytearray()
        self.is_broken = False

    async def read(self, asked: _Asked) -> outcome.Maybe[Any]:
        """The result of the task. If the process took too long or ended, it is broken and will not be used again."""
        try:
            with trio.fail_after(asked.limit_s):
                answer = await self.exchange(Job(asked.task, math.ceil(asked.limit_s) + 1))
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError, EOFError) as error:
            self.is_broken = True
            reason = "it took too long" if isinstance(error, trio.TooSlowError) else "its process ended"
            _log.warning("request not read bytes=%d reason=%r", asked.size_bytes, reason)
            return outcome.Error(
                InvalidRequest("this request takes more time or memory to read than there is for it: send less")
            )
        match answer:
            case Read(value):
                return outcome.Value(value)
            case RequestError():
                return outcome.Error(answer)
            case Fault(words):
                return outcome.Error(ReadingFailed(words))
        raise TypeError(type(answer))

    async def exchange(self, value: object) -> object:
        data = pickle.dumps(value)
        await self._stdin.send_all(LENGTH.pack(len(data)))
        await self._stdin.send_all(data)
        (length,) = LENGTH.unpack(await self._exactly(LENGTH.size))
        return pickle.loads(await self._exactly(length))

    async def _exactly(self, count: int) -> bytes:
        while len(self._received) < count:
            more = await self._stdout.receive_some()
            if not more:
                raise EOFError
            self._received += more
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken


async def _start_process() -> trio.Process:
    """Starts a process. Raises _NotStarted if the system has no room for one."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        # One thread tokenises; the engine needs the other cores.
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        # Libraries may print parts of a prompt.
        return await trio.lowlevel.open_process(
            [sys.executable, "-c", _PROGRAM], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment
        )
    except OSError as error:
        raise _NotStarted(error.strerror) from None


@asynccontextmanager
async def _reading_process(text: Text, terms: Terms, ahead: trio.Process | None) -> AsyncIterator[_Process]:
    """A process that was given `text` and `terms`, `ahead` if it is there; it is killed when the block ends.

    Raises _NotStarted.
    """
    async with _ended(ahead or await _start_process()) as process:
        reading = _Process(process)
        try:
            with trio.fail_after(_START_S):
                await reading.exchange((text, terms))
        except trio.TooSlowError:
            raise _NotStarted(f"it did not start within {_START_S:g} s") from None
        except (trio.BrokenResourceError, EOFError):
            raise _NotStarted("it ended while it started") from None
        yield reading


@asynccontextmanager
async def _ended(process: trio.Process) -> AsyncIterator[trio.Process]:
    """The process is killed when the block ends."""
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()
            await process.wait()
