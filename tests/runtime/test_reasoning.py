"""Reasoning is told apart from words, however the text is cut."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.reasoning import ReasoningReader, begins_in_reasoning

TEXT = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "</thin", "nk>", "\n", " ", "a", "<", "hello"]), max_size=10
).map("".join)


def read(pieces: list[str], is_open: bool) -> list[tuple[bool, str]]:
    """Reasoning and words in turn, each in one piece."""
    reader = ReasoningReader(is_open=is_open)
    parts = [part for piece in pieces for part in reader.feed(piece)] + [*reader.end()]
    return [(kind, "".join(text for _, text in run)) for kind, run in groupby(parts, key=lambda part: part[0])]


@pytest.mark.parametrize(
    ("said", "is_open", "parts"),
    [
        ("hello", False, [(False, "hello")]),
        ("", False, []),
        ("<think>\nhm\n</think>\n\nhello", False, [(True, "hm"), (False, "hello")]),
        ("\n<think>hm</think>hello", False, [(True, "hm"), (False, "hello")]),
        ("hm\n\nhm\n</think>\n\nhello", True, [(True, "hm\n\nhm"), (False, "hello")]),
        ("<think>\n\n</think>\n\nhello", False, [(False, "hello")]),
        ("hello <think>not now</think>", False, [(False, "hello <think>not now</think>")]),
        ("<think>hm</think>a </think> b", False, [(True, "hm"), (False, "a </think> b")]),
        ("<think>hm", False, [(True, "hm")]),
        ("hm", True, [(True, "hm")]),
        ("<thi", False, [(False, "<thi")]),
        ("<think>a </thin", False, [(True, "a </thin")]),
    ],
)
def test_reasoning_stands_between_tags_at_the_beginning(
    said: str, is_open: bool, parts: list[tuple[bool, str]]
) -> None:
    assert read([said], is_open) == parts
    assert read([*said], is_open) == parts


@settings(max_examples=500)
@given(said=TEXT, is_open=st.booleans(), data=st.data())
@example(said="<think>\n\n</think>\n\na", is_open=False, data=None)
def test_where_the_text_is_cut_makes_no_difference(said: str, is_open: bool, data: st.DataObject | None) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(said))))) if data else range(len(said))
    pieces = [said[start:end] for start, end in zip([0, *cuts], [*cuts, len(said)], strict=True)]

    assert read(pieces, is_open) == read([said], is_open)


@given(TEXT)
def test_words_without_a_tag_come_as_they_are_and_at_once(said: str) -> None:
    words = f"hello{said}"
    reader = ReasoningReader(is_open=False)

    assert [*reader.feed(words)] == [(False, words)]
    assert [*reader.end()] == []


@pytest.mark.parametrize(
    ("cue", "begins"),
    [("<|Assistant|><think>\n", True), ("assistant\n<think>", True), ("<think>\n\n</think>\n\n", False), ("", False)],
)
def test_a_cue_that_ends_with_the_opening_tag_begins_reasoning(cue: str, begins: bool) -> None:
    assert begins_in_reasoning(cue) is begins
