"""Writes conversations as tokens with the model's chat template, and of a known conversation only what is new.

What a template writes for the items that follow depends on the turn before them and on nothing further back. So new items
are written after a short stand-in for that turn, however long the conversation is.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

from runtime.errors import MalformedRequest
from runtime.items import Call, Item, Message, Output, Reasoning, is_assistants, parsed_arguments
from runtime.text import Text

# Text for places where the words do not matter, and which is searched for afterwards. Nobody else writes it.
_DASH, _MARK = "-", f"mark{secrets.token_hex(8)}"

Options = Mapping[str, Any]
"""What a template is given by name besides messages and tools."""


@dataclass(frozen=True)
class Head:
    """What a prompt has besides items: tools, options that have an effect before the model's turn, and instructions.

    Instructions precede all items, and are not part of the conversation.
    """

    tools: tuple[str, ...] = ()
    """As JSON, in the shape that chat completions have."""
    options: tuple[tuple[str, Any], ...] = ()
    instructions: str = ""

    @cached_property
    def digest(self) -> bytes:
        return _digest([self.tools, self.options, self.instructions])

    @cached_property
    def size_bytes(self) -> int:
        """About how much memory it takes, in bytes."""
        return sum(map(len, self.tools)) + len(self.instructions) + sum(len(str(option)) for option in self.options)

    @cached_property
    def digest_without_tools(self) -> bytes:
        return _digest([self.options, self.instructions])


@dataclass(frozen=True, slots=True)
class Written:
    """The tokens of items, and of the *cue* after them, with which the model's turn begins."""

    tokens: array[int]
    cue: array[int]


def _digest(told: object) -> bytes:
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).digest()


def head_of(text: Text, tools: Sequence[Mapping[str, Any]], options: Options, instructions: str = "") -> Head:
    """The head of a prompt with these tools and options. Raises MalformedRequest if the template refuses the options."""
    asked = [{"role": "user", "content": _DASH}]
    plain = text.apply_template(asked, is_turn_next=False) if options else ""
    shown = {
        name: value
        for name, value in options.items()
        if text.apply_template(asked, is_turn_next=False, options={name: value}) != plain
    }
    spelled = tuple(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return Head(spelled, tuple(sorted(shown.items())), instructions)


def write(text: Text, head: Head, items: Sequence[Item], options: Options) -> Written:
    """The tokens of a whole conversation. Raises MalformedRequest if the template refuses it."""
    said, cue = _Sheet(text, head, options).render(items)
    return Written(text.encode_masked(said), text.encode_masked(cue))


def write_open_turn(text: Text, head: Head, items: Sequence[Item], options: Options) -> Written:
    """The tokens of a whole conversation whose last item the model is to continue. Raises MalformedRequest."""
    last = items[-1]
    if not isinstance(last, Message) or last.role != "assistant":
        raise MalformedRequest("only a message of the assistant's can be gone on with: end with one", "messages")
    said, _ = _Sheet(text, head, options).render([*items[:-1], replace(last, text=last.text + _MARK)])
    return Written(text.encode_masked(said.partition(_MARK)[0]), array("I"))


def write_on(
    text: Text, head: Head, before: Sequence[Item], new: Sequence[Item], options: Options, *, is_after_eos: bool
) -> Written | None:
    """The tokens of `new` after those that the model has for `before`; `is_after_eos` if these end with an end-of-turn token.

    None if the template would now write the items before differently or in another place, or cannot continue from there.
    """
    sheet, context = _Sheet(text, head, options), _stand_in(before)
    # A tool's result is not a question, after which templates write earlier turns differently.
    if any(isinstance(item, Message) for item in new) and sheet.moves_on([*before, *new]):
        return None
    try:
        whole, cue = sheet.render([*context, *new])
        already = "" if is_assistants(before[-1]) else sheet.render(context)[0].partition(_MARK)[2]
    except MalformedRequest:
        return None
    _, found, said = whole.partition(_MARK)
    if not found:
        return None
    if not is_assistants(before[-1]):
        if not said.startswith(already):
            return None
        said = said[len(already) :]
    elif isinstance(before[-1], Call) and (said := text.from_eos(said)) == "":
        return None
    tokens = text.encode_masked(said)
    if is_after_eos and tokens and tokens[0] in text.eos_token_ids:
        del tokens[0]
    return Written(tokens, text.encode_masked(cue))


class _Sheet:
    """A chat template together with its arguments besides messages."""

    def __init__(self, text: Text, head: Head, options: Options) -> None:
        self._text = text
        self._tools = text.masked([json.loads(tool) for tool in head.tools])
        self._instructions = [Message("system", head.instructions)] if head.instructions else []
        self._options = text.masked(options)
        self._manner = _Manner.of_template(text)

    def moves_on(self, items: Sequence[Item]) -> bool:
        """Whether the template would move what it writes at the beginning of these items once more items follow."""
        has_system = self._instructions or any(isinstance(item, Message) and item.role == "system" for item in items)
        return bool((has_system and self._manner.moves_system) or (self._tools and self._manner.moves_tools))

    def render(self, items: Sequence[Item]) -> tuple[str, str]:
        """The text of the items, and the cue, which is empty if the template has none or writes the items differently with it."""
        items = self._manner.adapt([*self._instructions, *items])
        messages = _messages(items, self._manner.no_content, _as_object)
        try:
            whole, asked = self._apply(messages)
        except MalformedRequest:
            # Some templates concatenate the arguments of calls as text.
            as_text = _messages(items, self._manner.no_content, _as_text)
            if as_text == messages:
                raise
            whole, asked = self._apply(as_text)
        return (whole, asked[len(whole) :]) if asked.startswith(whole) else (asked, "")

    def _apply(self, messages: list[dict[str, Any]]) -> tuple[str, str]:
        masked = self._text.masked(messages)
        return (
            self._text.apply_template(masked, self._tools, is_turn_next=False, options=self._options),
            self._text.apply_template(masked, self._tools, options=self._options),
        )


@dataclass(frozen=True, slots=True)
class _Manner:
    """What a chat template accepts, found out by trying. `no_content` is the content of a turn with calls and without words."""

    has_system: bool
    has_late_system: bool
    has_runs: bool
    moves_system: bool
    moves_tools: bool
    no_content: str | None

    @classmethod
    @lru_cache(maxsize=1)  # One, since a server has one model.
    def of_template(cls, text: Text) -> _Manner:
        first, late = f"{_MARK}1", f"{_MARK}2"
        user = {"role": "user", "content": first}
        system = {"role": "system", "content": late}
        late_system = _try(text, [user, system, user]) or ""
        turns = [user, {"role": "assistant", "content": _DASH}, {"role": "user", "content": _DASH}]
        tool = {"type": "function", "function": {"name": late, "description": _DASH, "parameters": {"type": "object"}}}
        with_system, with_tool = _try(text, [system, *turns]) or "", _try(text, turns, [tool]) or ""
        return cls(
            has_system=late in (_try(text, [system, user]) or ""),
            has_late_system=-1 < late_system.find(first) < late_system.find(late),
            has_runs=_try(text, [user, user]) is not None,
            moves_system=-1 < with_system.find(first) < with_system.find(late),
            moves_tools=-1 < with_tool.find(first) < with_tool.find(late),
            no_content="" if _shows_calls(text, "") and not _shows_calls(text, None) else None,
        )

    def adapt(self, items: Sequence[Item]) -> list[Item]:
        """The items in a form that the template accepts: roles that it lacks become the user's."""
        taken: list[Item] = []
        for item in items:
            if isinstance(item, Message) and item.role == "system":
                is_at_home = self.has_late_system if taken else self.has_system
                item = item if is_at_home else replace(item, role="user")
            last = taken[-1] if taken else None
            match last, item:
                case Message("user", earlier), Message("user", later) if not self.has_runs:
                    taken[-1] = Message("user", f"{earlier}\n\n{later}")
                case _:
                    taken.append(item)
        return taken


def _stand_in(before: Sequence[Item]) -> list[Item]:
    """The shortest conversation after which a template continues as after this one. It ends with the mark."""
    user = Message("user", _DASH)
    last = before[-1]
    match last:
        case Output(_, call_id):
            return [user, _call_of(before, call_id), Output(_MARK, call_id)]
        case Message("system") if len(before) == 1:
            return [Message("system", _MARK)]
        case Message("user"):
            return [Message("user", _MARK)]
        case Call(name, _, call_id):
            run = [*takewhile(lambda item: isinstance(item, Call), reversed(before))][:0:-1]
            return [user, *run, Call(name, json.dumps({_MARK: 1}), call_id)]
        case Message("system"):
            return [user, Message("system", _MARK)]
        case _:
            return [user, Message("assistant", _MARK)]


def _call_of(before: Sequence[Item], call_id: str) -> Call:
    made = (item for item in reversed(before) if isinstance(item, Call) and item.call_id == call_id)
    return next(made, Call(_DASH, "{}", call_id))


def _messages(items: Sequence[Item], no_content: str | None, spelled: Any) -> list[dict[str, Any]]:
    """The items as messages for chat templates; consecutive items of the model's turn are one message."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    turn: dict[str, Any] | None = None

    def new_turn() -> dict[str, Any]:
        messages.append({"role": "assistant", "content": no_content})
        return messages[-1]

    for item in items:
        if turn is not None and (turn["content"] or "tool_calls" in turn) and not isinstance(item, Call):
            turn = None
        match item:
            case Message("assistant", said):
                turn = turn or new_turn()
                turn["content"] = said
            case Reasoning(""):
                pass
            case Reasoning(thought):
                turn = turn or new_turn()
                turn["reasoning_content"] = thought
            case Call(name, _, call_id):
                turn = turn or new_turn()
                turn.setdefault("tool_calls", []).append(_call_message(item, spelled))
                names[call_id] = name
            case Message(role, said, name):
                turn = None
                messages.append({"role": role, "content": said} | ({"name": name} if name else {}))
            case Output(said, call_id):
                turn = None
                told = {"tool_call_id": call_id} if call_id else {}
                told |= {"name": names[call_id]} if call_id in names else {}
                messages.append({"role": "tool", "content": said} | told)
    for message in messages:
        if message["role"] == "assistant" and "tool_calls" not in message:
            message["content"] = message["content"] or ""
    return messages


def _call_message(call: Call, spelled: Any) -> dict[str, Any]:
    return {
        "id": call.call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": spelled(call.arguments)},
    }


def _as_object(arguments: str) -> Any:
    """Templates spell the arguments themselves, so they need the object. Text that is no object is passed on as it is."""
    parsed = parsed_arguments(arguments)
    return arguments if parsed is None else parsed


def _shows_calls(text: Text, content: str | None) -> bool:
    """Whether a template writes the calls of a turn with this content, and nothing for missing words."""
    for spelled in (_as_object, _as_text):
        turn = {
            "role": "assistant",
            "content": content,
            "tool_calls": [_call_message(Call(_MARK, "{}", "000000000"), spelled)],
        }
        said = _try(text, [{"role": "user", "content": _DASH}, turn]) or ""
        # Some templates write None as a word.
        if _MARK in said and "None" not in said:
            return True
    return False


def _as_text(arguments: str) -> str:
    return arguments


def _try(text: Text, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str | None:
    try:
        return text.apply_template(messages, tools, is_turn_next=False)
    except MalformedRequest:
        return None
