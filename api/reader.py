"""Has requests read by processes of its own, which it ends when they take too long."""

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

# How long reading may take: so long whatever the body, and longer by so much for each MiB of it.
_LIMIT_S = 10.0
_LIMIT_S_PER_MIB = 5.0
# How long a process may take until it can read.
_START_S = 60.0
# A body up to so long never waits behind a longer one.
_SMALL_BYTES = 2**16

# A signal that all processes of a server get is for the server: its calls, and what they need, may go on for a while.
_PROGRAM = """
import signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
from api.reading import main
main()
"""

_log = logging.getLogger("perennial.api")


R = TypeVar("R")


class ReadingFailed(Exception):
    """A request could not be read, by a fault of ours. Says where and not of what."""


class _NotStarted(Exception):
    """There is no process to read with. Says why."""


@dataclass(eq=False)
class _Asked:
    """A task that waits, how long what it reads is, and what came of it."""

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
    """Does tasks in the order in which they come, small ones also past longer ones."""

    def __init__(self, text: Text, terms: Terms, request_timeout_s: float) -> None:
        self._text = text
        self._terms = terms
        self._request_timeout_s = request_timeout_s
        self._waiting: list[_Asked] = []
        # The first that is free is taken, so that the second starts a process only for what cannot wait for the first.
        self._desks = [_Desk(_SMALL_BYTES), _Desk(math.inf)]

    def begin(self, nursery: trio.Nursery) -> None:
        """Reads in this nursery, until it is cancelled."""
        for desk in self._desks:
            nursery.start_soon(self._sit_at, desk)

    def warm(self) -> None:
        """Starts a process before the first request needs it."""
        self._ask(_Asked(Nothing(), 0))

    @property
    def waiting(self) -> int:
        """Tasks that nobody does yet."""
        return len(self._waiting)

    async def read(self, task: Task[R], size_bytes: int) -> R:
        """What comes of a task, which reads so many bytes. Raises what is wrong with them, or DeadlineExceeded.

        Who leaves before the answer leaves a process that may go on for the time it has: others need not wait for another.
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
        """Gives to each desk that is free the first task that it takes."""
        for desk in self._desks:
            found = next((asked for asked in self._waiting if asked.size_bytes <= desk.most_bytes), None)
            if desk.is_free and found is not None:
                self._waiting.remove(found)
                desk.give(found)

    async def _sit_at(self, desk: _Desk) -> None:
        while True:
            asked = await desk.next()
            try:
                async with _started(self._text, self._terms) as reading:
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
async def open_reader(text: Text, terms: Terms, request_timeout_s: float) -> AsyncIterator[Reader]:
    """A reader for the block; its processes are gone when the block has ended."""
    reader = Reader(text, terms, request_timeout_s)
    async with open_nursery() as nursery:
        reader.begin(nursery)
        yield reader
        nursery.cancel_scope.cancel()


class _Desk:
    """A place where one task is done at a time, none over `most_bytes`."""

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
    """A process that reads, once it was given what it reads with."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._received = bytearray()
        self.is_broken = False

    async def read(self, asked: _Asked) -> outcome.Maybe[Any]:
        """What came of the task. The process is broken where it took too long, or ended."""
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


async def _opened() -> trio.Process:
    """A process that is to read. Raises _NotStarted where the system has no room for one."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        # One thread tokenises, and beside it the engine has every core.
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        # What libraries print may have some of a prompt in it.
        return await trio.lowlevel.open_process(
            [sys.executable, "-c", _PROGRAM], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment
        )
    except OSError as error:
        raise _NotStarted(error.strerror) from None


@asynccontextmanager
async def _started(text: Text, terms: Terms) -> AsyncIterator[_Process]:
    """A process with what it reads with, for the block; it is killed when the block ends. Raises _NotStarted."""
    process = await _opened()
    try:
        reading = _Process(process)
        try:
            with trio.fail_after(_START_S):
                await reading.exchange((text, terms))
        except trio.TooSlowError:
            raise _NotStarted(f"it did not start within {_START_S:g} s") from None
        except (trio.BrokenResourceError, EOFError):
            raise _NotStarted("it ended while it started") from None
        yield reading
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()
            await process.wait()
