"""Tool calls: how a chat template spells them, the grammar of text with calls in it, and a reader that finds them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from runtime.errors import MalformedRequest
from runtime.grammar import json_rule, lark_source
from runtime.items import Call
from runtime.text import Text, overlap

_NAME, _KEY = "perennial_name", "perennial_key"
_TOOL = {"type": "function", "function": {"name": "other", "description": "-", "parameters": {"type": "object"}}}
_CALL = {"id": "123456789", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: 1}}}
_USER = {"role": "user", "content": "-"}


@dataclass(frozen=True, slots=True)
class CallForm:
    """A call is `opening before_name NAME before_arguments {...} after_arguments`; `between` separates two calls."""

    opening: str
    before_name: str
    before_arguments: str
    after_arguments: str
    between: str

    @classmethod
    @lru_cache(maxsize=1)  # One, since a server has one model.
    def of_template(cls, text: Text) -> CallForm:
        """The form in which the model's template writes a call. Raises MalformedRequest if it has none."""
        plain = text.apply_template([_USER])
        asked = text.apply_template([_USER], [_TOOL])
        if plain == asked:
            raise MalformedRequest(
                "the model's chat template knows no tools: leave them out, or load another model", "tools"
            )
        once = _render_calls(text, asked, 1)
        begin, end = _object(once)
        called = once[begin:end]
        opening, rest = once[:begin], once[end:]
        # Some models name an end-of-turn token that their tokenizer lacks.
        for spelled in filter(None, map(text.spelling, text.eos_token_ids)):
            rest = rest.partition(spelled.decode(errors="replace"))[0]
        between = ""
        try:
            twice = _render_calls(text, asked, 2)
        except MalformedRequest:
            pass  # Some templates write only one call a turn.
        else:
            # Before a second call comes the opening, without what a template writes at the beginning of a turn.
            after = twice[end:]
            gap = after[: _object(after)[0]].removeprefix(rest)
            opening = gap.lstrip() or opening
            between = gap.removesuffix(opening)
        before_name, _, after_name = called.partition(_NAME)
        at = after_name.find("{")
        if at < 0 or _KEY not in after_name:
            raise _unknown()
        length = json.JSONDecoder().raw_decode(after_name, at)[1]
        if any(text.has_special_tokens(part) for part in (opening, rest)):
            raise _unknown()
        return cls(opening, before_name, after_name[:at], after_name[length:] + rest, between)

    @property
    def trigger(self) -> str:
        """The text after which a call must follow."""
        return self.opening.strip() or self.before_name

    @property
    def begins_as_json(self) -> bool:
        """Whether the first characters of a call may be those of other JSON: a grammar cannot tell them apart."""
        return (self.opening + self.before_name).lstrip().startswith("{")

    def source(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        is_required: bool,
        is_parallel: bool,
        schema: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a grammar of calls, after free text unless `is_required`; each of `tools` has a name and a schema.

        An answer without calls is JSON of `schema`, if there is one, unless `begins_as_json`. Raises InvalidRequest if the
        schemas are too long.
        """
        rest = (self.opening + self.before_name).partition(self.trigger)[2]
        lines = [
            r"TEXT: /(.|\n)*/",
            f"head[lazy]: TEXT {json.dumps(self.trigger)}",
            f"free: head {_literal(rest)} body",
            f"call: {_literal(self.opening + self.before_name)} body",
            "body: " + " | ".join(f"tool_{index}" for index in range(len(tools))),
        ]
        for index, tool in enumerate(tools):
            lines += [
                f"tool_{index}: {json.dumps(tool['name'] + self.before_arguments)} args_{index} "
                f"{_literal(self.after_arguments)}",
                f"args_{index}: {json_rule(tool['parameters'])}",
            ]
        calls = f"call ({_literal(self.between)} call)*" if is_parallel else "call"
        if is_required:
            start = calls
        elif schema is not None:
            start = f"answer | {calls}"
            lines.append(f"answer: {json_rule(schema)}")
        else:
            start = "free* TEXT" if is_parallel else "TEXT | free"
        return lark_source("\n".join([f"start: {start}", *lines]))

    def source_without_calls(self) -> str:
        """The text of a grammar: any text that begins no call."""
        trigger = re.escape(self.trigger).replace("/", r"\/")
        return lark_source(rf"""start: TEXT
TEXT: /(.|\n)*/ & ~/(.|\n)*{trigger}(.|\n)*/""")

    def reader(self) -> CallReader:
        return CallReader(self)


class CallReader:
    """Separates calls from the text around them, while both arrive in pieces; no part of a call is returned as text."""

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._head = form.opening + form.before_name
        self._held = ""
        self._passed = 0
        self._object: _Object | None = None
        self._has_called = False
        self.began_at = 0
        """How many characters had come before the call that has begun last."""

    @property
    def begun(self) -> Call | None:
        """The call that has arrived in part: its name, and its arguments so far."""
        if self._object is None:
            return None
        name, _, rest = self._held[len(self._head) :].partition(self._form.before_arguments)
        return Call(name, rest[: self._object.end])

    def feed(self, text: str) -> Iterator[str | Call]:
        """Takes `text`; returns text that is not part of a call, and calls that are complete."""
        self._held += text
        while True:
            at = self._held.find(self._head)
            is_begun = at >= 0
            if not is_begun:
                at = len(self._held) - overlap(self._held, self._head)
            yield from self._text(self._take(at))
            if is_begun:
                self.began_at = self._passed
            call = self._call() if is_begun else None
            if call is None:
                return
            self._has_called = True
            yield call

    def end(self) -> str:
        """Ends the text; returns what was held back and is not part of a call. `begun` has a call that was cut off."""
        rest, self._held = self._held, ""
        return "" if rest.startswith(self._form.trigger) else rest

    def _text(self, text: str) -> Iterator[str]:
        # Templates write whitespace between calls, which the assistant did not say.
        if text and not (self._has_called and text.isspace()):
            yield text

    def _call(self) -> Call | None:
        """Takes a complete call from the beginning of the held text, if there is one."""
        name, found, rest = self._held[len(self._head) :].partition(self._form.before_arguments)
        if not found:
            return None
        self._object = self._object or _Object()
        self._object.read(rest)
        length = self._object.end
        if length is None or not rest.startswith(self._form.after_arguments, length):
            return None
        self._take(len(self._held) - len(rest) + length + len(self._form.after_arguments))
        self._object = None
        return Call(name, rest[:length])

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        self._passed += length
        return taken


class _Object:
    """Finds the end of a JSON object that arrives in pieces, and looks at each letter once."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._is_in_string = self._is_escaped = False
        self.end: int | None = None
        """How long the object is, once it has come whole."""

    def read(self, text: str) -> None:
        """Continues where it stopped; `text` is the object from its beginning."""
        while self.end is None and self._at < len(text):
            letter = text[self._at]
            self._at += 1
            if self._is_in_string:
                self._is_in_string = self._is_escaped or letter != '"'
                self._is_escaped = letter == "\\" and not self._is_escaped
            elif letter == '"':
                self._is_in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    self.end = self._at


def _render_calls(text: Text, asked: str, count: int) -> str:
    """The text of an assistant that makes `count` calls after `asked`."""
    turn = {"role": "assistant", "content": "", "tool_calls": [_CALL] * count}
    whole = text.apply_template([_USER, turn], [_TOOL], is_turn_next=False)
    if not whole.startswith(asked) or whole.count(_NAME) != count:
        raise _unknown()
    return whole[len(asked) :]


def _object(text: str) -> tuple[int, int]:
    """The beginning and end of the first JSON object that names the call."""
    decoder = json.JSONDecoder()
    for at in (index for index, letter in enumerate(text) if letter == "{"):
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            continue
        if isinstance(value, dict) and _NAME in value.values():
            return at, end
    raise _unknown()


def _unknown() -> MalformedRequest:
    return MalformedRequest("the model's chat template writes tool calls in a way that is not supported", "tools")


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""
