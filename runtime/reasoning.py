"""Separates a model's reasoning from its words, while both arrive in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto

from runtime.text import overlap

OPENING, CLOSING = "<think>", "</think>"


class _Part(Enum):
    BEGINNING = auto()
    THINKING = auto()
    SPEAKING = auto()


class ReasoningReader:
    """Splits an answer into words and reasoning, which is between two tags at its beginning.

    Line breaks beside the tags belong to neither.
    """

    def __init__(self, *, is_open: bool) -> None:
        """`is_open`: the prompt ended with the opening tag."""
        self._held = ""
        self._part = _Part.THINKING if is_open else _Part.BEGINNING
        # Whether line breaks that come next follow a tag.
        self._is_behind_tag = is_open

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """Takes `text`; returns each piece of text that is certain now, with whether it is reasoning."""
        self._held += text
        if self._part is _Part.BEGINNING:
            begun = self._held.lstrip()
            if len(begun) < len(OPENING) and OPENING.startswith(begun):
                return
            if begun.startswith(OPENING):
                self._enter(_Part.THINKING, begun[len(OPENING) :])
            else:
                self._part = _Part.SPEAKING
        if self._is_behind_tag:
            self._held = self._held.lstrip("\n")
            self._is_behind_tag = not self._held
        if self._part is _Part.THINKING:
            thought, closing, rest = self._held.partition(CLOSING)
            if closing:
                yield from _said(True, thought.rstrip("\n"))
                self._enter(_Part.SPEAKING, rest)
                yield from self.feed("")
                return
            # Line breaks are held back together with what may be the closing tag after them.
            certain = thought[: len(thought) - overlap(thought, CLOSING)].rstrip("\n")
            self._held = thought[len(certain) :]
            yield from _said(True, certain)
        else:
            spoken, self._held = self._held, ""
            yield from _said(False, spoken)

    def end(self) -> Iterator[tuple[bool, str]]:
        """Ends the text; returns what was held back."""
        rest, self._held = self._held, ""
        yield from _said(self._part is _Part.THINKING, rest)

    def _enter(self, part: _Part, rest: str) -> None:
        self._part, self._held, self._is_behind_tag = part, rest, True


def begins_in_reasoning(cue: str) -> bool:
    """Whether a prompt that ends with this cue makes the model begin with reasoning."""
    return re.search(rf"{OPENING}\s*$", cue) is not None


def _said(is_reasoning: bool, text: str) -> Iterator[tuple[bool, str]]:
    if text:
        yield is_reasoning, text
