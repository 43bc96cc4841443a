"""Stop strings: against an oracle that reads the text one character at a time and looks at all of it each time."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.stop_strings import StopStrings

# Few letters, so that stop strings occur, overlap, nest and begin without an end.
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)
PIECES = st.lists(st.text("ab\n", max_size=4), max_size=12)
ANYTHING = st.lists(st.text(), max_size=6)


def stopped_text(text: str, stops: list[str]) -> str | None:
    """What stands before the stop string that is complete first, or None; of those that end together, the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


def sendable(text: str, stops: list[str]) -> str:
    """What of `text`, in which no stop string is complete, cannot become part of one."""
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    return next(text[:cut] for cut in range(len(text) + 1) if text[cut:] in beginnings or cut == len(text))


def sent_of(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What each piece lets out, as a completion feeds them, and whether the text was stopped."""
    stream = StopStrings(stops)
    sent: list[str] = []
    for piece in pieces:
        sent.append(stream.feed(piece))
        if stream.has_stopped:
            return sent, True
    return [*sent, stream.end()], False


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[one:other] for one, other in pairwise(at)]


@settings(max_examples=1000)
@given(pieces=PIECES, stops=STOPS)
@example(pieces=["ab", "a", "b\n"], stops=["abab\n", "b\n"])
@example(pieces=["aab"], stops=["aab", "a"])
@example(pieces=["aa", "ab"], stops=["aab"])
def test_what_is_sent_is_the_text_before_the_stop_string_that_is_complete_first(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    before = stopped_text(text, stops)

    sent, has_stopped = sent_of(pieces, stops)

    assert ("".join(sent), has_stopped) == ((text, False) if before is None else (before, True))


@settings(max_examples=500)
@given(pieces=ANYTHING, data=st.data())
def test_a_stop_string_out_of_the_text_itself_stops_any_text(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = text[start : start + data.draw(st.integers(1, 4))] or "absent"

    sent, has_stopped = sent_of(pieces, [stop])

    assert "".join(sent) == text.partition(stop)[0]
    assert has_stopped == (stop in text)


@settings(max_examples=500)
@given(text=st.text("ab\n", max_size=24), stops=STOPS, places=st.lists(st.integers(0, 24), max_size=8))
def test_how_the_text_is_cut_into_pieces_changes_nothing(text: str, stops: list[str], places: list[int]) -> None:
    whole, has_whole_stopped = sent_of([text], stops)

    sent, has_stopped = sent_of(cut(text, places), stops)

    assert ("".join(sent), has_stopped) == ("".join(whole), has_whole_stopped)


@settings(max_examples=1000)
@given(pieces=PIECES, stops=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    text = sent = ""
    for piece in pieces:
        text += piece
        sent += stream.feed(piece)
        if stream.has_stopped:
            break

        assert sent == sendable(text, stops)


@settings(max_examples=200)
@given(pieces=ANYTHING)
def test_without_stop_strings_each_piece_is_sent_as_it_comes(pieces: list[str]) -> None:
    sent, _ = sent_of(pieces, [])

    assert sent == [*pieces, ""]


def test_a_stop_string_that_is_complete_wins_over_one_that_began_earlier() -> None:
    sent, _ = sent_of(["abc"], ["abc", "b"])

    assert "".join(sent) == "a"
