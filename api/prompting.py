"""From a question to its prompt: what is held of the conversation, and the tokens of what is new in it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from actors import Runtime
from api.question import Question
from api.reader import Reader
from api.reading import Write
from runtime.items import Item
from runtime.points import Match, Point
from runtime.reasoning import begins_in_reasoning
from runtime.script import Head, Written


@dataclass(frozen=True)
class Prompt:
    """What the model is to have read: `point`, where the question's items end, and the cue by which its answer begins.

    `broke_at` names the first item that differs from what was held, and `because` says why what was held cannot serve.
    """

    point: Point
    cue: array[int]
    is_in_reasoning: bool = False
    broke_at: str | None = None
    because: str | None = None

    @cached_property
    def tokens(self) -> array[int]:
        return self.point.history + self.cue


async def write_prompt(reader: Reader, runtime: Runtime, question: Question, start: Point | None = None) -> Prompt:
    """The prompt of a question that follows `start`, or begins a conversation. Raises MalformedRequest, DeadlineExceeded."""
    tree, eos = runtime.conversations.points, runtime.text.eos_token_ids
    match, unheld, because = _held(runtime, question, start)
    point, new, written = match.point, unheld, None
    if not question.is_open_turn:
        written = await _written(reader, question, point, new, eos)
        if written is None:
            because = "the chat template writes earlier turns anew"
    if written is None:
        point, new = tree.root(point.head), [*point.items, *new]
        written = await _written(reader, question, point, new, eos)
        assert written is not None
    if new or written.tokens:
        point = tree.grow(point, new, written.tokens)
    is_in_reasoning = begins_in_reasoning(runtime.text.spelled(written.cue))
    # Behind a point that the client named its own items come last.
    at = None if match.broke_at is None else match.broke_at - (match.count + len(unheld) - len(question.items))
    broke_at = question.places[at] if at is not None and at >= 0 else None
    return Prompt(tree.use(point), written.cue, is_in_reasoning, broke_at, because)


def _held(runtime: Runtime, question: Question, start: Point | None) -> tuple[Match, Sequence[Item], str | None]:
    """What is held of a question's conversation, the items that are not, and why not more of it is of use."""
    tree, head, items = runtime.conversations.points, question.head, question.items
    because = None
    if start is not None and _serves(start.head, head):
        match = tree.match(start, items)
    elif start is not None:
        items = (*start.items, *items)
        match, because = (
            tree.match(tree.root(head), items),
            "tools, instructions or an option of the chat template changed",
        )
    else:
        match = tree.match(tree.root(head), items)
        for root in tree.roots():
            other = tree.match(root, items) if _serves(root.head, head) else match
            if other.count > match.count and any(point.node.is_answer for point in other.point.path()):
                match = other
    return match, items[match.count :], because


def _serves(held: Head, asked: Head) -> bool:
    """Whether a prompt with one head is as good as with another: who names no tools any more has them forbidden."""
    is_as_asked = (held.options, held.instructions) == (asked.options, asked.instructions)
    return is_as_asked and (not asked.tools or asked.tools == held.tools)


async def _written(
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
    return await reader.read(task, sum(map(_size, new)))


def _size(item: Item) -> int:
    return len(getattr(item, "text", "") or getattr(item, "arguments", ""))
