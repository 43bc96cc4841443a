"""The tree of conversations against a list of them that is looked through from its beginning."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.items import Call, Item, Message, Output, Reasoning
from runtime.points import Point, PointTree, Span, common_history
from runtime.script import Head

HEAD = Head()
WORD = st.sampled_from(["a", "b"])
GIVEN = st.builds(Message, st.just("user"), WORD) | st.builds(Output, WORD)
SAID = st.builds(Message, st.just("assistant"), WORD) | st.builds(
    Call, WORD, st.sampled_from(["{}", '{"a": 1}']), st.text("12", max_size=2)
)


def tokens_of(items: Sequence[Item]) -> array[int]:
    """Three tokens for each item, other ones for others."""
    return array("I", (crc32(repr(item).encode()) % 1000 + at for item in items for at in range(3)))


def spans_of(items: Sequence[Item]) -> list[Span]:
    return [Span(3 * at, 3 * at + 3, array("I", range(1, 4))) for at in range(len(items))]


@st.composite
def turns(draw: st.DrawFn) -> list[list[Item]]:
    """What a client gives and what is answered, in turn."""
    count = draw(st.integers(1, 5))
    return [draw(st.lists(SAID if number % 2 else GIVEN, min_size=1, max_size=2)) for number in range(count)]


def hold(tree: PointTree, conversation: list[list[Item]]) -> None:
    point = tree.root(HEAD)
    for number, items in enumerate(conversation):
        point = tree.grow(point, items, tokens_of(items), spans_of(items) if number % 2 else ())


def stripped(items: Sequence[Item]) -> list[object]:
    """The items without what tells nothing: the ids of calls."""
    return [(item.name, item.arguments) if isinstance(item, Call) else item for item in items]


def longest_held(conversations: list[list[list[Item]]], items: list[Item]) -> int:
    """How many of the items are held up to a place where one can go on: behind what a client gave, or any answered item."""
    best = 0
    for conversation in conversations:
        held: list[Item] = []
        for number, turn in enumerate(conversation):
            for at, item in enumerate(turn, 1):
                held.append(item)
                is_place = number % 2 == 1 or at == len(turn)
                if is_place and stripped(held) == stripped(items[: len(held)]):
                    best = max(best, len(held))
    return best


@settings(max_examples=300)
@given(held=st.lists(turns(), max_size=4), asked=turns())
def test_a_conversation_is_found_as_far_as_it_is_held(held: list[list[list[Item]]], asked: list[list[Item]]) -> None:
    tree = PointTree(2**20)
    for conversation in held:
        hold(tree, conversation)
    items = [item for turn in asked for item in turn]

    match = tree.match(tree.root(HEAD), items)

    assert match.count == longest_held(held, items)
    assert stripped(match.point.items) == stripped(items[: match.count])
    assert match.point.length == len(match.point.history)
    if match.broke_at is not None:
        assert match.count <= match.broke_at < len(items)


@settings(max_examples=100)
@given(st.lists(turns(), min_size=1, max_size=4))
def test_what_is_there_is_not_held_twice(conversations: list[list[list[Item]]]) -> None:
    tree = PointTree(2**20)
    for conversation in conversations:
        hold(tree, conversation)
    count, size = len([*tree.nodes()]), tree.size_bytes

    for conversation in conversations:
        hold(tree, conversation)

    assert (len([*tree.nodes()]), tree.size_bytes) == (count, size)
    assert size == sum(node.size_bytes for node in tree.nodes())


@settings(max_examples=100)
@given(st.lists(turns(), min_size=1, max_size=8), st.integers(5_000, 20_000))
def test_no_more_is_held_than_there_is_room_for_and_what_was_used_last_stays(
    conversations: list[list[list[Item]]], most: int
) -> None:
    tree = PointTree(most)
    for conversation in conversations:
        hold(tree, conversation)
        last = [node for node in tree.nodes() if not node.children]
        newest = max(last, key=lambda node: node.used)
        path = [point.node for point in Point(newest, 0).path()]

        assert tree.size_bytes <= most or len([*tree.nodes()]) == len(path) - 1
        assert [node for node in tree.nodes() if node.parent and node not in node.parent.node.children] == []


def test_a_conversation_may_be_as_long_as_it_likes() -> None:
    tree = PointTree()
    ends = []
    for first in (1, 2):
        point = tree.root(HEAD)
        for turn in range(3000):
            point = tree.grow(point, [Message("user", str(turn))], array("I", [first, turn]))
        ends.append(point)

    assert [end.length for end in ends] == [6000, 6000]
    assert common_history(ends[0], ends[1], array("I")) == 0


@pytest.mark.parametrize(
    ("head", "item"),
    [
        (HEAD, Message("user", "", "n" * 10_000)),
        (HEAD, Call("f" * 10_000, "{}")),
        (HEAD, Output("", "c" * 10_000)),
        (Head(("t" * 10_000,)), Message("user", "")),
        (Head(options=(("o", "x" * 10_000),)), Message("user", "")),
        (Head(instructions="i" * 10_000), Message("user", "")),
    ],
    ids=["name", "tool", "id of a call", "tools", "options", "instructions"],
)
def test_all_that_a_client_can_send_counts(head: Head, item: Item) -> None:
    tree = PointTree()
    point = tree.grow(tree.root(head), [item], array("I", [1]))

    assert tree.size_bytes > 10_000
    tree.drop(point.node)
    assert tree.size_bytes == 0


def said(text: str, length: int) -> tuple[list[Item], array[int], list[Span]]:
    """A message of one token a letter, after a reasoning of `length` tokens."""
    thought = "t" * length
    items: list[Item] = [Reasoning(thought), Message("assistant", text)]
    spans = [
        Span(0, length, array("I", range(1, length + 1))),
        Span(length, length + len(text), array("I", range(1, len(text) + 1))),
    ]
    return items, array("I", range(length + len(text))), spans


class TestAnAnswer:
    @pytest.fixture
    def tree(self) -> PointTree:
        return PointTree(2**20)

    @pytest.fixture
    def end(self, tree: PointTree) -> Point:
        asked = tree.grow(tree.root(HEAD), [Message("user", "a")], array("I", [7]))
        return tree.grow(asked, *said("hello", 3))

    @pytest.mark.parametrize(
        "back",
        [
            [Reasoning("ttt"), Message("assistant", "hello")],
            [Reasoning(""), Message("assistant", "hello")],
            [Message("assistant", "hello")],
            [Message("assistant", " hello\n")],
        ],
    )
    def test_is_known_however_much_of_its_reasoning_comes_back(
        self, tree: PointTree, end: Point, back: list[Item]
    ) -> None:
        match = tree.match(tree.root(HEAD), [Message("user", "a"), *back, Message("user", "b")])

        assert match.point == end
        assert match.count == len(back) + 1

    def test_goes_on_where_a_client_broke_it_off(self, tree: PointTree, end: Point) -> None:
        match = tree.match(tree.root(HEAD), [Message("user", "a"), Message("assistant", "hel")])

        assert match.point == Point(end.node, 6)
        assert match.point.items == [Message("user", "a"), Reasoning("ttt"), Message("assistant", "hel")]

    def test_of_other_words_is_another(self, tree: PointTree, end: Point) -> None:
        match = tree.match(tree.root(HEAD), [Message("user", "a"), Message("assistant", "hullo"), Message("user", "b")])

        assert match.point == end.node.parent
        assert (match.count, match.broke_at) == (1, 1)

    def test_is_found_by_its_name_until_that_is_forgotten(self, tree: PointTree, end: Point) -> None:
        tree.name("n", end, b"record")
        assert (tree.named("n"), tree.record("n")) == (end, b"record")

        tree.forget("n")
        assert (tree.named("n"), tree.record("n")) == (None, b"")

    def test_has_no_more_names_than_there_is_room_for(self, tree: PointTree, end: Point) -> None:
        for number in range(100):
            tree.name(f"{number} " + "n" * 500, end, bytes(20_000))
        assert tree.size_bytes <= 2**20
        assert tree.named("99 " + "n" * 500) == end

        for number in range(10_000):
            tree.name(f"without a record {number}", end)
        assert tree.size_bytes <= 2**20
        assert len(tree.names()) < 5_000


def test_a_new_conversation_whose_answer_is_begun_differs_from_nothing() -> None:
    tree = PointTree()
    tree.grow(tree.root(HEAD), [Message("user", "other")], array("I", [7]))

    assert tree.match(tree.root(HEAD), [Message("user", "a"), Message("assistant", "Once")]).broke_at is None


class TestARoot:
    def test_from_which_nothing_continues_is_not_kept(self) -> None:
        tree = PointTree()
        for number in range(3):
            tree.match(tree.root(Head(instructions=str(number))), [Message("user", "a")])

        assert [tree.kindred(Head(instructions=str(number))) for number in range(3)] == [[], [], []]

    def test_that_was_forgotten_in_the_middle_of_a_turn_is_kept_again(self) -> None:
        tree = PointTree(20_000)
        root = tree.root(HEAD)
        tree.grow(root, [Message("user", "a")], array("I", [1]) * 2000)
        tree.grow(tree.root(Head(instructions="other")), [Message("user", "b")], array("I", [2]) * 2000)
        assert tree.kindred(HEAD) == []

        end = tree.grow(root, [Message("user", "c")], array("I", [3]))

        assert tree.match(tree.root(HEAD), [Message("user", "c")]).point == end
        tree.bound(0)
        assert (tree.size_bytes, [*tree.nodes()], tree.kindred(HEAD)) == (0, [], [])

    def test_of_a_head_is_one_though_two_turns_begin_at_once(self) -> None:
        tree = PointTree()
        one, other = tree.root(HEAD), tree.root(HEAD)

        ends = [tree.grow(root, [Message("user", "a")], array("I", [7])) for root in (one, other)]

        assert ends[0] == ends[1]
        assert len(tree.kindred(HEAD)) == 1

    def test_is_found_beside_those_of_other_tools(self) -> None:
        tree = PointTree()
        heads = [Head(("a",), (), "i"), Head((), (), "i"), Head(("a",), (), "j"), Head(("a",), (("x", 1),), "i")]
        for head in heads:
            tree.grow(tree.root(head), [Message("user", "a")], array("I", [7]))

        found = [point.node.head for point in tree.kindred(Head((), (), "i"))]

        assert found == [heads[1], heads[0]]
