"""Turns a question into a prompt: finds what is held of the conversation, and makes tokens of what is new."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from actors import Runtime
from api.question import Question
from api.reader import Reader
from api.reading import Write
from runtime.errors import SlabOverflow
from runtime.items import Item, length_of
from runtime.points import Match, Point
from runtime.reasoning import begins_in_reasoning
from runtime.script import Head, Written


@dataclass(frozen=True)
class Prompt:
    """What the model must read: the conversation up to `point`, where the question's items end, and the cue of the answer.

    `broke_at` names the first item that differs from what was held; `because` says why what was held could not be used.
    """

    point: Point
    cue: array[int]
    is_in_reasoning: bool = False
    broke_at: str | None = None
    because: str | None = None

    @cached_property
    def tokens(self) -> array[int]:
        return self.point.history + self.cue


async def write_prompt(
    reader: Reader, runtime: Runtime, question: Question, start: Point | None, most_tokens: float
) -> Prompt:
    """The prompt of a question that follows `start`, or begins a conversation.

    Raises MalformedRequest, DeadlineExceeded, and SlabOverflow if it has more than `most_tokens`; then nothing of it is held.
    """
    tree, eos = runtime.conversations.points, runtime.text.eos_token_ids
    size = question.head.size_bytes
    if size > most_tokens * runtime.text.longest_spelling:
        raise SlabOverflow(f"tools and instructions have {size} characters, and the most tokens here are {most_tokens}")
    match, unheld, because = _find_held(runtime, question, start)
    point, new, written = _said_at(match.point), unheld, None
    if not question.is_open_turn:
        written = await _write_new(reader, question, point, new, eos)
        if written is None:
            because = "the chat template writes earlier turns anew"
    if written is None:
        point, new = tree.root(point.head), [*point.items, *new]
        written = await _write_new(reader, question, point, new, eos)
        assert written is not None
    length = point.length + len(written.tokens) + len(written.cue)
    if length > most_tokens:
        raise SlabOverflow(
            f"the prompt has {length} tokens and sink + window = {most_tokens}: send less, or set http_overflow=evict"
        )
    if new or written.tokens:
        point = tree.grow(point, new, written.tokens)
    is_in_reasoning = begins_in_reasoning(runtime.text.spelled(written.cue))
    # If the client named a point, the request's items are the last ones.
    at = None if match.broke_at is None else match.broke_at - (match.count + len(unheld) - len(question.items))
    broke_at = question.places[at] if at is not None and at >= 0 else None
    return Prompt(tree.use(point), written.cue, is_in_reasoning, broke_at, because)


def _find_held(runtime: Runtime, question: Question, start: Point | None) -> tuple[Match, Sequence[Item], str | None]:
    """The point up to which the question's conversation is held, the items after it, and why no more of it can be used."""
    tree, head, items = runtime.conversations.points, question.head, question.items
    because = None
    if start is not None and _head_serves(start.head, head):
        match = tree.match(start, items)
    elif start is not None:
        items = (*start.items, *items)
        match, because = (
            tree.match(tree.root(head), items),
            "tools, instructions or an option of the chat template changed",
        )
    else:
        match = tree.match(tree.root(head), items)
        for root in tree.kindred(head):
            other = tree.match(root, items) if _head_serves(root.head, head) else match
            if other.count > match.count and any(point.node.is_answer for point in other.point.path()):
                match = other
    return match, items[match.count :], because


def _said_at(point: Point) -> Point:
    """The last point at which something was said. A node without items was read ahead: what follows is not written after it."""
    while not point.node.items and point.node.parent is not None:
        point = point.node.parent
    return point


def _head_serves(held: Head, asked: Head) -> bool:
    """Whether a prompt held with one head serves a request with another. A request without tools may use one that has them."""
    is_as_asked = (held.options, held.instructions) == (asked.options, asked.instructions)
    return is_as_asked and (not asked.tools or asked.tools == held.tools)


async def _write_new(
    reader: Reader, question: Question, point: Point, new: Sequence[Item], eos_token_ids: frozenset[int]
) -> Written | None:
    last = point.node.tokens[point.offset - 1] if point.offset else None
    before = tuple(point.recent_items)
    task = Write(
        point.head,
        before,
        tuple(new),
        question.options,
        is_after_eos=last in eos_token_ids,
        is_open_turn=question.is_open_turn,
    )
    return await reader.read(task, point.head.size_bytes + sum(map(length_of, (*before, *new))))
