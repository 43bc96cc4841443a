"""Folds a session's events into one answer: words, reasoning and calls."""

from __future__ import annotations

import secrets
from array import array
from bisect import bisect_right
from collections.abc import Generator, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from api.bounds import Bounds
from api.logprobs import ChosenLogprob, SentLogprobs
from api.stop_strings import StopStrings
from runtime.events import Done, Event, HistoryTruncated, StopReason, Token
from runtime.items import Call, Item, Message, Reasoning
from runtime.points import Span
from runtime.reasoning import ReasoningReader
from runtime.text import Text

FinishReason = Literal["stop", "length", "tool_calls"]

ItemT = TypeVar("ItemT", Message, Reasoning, Call)


@dataclass(frozen=True, slots=True)
class Said:
    """Words; `logprobs` are those of the tokens whose text is now fully sent."""

    text: str
    logprobs: tuple[ChosenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool has begun."""

    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallGrown:
    """More of the arguments of the call that has begun."""

    arguments: str


@dataclass(frozen=True, slots=True)
class ItemDone:
    """An item is complete: all that was said, thought or called since the item before it."""

    item: Item


Part = Said | Thought | CallBegun | CallGrown | ItemDone


@dataclass(slots=True)
class _Growing:
    """An item that is not complete yet; `characters` holds the length of its text after each of its tokens."""

    item: Item
    begin: int
    characters: array[int] = field(default_factory=lambda: array("I"))

    @property
    def length(self) -> int:
        return len(self.item.arguments if isinstance(self.item, Call) else self.item.text)


class Answer:
    """Takes a generation's events and returns the parts of the answer. It remembers the items and tokens of the answer.

    `items` are complete; `spans` says where they lie in `tokens`, which are the cue's followed by those drawn.
    """

    def __init__(
        self,
        text: Text,
        bounds: Bounds,
        eos_token_ids: Set[int],
        cue: array[int],
        *,
        stop: tuple[str, ...] = (),
        has_logprobs: bool = False,
        is_in_reasoning: bool = False,
    ) -> None:
        """`is_in_reasoning`: the cue makes the model begin with reasoning."""
        self._stops = StopStrings([*stop])
        self._logprobs = SentLogprobs(text, eos_token_ids) if has_logprobs else None
        self._reasoning = ReasoningReader(is_open=is_in_reasoning) if text.thinks else None
        self._calls = bounds.reader()
        self._detokenizer = text.detokenizer()
        self._cue_length = len(cue)
        self._growing: _Growing | None = None
        # Length, after each drawn token, of the text in which calls are looked for.
        self._spoken = array("I")
        self._spoken_length = 0
        # Blanks held back: if a call follows, they are dropped.
        self._blanks = ""
        self.tokens = array("I", cue)
        self.reasoning_tokens = 0
        self.items: list[Item] = []
        self.spans: list[Span] = []
        self.finish_reason: FinishReason | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, or None."""
        return self._stops.stopped_by

    @property
    def drawn(self) -> int:
        """How many tokens have been drawn so far."""
        return len(self.tokens) - self._cue_length

    def take(self, event: Event) -> Iterator[Part]:
        """The parts that an event adds. After the last event `finish_reason` is set."""
        match event:
            case Token():
                self.tokens.append(event.token_id)
                text = self._detokenizer.feed(event.token_id)
                if self._logprobs:
                    self._logprobs.feed(event, text)
                yield from self._split(text)
                self._spoken.append(self._spoken_length)
                if self._growing is not None:
                    self._growing.characters.append(self._growing.length)
                    self.reasoning_tokens += isinstance(self._growing.item, Reasoning)
                if self._stops.has_stopped:
                    yield from self._finish("stop")
            case Done(stop_reason):
                yield from self._split("", is_last=True)
                yield from self._finish("stop" if stop_reason is StopReason.EOS else "length")
            case HistoryTruncated():
                pass

    def break_off(self) -> None:
        """Ends the answer early: makes an item of what was said or thought so far. A call that was cut off is no item."""
        if self._growing is not None and not isinstance(self._growing.item, Call):
            self._close(len(self.tokens))

    def _split(self, text: str, *, is_last: bool = False) -> Iterator[Part]:
        if self._reasoning is None:
            yield from self._read(text, is_last=is_last)
            return
        for is_reasoning, part in [*self._reasoning.feed(text), *(self._reasoning.end() if is_last else ())]:
            if is_reasoning:
                yield from self._think(part)
            else:
                yield from self._read(part)
        if is_last:
            yield from self._read("", is_last=True)

    def _think(self, text: str) -> Iterator[Part]:
        if not isinstance(item := self._growing and self._growing.item, Reasoning):
            item = yield from self._begin(Reasoning(""))
        self._grow(replace(item, text=item.text + text))
        yield Thought(text)

    def _read(self, text: str, *, is_last: bool = False) -> Iterator[Part]:
        text = self._stops.feed(text) + (self._stops.end() if is_last and not self._stops.has_stopped else "")
        logprobs = self._logprobs.sent(text, is_last=is_last) if self._logprobs else ()
        if self._calls is None:
            yield from self._say(text, logprobs)
        else:
            self._spoken_length += len(text)
            for part in [*self._calls.feed(text), *([self._calls.end()] if is_last else ())]:
                if isinstance(part, Call):
                    yield from self._call(part)
                    yield self._close(len(self.tokens))
                else:
                    yield from self._say(part)
            if (begun := self._calls.begun) is not None:
                yield from self._call(begun)
        if is_last and self._blanks and not self.items:
            yield from self._say("", is_last=True)

    def _say(self, text: str, logprobs: tuple[ChosenLogprob, ...] = (), *, is_last: bool = False) -> Iterator[Part]:
        if not isinstance(item := self._growing and self._growing.item, Message):
            text, self._blanks = self._blanks + text, ""
            if not (text.strip() or logprobs or (text and is_last)):
                self._blanks = text
                return
            item = yield from self._begin(Message("assistant", ""))
        if text or logprobs:
            self._grow(replace(item, text=item.text + text))
            yield Said(text, logprobs)

    def _call(self, call: Call) -> Iterator[Part]:
        """Adds to a call, which may begin or end with this."""
        self._blanks = ""
        if not isinstance(item := self._growing and self._growing.item, Call):
            item = yield from self._begin(Call(call.name, "", f"call_{secrets.token_hex(12)}"), self._call_begins())
            yield CallBegun(item.call_id, item.name)
        if more := call.arguments[len(item.arguments) :]:
            self._grow(replace(item, arguments=call.arguments))
            yield CallGrown(more)

    def _call_begins(self) -> int:
        """The index of the token with which the call begins that has just been recognised."""
        assert self._calls is not None
        return self._cue_length + bisect_right(self._spoken, self._calls.began_at)

    def _begin(self, item: ItemT, begin: int | None = None) -> Generator[Part, None, ItemT]:
        """Ends the item before and begins this one at the token of index `begin`, or at the last token."""
        last = len(self.tokens) - 1
        begin = last if begin is None else begin
        if self._growing is not None:
            yield self._close(begin)
        self._growing = _Growing(item, begin, array("I", [0] * (last - begin)))
        return item

    def _grow(self, item: Item) -> None:
        assert self._growing is not None
        self._growing.item = item

    def _close(self, end: int) -> ItemDone:
        assert self._growing is not None
        growing, self._growing = self._growing, None
        self.items.append(growing.item)
        self.spans.append(Span(growing.begin, end, growing.characters[: end - growing.begin]))
        return ItemDone(growing.item)

    def _finish(self, reason: FinishReason) -> Iterator[Part]:
        growing = self._growing
        if growing is not None and not isinstance(growing.item, Call):
            # Tokens of a stop string are not part of the answer.
            cut = (
                Span(growing.begin, 0, growing.characters).offset_of(growing.length)
                if self._stops.has_stopped
                else None
            )
            yield self._close(cut or len(self.tokens))
        elif growing is None and self.spans:
            self.spans[-1] = replace(self.spans[-1], end=len(self.tokens))
        has_called = any(isinstance(item, Call) for item in self.items)
        self.finish_reason = "tool_calls" if has_called and reason == "stop" else reason
