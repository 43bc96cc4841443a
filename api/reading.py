"""Reads requests in a process that can be killed, for a client or a chat template can make reading take for ever.

The process receives the model's `Text` and `Terms`, then tasks, and answers each with its result or an error. Both pipes
carry pickles, each preceded by its length. Nothing here imports an engine's libraries.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

from runtime import script
from runtime.errors import InvalidRequest, RequestError
from runtime.items import Item
from runtime.script import Head, Written
from runtime.text import Text

LENGTH = struct.Struct("!Q")
"""What stands before each pickle."""

# The most memory that reading a request may take. The bound is for templates that multiply text, not for long prompts.
_MOST_MEMORY_BYTES = 2 * 2**30

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Terms:
    """What requests are checked against: the model's label, and the most tokens that any prompt may have."""

    label: str
    most_tokens: int


class Task(Protocol[R_co]):
    """Something to read. It is a value that is pickled for the process."""

    def run(self, text: Text, terms: Terms) -> R_co:
        """The result. Raises RequestError."""
        ...


class Parse(Protocol[R_co]):
    """A module's function that makes a question from a body."""

    def __call__(self, body: bytes, text: Text, terms: Terms, /) -> R_co: ...


@dataclass(frozen=True, slots=True)
class ReadBody(Generic[R]):
    """The body of a request, in the dialect that `parse` reads."""

    parse: Parse[R]
    body: bytes

    def run(self, text: Text, terms: Terms) -> R:
        return self.parse(self.body, text, terms)


@dataclass(frozen=True, slots=True)
class Write:
    """Items to write as tokens for the model, after those in `before`, which it has read, or from the beginning."""

    head: Head
    before: tuple[Item, ...]
    new: tuple[Item, ...]
    options: Mapping[str, Any]
    is_after_eos: bool = False
    is_open_turn: bool = False

    def run(self, text: Text, terms: Terms) -> Written | None:
        """The tokens; None if the template would write the items before differently now."""
        if self.is_open_turn:
            return script.write_open_turn(text, self.head, self.new, self.options)
        if not self.before:
            return script.write(text, self.head, self.new, self.options)
        return script.write_on(text, self.head, self.before, self.new, self.options, is_after_eos=self.is_after_eos)


@dataclass(frozen=True, slots=True)
class Nothing:
    """An empty task, which makes a process start before the first real one."""

    def run(self, text: Text, terms: Terms) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Job:
    """A task, and the seconds after which its process must have ended, even if nobody waits for it."""

    task: Task[Any]
    limit_s: int


@dataclass(frozen=True, slots=True)
class Read(Generic[R]):
    """The result of a task."""

    value: R


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of ours: its type and where it was raised, for the log, without anything that was read."""

    words: str


def main() -> None:
    """Answers jobs until the pipe is closed."""
    # An interrupt from the terminal is meant for the server, which closes the pipe when it stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY_BYTES, _MOST_MEMORY_BYTES))
    jobs = sys.stdin.buffer
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    text, terms = _receive(jobs)
    _send(answers, None)
    while True:
        job = _receive(jobs)
        # The alarm ends this process even if the interpreter is stuck or the server is gone.
        signal.alarm(job.limit_s)
        answer = _answer(job, text, terms)
        signal.alarm(0)
        _send(answers, answer)


def _answer(job: Job, text: Text, terms: Terms) -> Read[Any] | RequestError | Fault:
    try:
        return Read(job.task.run(text, terms))
    except RequestError as error:
        return error
    except MemoryError:
        return InvalidRequest("this request takes more memory to read than there is for it: send less")
    except Exception as error:
        # The error's message may contain parts of the prompt.
        places = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-8:]]
        return Fault(f"{type(error).__name__} in {' > '.join(places)}")


def _receive(source: BinaryIO) -> Any:
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        sys.exit()
    return pickle.loads(source.read(*LENGTH.unpack(head)))


def _send(target: BinaryIO, value: object) -> None:
    data = pickle.dumps(value)
    target.write(LENGTH.pack(len(data)))
    target.write(data)
    target.flush()


if __name__ == "__main__":
    main()
