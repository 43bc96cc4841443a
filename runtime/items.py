"""The items of conversations, independent of the dialect, and when two of them are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

_KEY_BYTES = 16
# Of brackets in a call's arguments. Python, and templates, walk through them by recursion.
_MOST_LEVELS = 100


@dataclass(frozen=True, slots=True)
class Message:
    """A message, by anybody."""

    role: Role
    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The model's reasoning before it speaks."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool; `arguments` is a JSON object in the model's own spelling."""

    name: str
    arguments: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """The result of a call."""

    text: str
    call_id: str = ""


Item = Message | Reasoning | Call | Output


def is_assistants(item: Item) -> bool:
    """Whether the item is the model's."""
    return isinstance(item, Reasoning | Call) or (isinstance(item, Message) and item.role == "assistant")


def length_of(item: Item) -> int:
    """How many characters the item has in all its parts but its role, which is one of three."""
    return sum(len(getattr(item, part)) for part in item.__slots__ if part != "role")


def keys_of(items: Sequence[Item]) -> tuple[bytes, ...]:
    """A digest of each item, equal for items that mean the same, whatever their ids and the spelling of their JSON."""
    return tuple(map(_key_of, items))


def are_same(ours: Item, theirs: Item) -> bool:
    """Whether a client's item is one of ours sent back: perhaps trimmed, re-serialised, or as reasoning without its text."""
    match ours, theirs:
        case Reasoning(text), Reasoning(said):
            return said.strip() in ("", text.strip())
        case Message("assistant", text), Message("assistant", said):
            return said.strip() == text.strip()
        case _:
            return _key_of(ours) == _key_of(theirs)


def parsed_arguments(arguments: str) -> dict[str, Any] | None:
    """The object in a call's arguments; None if they are not a JSON object, or one of more levels than any reader bears."""
    try:
        value = json.loads(arguments or "{}", parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_flat(value) else None


def _is_flat(value: Any) -> bool:
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return True
    return False


def _key_of(item: Item) -> bytes:
    match item:
        case Message(role, text, name):
            parts = [role, name, text]
        case Reasoning(text):
            parts = ["reasoning", text.strip()]
        case Call(name, arguments):
            parts = ["call", name, _canonical(arguments)]
        case Output(text):
            parts = ["output", text]
    told = json.dumps(parts).encode()
    return hashlib.blake2b(told, digest_size=_KEY_BYTES).digest()


def _canonical(arguments: str) -> str:
    """The same text for all spellings of the same arguments.

    Numbers are compared as floats, because some clients have only these.
    """
    value = parsed_arguments(arguments)
    return arguments if value is None else json.dumps(_as_floats(value), sort_keys=True)


def _as_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_floats(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_floats(one) for one in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value) + 0.0
        except OverflowError:
            return str(value)
    return value


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number in JSON")
