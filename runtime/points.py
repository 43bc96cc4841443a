"""A tree of conversations: their items, and the tokens that the model read and drew for them.

A node holds items that came together: those that a client sent, or those of one answer. A *point* is a place in a node's
tokens from which a conversation can continue; what continues there is a child of the node. So branches share what they have
in common, and the tokens of an answer stay those that were drawn.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, takewhile
from math import inf
from typing import Protocol

from runtime.items import Item, Message, Reasoning, are_same, is_assistants, keys_of, length_of
from runtime.script import Head

# The size of a node besides its tokens and text, in bytes.
_NODE_BYTES = 2048
# The size of a name besides its text and its record, in bytes.
_NAME_BYTES = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Where an item of an answer begins and ends in the node's tokens, and how its text grew there.

    `characters[n]` is the length of its text after token `begin + n`.
    """

    begin: int
    end: int
    characters: array[int]

    def offset_of(self, length: int) -> int | None:
        """How many of the node's tokens spell the first `length` characters; None if these end within a token."""
        at = bisect_left(self.characters, length)
        if at == len(self.characters) or self.characters[at] != length:
            return None
        return self.begin + at + 1


@dataclass(eq=False)
class Node:
    """Items that came together, and their tokens. An answer has `spans`; items that a client sent have none.

    A root has no parent, no items and no tokens; it has the `head` of the prompts of its conversations.
    """

    id: int
    parent: Point | None
    items: tuple[Item, ...] = ()
    keys: tuple[bytes, ...] = ()
    tokens: array[int] = field(default_factory=lambda: array("I"))
    spans: tuple[Span, ...] = ()
    head: Head | None = None
    given: dict[bytes, list[Node]] = field(default_factory=dict)
    """What a client goes on with from here, by the key of its first item."""
    answers: list[Node] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    used: int = 0
    is_held: bool = True
    """Whether it is in the tree, and not forgotten while a turn had it."""
    before: int = field(init=False)
    """How many tokens of the conversation precede the node's own."""
    first: Node = field(init=False)
    """The first node of the conversation, below the root."""

    def __post_init__(self) -> None:
        # Computed here, where the node before is there: later it would take a call for each node of a long conversation.
        self.before = self.parent.length if self.parent else 0
        self.first = self.parent.node.first if self.parent and self.parent.node.parent else self

    @property
    def children(self) -> list[Node]:
        """All nodes that continue from here."""
        return [*chain.from_iterable(self.given.values()), *self.answers]

    @property
    def has_children(self) -> bool:
        return bool(self.given or self.answers)

    @property
    def is_answer(self) -> bool:
        return bool(self.spans)

    @property
    def size_bytes(self) -> int:
        return _NODE_BYTES + sum(map(length_of, self.items)) + 4 * len(self.tokens) * (2 if self.spans else 1)


@dataclass(frozen=True, slots=True)
class Point:
    """A place from which a conversation can continue: after the first `offset` tokens of a node."""

    node: Node
    offset: int

    @property
    def length(self) -> int:
        """How many tokens there are from the conversation's beginning up to here."""
        return self.node.before + self.offset

    @property
    def history(self) -> array[int]:
        """The tokens from the conversation's beginning up to here."""
        tokens = array("I")
        for point in reversed([*self.path()]):
            tokens += point.node.tokens[: point.offset]
        return tokens

    @property
    def items(self) -> list[Item]:
        """The items from the conversation's beginning up to here; an item that is cut off here is included as far as it goes."""
        return [item for point in reversed([*self.path()]) for item in point.own_items]

    @property
    def recent_items(self) -> list[Item]:
        """The items of this node and of the one before it."""
        return [item for point in reversed([*islice(self.path(), 2)]) for item in point.own_items]

    @property
    def own_items(self) -> list[Item]:
        """The node's items up to here."""
        node = self.node
        if not node.is_answer or self.offset >= node.spans[-1].end:
            return [*node.items]
        own: list[Item] = []
        for item, span in zip(node.items, node.spans, strict=True):
            if span.end <= self.offset:
                own.append(item)
            elif span.begin < self.offset and isinstance(item, Message | Reasoning):
                own.append(replace(item, text=item.text[: span.characters[self.offset - span.begin - 1]]))
        return own

    @property
    def head(self) -> Head:
        """The head of the conversation's prompt."""
        *_, first = self.path()
        assert first.node.head is not None
        return first.node.head

    def since(self, length: int) -> array[int]:
        """The history's tokens from `length` on."""
        parts = []
        for point in self.path():
            if point.length <= length:
                break
            parts.append(point.node.tokens[max(0, length - point.node.before) : point.offset])
        return array("I", chain.from_iterable(reversed(parts)))

    def path(self) -> Iterator[Point]:
        """This point and the points of the nodes before it, the last first."""
        point: Point | None = self
        while point is not None:
            yield point
            point = point.node.parent


def common_history(one: Point, other: Point, more: array[int]) -> int:
    """How many first tokens the history of a point shares with that of another point followed by `more`."""
    offsets = {point.node: point.offset for point in other.path()}
    begin = 0
    for point in one.path():
        if point.node in offsets:
            begin = point.node.before + min(point.offset, offsets[point.node])
            break
    else:
        length = _common(one.node.first.tokens, other.node.first.tokens)
        if length < min(len(one.node.first.tokens), len(other.node.first.tokens)):
            return length
    return begin + _common(one.since(begin), other.since(begin) + more)


@dataclass(frozen=True, slots=True)
class Match:
    """How far a conversation is held: the point where it continues, and how many of its items lie before it.

    `broke_at` is the index of the first item that differs from what is held; None if the conversation only continues it.
    """

    point: Point
    count: int
    broke_at: int | None


@dataclass(frozen=True, slots=True)
class Contents:
    """What a tree held at one time, in collections that do not change with it.

    `nodes` are all but the roots, the one used longest ago first; a node comes after those that continue from it. `names` have
    their points and records, the oldest name first.
    """

    roots: list[Node]
    nodes: list[Node]
    names: dict[str, tuple[Point, bytes]]


class Log(Protocol):
    """An observer that is told of every change of a tree before it is made. It raises StorageFailed to prevent the change."""

    def rooted(self, node: Node) -> None: ...

    def grew(self, node: Node) -> None: ...

    def dropped(self, node: Node) -> None: ...

    def named(self, name: str, point: Point, record: bytes) -> None: ...

    def forgot(self, name: str) -> None: ...


class PointTree:
    """Conversations, found by what was said in them or by the names of points. The least recently used are forgotten for room."""

    def __init__(self, most_bytes: float = inf) -> None:
        self._most_bytes = most_bytes
        self._log: Log | None = None
        self._next_id = 0
        self._bytes = 0
        self._roots: dict[bytes, Node] = {}
        self._kindred: dict[bytes, dict[Node, None]] = {}
        """The roots whose heads differ in their tools alone, by what they have in common."""
        self._by_use: OrderedDict[Node, None] = OrderedDict()
        """Every node but the roots, the one used longest ago first. A node comes after those that continue from it."""
        self._named: dict[str, tuple[Point, bytes]] = {}
        self._uses = 0

    def root(self, head: Head, as_id: int | None = None) -> Point:
        """The root of the conversations whose prompts have this head. It is kept once something continues from it."""
        return Point(self._roots.get(head.digest) or Node(self._new_id(as_id), None, head=head), 0)

    def _kept(self, point: Point) -> Point:
        """The point; if it is a root, that of the tree for its head."""
        head = point.node.head
        if head is None:
            return point
        if head.digest not in self._roots:
            if self._log:
                self._log.rooted(point.node)
            self._roots[head.digest] = point.node
            self._bytes += head.size_bytes
            self._kindred.setdefault(head.digest_without_tools, {})[point.node] = None
        return Point(self._roots[head.digest], 0)

    def kindred(self, head: Head) -> list[Point]:
        """The roots whose heads differ from this one in their tools at most, the most recently used first."""
        nodes = self._kindred.get(head.digest_without_tools, {})
        return [Point(node, 0) for node in sorted(nodes, key=lambda node: -node.used)]

    def match(self, start: Point, items: Sequence[Item]) -> Match:
        """The furthest point from `start` on whose items are the first of `items`; of several, the most recently used."""
        keys = keys_of(items)
        best, furthest = (0, 0, start), 0
        waiting = [(0, start)]
        while waiting:
            count, point = waiting.pop()
            if (count, point.node.used) >= best[:2]:
                best = (count, point.node.used, point)
            for child in _branches(point, keys[count:]):
                taken, offset = _agreement(child, items[count:], keys[count:])
                furthest = max(furthest, count + taken)
                if offset is not None:
                    waiting.append((count + taken, Point(child, offset)))
        count, _, point = best
        # A client that continues within an answer had it cut off; one whose rest of the answer differs has changed it.
        has_branches = any(child.parent == point for child in point.node.children)
        is_broken = count <= furthest < len(items) and (has_branches or (count > 0 and is_assistants(items[count])))
        # At the beginning of a conversation nothing is held that an item could differ from, and its answer may be begun.
        is_broken = is_broken and (count > 0 or any(map(is_assistants, items[:-1])))
        return Match(point, count, furthest if is_broken else None)

    def grow(
        self,
        point: Point,
        items: Sequence[Item],
        tokens: array[int],
        spans: Sequence[Span] = (),
        as_id: int | None = None,
    ) -> Point:
        """Adds these items after `point`; returns the point after them. Items that are there already are not added again."""
        keys, point = keys_of(items), self._kept(point)
        for child in _branches(point, keys):
            if child.keys == keys and child.tokens == tokens:
                return self.use(Point(child, len(tokens)))
        node = Node(self._new_id(as_id), point, tuple(items), keys, tokens, tuple(spans))
        if not point.node.is_held:
            node.is_held = False
            return Point(node, len(tokens))
        if self._log:
            self._log.grew(node)
        siblings = point.node.answers if node.is_answer else point.node.given.setdefault(_first(keys), [])
        siblings.append(node)
        self._bytes += node.size_bytes
        grown = self.use(Point(node, len(tokens)))
        self._make_room(node)
        return grown

    def use(self, point: Point) -> Point:
        """Records that a conversation continued from this point now."""
        self._uses += 1
        for each in point.path():
            node = each.node
            node.used = self._uses
            if node.is_held and node.parent is not None:
                self._by_use[node] = None
                self._by_use.move_to_end(node)
        return point

    def latest(self, count: int) -> list[Node]:
        """So many nodes, those used last; no roots."""
        return [*islice(reversed(self._by_use), count)]

    def name(self, name: str, point: Point, record: bytes = b"") -> None:
        """Gives a point a name by which to find it, and a `record` that belongs to the name.

        The name is forgotten together with the point, or for room, before younger names of the point.
        """
        if not point.node.is_held:
            self.forget(name)
            return
        point = self._kept(point)
        if self._log:
            self._log.named(name, point, record)
        self._forget(name)
        self._named[name] = (point, record)
        self._bytes += _size_of_name(name, record)
        point.node.names.append(name)
        self._make_room(self.use(point).node)
        # A client may have one point named again and again.
        for older in point.node.names[:-1]:
            if self._bytes <= self._most_bytes:
                break
            self.forget(older)

    def named(self, name: str) -> Point | None:
        """The point with this name, or None."""
        found = self._named.get(name)
        return found and found[0]

    def record(self, name: str) -> bytes:
        """The record that belongs to the name; empty if there is none."""
        return self._named[name][1] if name in self._named else b""

    def forget(self, name: str) -> None:
        """Forgets a name."""
        if self._log and name in self._named:
            self._log.forgot(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        if name in self._named:
            point, record = self._named.pop(name)
            self._bytes -= _size_of_name(name, record)
            point.node.names.remove(name)

    def names(self) -> list[str]:
        """Every name of a point."""
        return [*self._named]

    @property
    def size_bytes(self) -> int:
        """About how much memory the tree takes, in bytes."""
        return self._bytes

    def bound(self, most_bytes: float) -> None:
        """Bounds the tree to `most_bytes` from now on."""
        self._most_bytes = most_bytes
        self._make_room(None)

    def contents(self) -> Contents:
        """What is in the tree now."""
        return Contents([*self._roots.values()], [*self._by_use], self._named.copy())

    def go_on_in(self, log: Log) -> None:
        """Tells `log`, which has everything in the tree already, of every change from now on."""
        self._log = log

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before their children."""
        waiting = [*self._roots.values()]
        while waiting:
            node = waiting.pop()
            if node.parent is not None:
                yield node
            waiting += node.children

    def _new_id(self, as_id: int | None) -> int:
        """The next id, or `as_id` if given; later ids are higher than that."""
        found = self._next_id if as_id is None else as_id
        self._next_id = max(self._next_id, found + 1)
        return found

    def _make_room(self, newest: Node | None) -> None:
        while self._bytes > self._most_bytes and self._by_use:
            oldest = next(iter(self._by_use))
            # What is younger is what the newest continues from.
            if oldest is newest:
                break
            if self._log:
                self._log.dropped(oldest)
            self.drop(oldest)

    def drop(self, node: Node) -> None:
        """Forgets a node that has no children, and its names."""
        assert node.parent is not None
        assert not node.has_children
        above, key = node.parent.node, _first(node.keys)
        if node.is_answer:
            above.answers.remove(node)
        else:
            above.given[key].remove(node)
            if not above.given[key]:
                del above.given[key]
        node.is_held = False
        del self._by_use[node]
        self._bytes -= node.size_bytes
        for name in [*node.names]:
            self._forget(name)
        if above.head is not None and not above.has_children:
            del self._roots[above.head.digest]
            self._bytes -= above.head.size_bytes
            kindred = self._kindred[above.head.digest_without_tools]
            del kindred[above]
            if not kindred:
                del self._kindred[above.head.digest_without_tools]


def _size_of_name(name: str, record: bytes) -> int:
    return _NAME_BYTES + len(name) + len(record)


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many first elements the two share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))


def _branches(point: Point, keys: Sequence[bytes]) -> list[Node]:
    """The nodes that continue from a point and may begin with items of these keys."""
    node = point.node
    return [child for child in (*node.given.get(_first(keys), ()), *node.answers) if child.parent == point]


def _first(keys: Sequence[bytes]) -> bytes:
    return keys[0] if keys else b""


def _agreement(node: Node, items: Sequence[Item], keys: Sequence[bytes]) -> tuple[int, int | None]:
    """How many of the items, which have these keys, are the node's, and how many of its tokens spell them.

    The tokens are None if a conversation that begins with these items cannot continue within the node.
    """
    if node.is_answer:
        return _answers_agreement(node, items)
    taken = _common(node.keys, keys)
    return taken, len(node.tokens) if taken == len(node.keys) else None


def _answers_agreement(answer: Node, items: Sequence[Item]) -> tuple[int, int | None]:
    said = [*takewhile(is_assistants, items)]
    ours = taken = 0
    offset: int | None = None
    while taken < len(said) and ours < len(answer.items):
        mine, theirs = answer.items[ours], said[taken]
        if are_same(mine, theirs):
            offset = answer.spans[ours].end
            ours, taken = ours + 1, taken + 1
        elif isinstance(mine, Reasoning) and not isinstance(theirs, Reasoning):
            # Many clients leave reasoning out.
            ours += 1
        else:
            if taken == len(said) - 1 and (cut := _cut(mine, theirs, answer.spans[ours])) is not None:
                return taken + 1, cut
            return taken, offset
    return taken, offset


def _cut(ours: Item, theirs: Item, span: Span) -> int | None:
    """How many of an answer's tokens spell as much of an item as a client had received when it broke off."""
    match ours, theirs:
        case (Message("assistant", text), Message("assistant", said)) | (Reasoning(text), Reasoning(said)):
            return span.offset_of(len(said)) if said and text.startswith(said) else None
    return None
