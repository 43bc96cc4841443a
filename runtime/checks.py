"""Checks of arguments. An embedding program may pass anything, and nothing wrong may reach an actor or the engine."""

from __future__ import annotations

import operator
import reprlib
from typing import Any

from runtime.errors import InvalidRequest

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises InvalidRequest, naming the field, unless `value` is a whole number from `low` to `high`."""
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


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def short_repr(value: object) -> str:
    """A value for an error's message: short, and on one line."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:
        # Python refuses to format integers of more than some thousand digits.
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
