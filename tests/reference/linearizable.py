"""Whether what several clients saw of one history could have happened one call after the other (Wing and Gong's search)."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Appended:
    """An append to a history of `expected` tokens; `answer` is the history's digest afterwards, or None if nobody heard it."""

    expected: int
    tokens: tuple[int, ...]
    answer: bytes | None


@dataclass(frozen=True)
class Refused:
    """An append that was refused because the history had `length` tokens."""

    expected: int
    length: int


@dataclass(frozen=True)
class Seen:
    """A look at the history."""

    digest: bytes


@dataclass(frozen=True)
class Call:
    """What was asked and answered, from `began` to `ended` in the order of events; one that nobody heard of may end any time."""

    began: float
    ended: float
    what: Appended | Refused | Seen


def is_linearizable(calls: Sequence[Call]) -> bool:
    """Whether there is an order of these calls, in which none that had ended comes behind one that began later, and that
    gives each the answer that it got. Of calls whose answer nobody heard, any may never have happened.
    """
    seen: set[tuple[frozenset[int], tuple[int, ...]]] = set()

    def search(left: frozenset[int], history: tuple[int, ...]) -> bool:
        if all(_is_unheard(calls[index]) for index in left):
            return True
        if (left, history) in seen:
            return False
        seen.add((left, history))
        earliest = min((calls[index].ended for index in left), default=math.inf)
        for index in left:
            if calls[index].began > earliest:
                continue
            after = _after(calls[index].what, history)
            if after is not None and search(left - {index}, after):
                return True
        return False

    return search(frozenset(range(len(calls))), ())


def _is_unheard(call: Call) -> bool:
    return isinstance(call.what, Appended) and call.what.answer is None


def _after(what: Appended | Refused | Seen, history: tuple[int, ...]) -> tuple[int, ...] | None:
    """The history behind such a call, or None where it cannot have been answered so."""
    match what:
        case Appended(expected, tokens, answer):
            after = history + tokens
            return after if len(history) == expected and answer in (None, digest_of(after)) else None
        case Refused(expected, length):
            return history if len(history) == length != expected else None
        case Seen(digest):
            return history if digest_of(history) == digest else None


@cache
def digest_of(history: tuple[int, ...]) -> bytes:
    """BLAKE2b over a history as little-endian uint32."""
    return hashlib.blake2b(struct.pack(f"<{len(history)}I", *history)).digest()
