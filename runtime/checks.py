"""Checks of arguments. An embedding program may pass anything, and nothing wrong may reach an actor or the engine."""

from __future__ import annotations

import operator
import reprlib
from array import array
from collections.abc import Iterable
from itertools import islice
from typing import Any

from runtime.errors import InvalidRequest

# The most tokens of one append.
MAX_APPEND_TOKENS = 2**18
# Bounds on what a session keeps for as long as it lives.
MOST_EOS_IDS = 64
_MOST_LABEL_BYTES = 256

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int. Raises InvalidRequest, naming the field, unless it is a whole number from `low` to `high`."""
    try:
        # numpy has a bool of its own, which its older versions take for a whole number.
        number = None if type(value).__name__ == "bool" else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InvalidRequest(f"{name} must be a whole number, got {short_repr(value)}", name)
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequest(f"{name} must be {bounds}, got {short_repr(value)}", name)
    return number


def checked_tokens(token_ids: Iterable[int]) -> tuple[int, ...]:
    """The tokens as a tuple. Of an endless iterable it reads one token more than an append may have. Raises InvalidRequest."""
    try:
        return tuple(array("I", islice(iter(token_ids), MAX_APPEND_TOKENS + 1)))
    except (TypeError, OverflowError) as error:
        raise InvalidRequest(f"token ids must be whole numbers of 32 bits: {error}", "token_ids") from None


def checked_eos_ids(eos_token_ids: Iterable[int]) -> frozenset[int]:
    """Raises InvalidRequest."""
    few: set[int] = set()
    try:
        for token_id in eos_token_ids:
            # A request may repeat one id a million times.
            if token_id not in few:
                few.add(check_whole("eos_token_ids", token_id, 0, 2**32 - 1))
            if len(few) > MOST_EOS_IDS:
                raise InvalidRequest(f"a session has {MOST_EOS_IDS} eos ids at most", "eos_token_ids")
    except TypeError as error:
        raise InvalidRequest(f"eos_token_ids must be whole numbers: {error}", "eos_token_ids") from None
    return frozenset(few)


def checked_label(label: str) -> str:
    """Raises InvalidRequest."""
    if not isinstance(label, str):
        raise InvalidRequest(f"a label is text, got {short_repr(label)}", "client_label")
    if len(label) > _MOST_LABEL_BYTES or not is_text(label) or len(label.encode()) > _MOST_LABEL_BYTES:
        raise InvalidRequest(f"a label is {_MOST_LABEL_BYTES} bytes of UTF-8 at most", "client_label")
    return label


def is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can encode, which a lone surrogate is not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def short_repr(value: object) -> str:
    """A value for an error's message: short, and on one line."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:
        # Python refuses to format integers of more than some thousand digits.
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
