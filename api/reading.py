"""Reads requests, in a process that can be ended: what a client or a chat template makes of them may take for ever.

The process is given the model's `Text` and its `Terms`, then bodies, and answers each with a `Reading` or with an error. On
both pipes go pickles, each after its length. Nothing here imports an engine's libraries.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import struct
import sys
import traceback
from array import array
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from api.bounds import Bounds
from api.request import CompletionRequest
from runtime.errors import InvalidRequest, ModelNotFound, RequestError, SlabOverflow
from runtime.text import Text

LENGTH = struct.Struct("!Q")
"""What stands before each pickle."""

# The most that reading a request may take of memory. It stands for a template that multiplies text, not for long prompts.
_MOST_MEMORY_BYTES = 2 * 2**30
# A message that is empty is some tokens long in any template that a model was made with; one may leave a few out.
_MESSAGES_BESIDE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Terms:
    """What requests are measured by: the model's label, and the most tokens that a prompt may ever have."""

    label: str
    most_tokens: int


@dataclass(frozen=True, slots=True)
class Job:
    """One body, and the seconds after which its process is to be gone, whoever has forgotten it."""

    body: bytes
    limit_s: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What a body comes to. Of `asked` and `bounds`, what the prompt and the grammar were made of is left out."""

    asked: CompletionRequest
    bounds: Bounds
    prompt: array[int]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of ours: its kind and where it was raised, for the log, and nothing of what was read."""

    words: str


def read(body: bytes, text: Text, terms: Terms) -> Reading:
    """Raises InvalidRequest, ModelNotFound or SlabOverflow."""
    asked = CompletionRequest.parse(body)
    if asked.model != terms.label:
        raise ModelNotFound(f"no model {asked.model!r} here: GET /v1/models names the one there is", "model")
    _check_length(asked, text, terms)
    bounds = Bounds.of(asked, text)
    prompt = text.render([message.for_template() for message in asked.messages], bounds.tools)
    rest = asked.model_copy(update={"messages": [], "tools": None, "response_format": None})
    return Reading(rest, replace(bounds, tools=()), array("I", prompt))


def _check_length(asked: CompletionRequest, text: Text, terms: Terms) -> None:
    """Refuses what cannot come to few enough tokens, before anything is done with each of its characters."""
    characters = sum(message.length for message in asked.messages)
    if characters > terms.most_tokens * text.longest_spelling:
        raise SlabOverflow(
            f"the messages have {characters} characters, and the most tokens here are {terms.most_tokens}"
        )
    if len(asked.messages) > terms.most_tokens + _MESSAGES_BESIDE_TOKENS:
        raise SlabOverflow(
            f"there are {len(asked.messages)} messages, and the most tokens here are {terms.most_tokens}"
        )


def main() -> None:
    """Answers jobs until the other side is gone."""
    # An interrupt from the terminal is for the server, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY_BYTES, _MOST_MEMORY_BYTES))
    jobs = sys.stdin.buffer
    # What a library prints must not pass for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    text, terms = _received(jobs)
    _send(answers, None)
    while True:
        job = _received(jobs)
        # Ends this process from outside of the interpreter, also where whoever asked is no more.
        signal.alarm(job.limit_s)
        answer = _answer(job, text, terms)
        signal.alarm(0)
        _send(answers, answer)


def _answer(job: Job, text: Text, terms: Terms) -> Reading | RequestError | Fault:
    try:
        return read(job.body, text, terms)
    except RequestError as error:
        return error
    except MemoryError:
        return InvalidRequest("this request takes more memory to read than there is for it: send less")
    except Exception as error:
        # Its message may have some of the prompt in it.
        places = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-8:]]
        return Fault(f"{type(error).__name__} in {' > '.join(places)}")


def _received(source: BinaryIO) -> Any:
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
