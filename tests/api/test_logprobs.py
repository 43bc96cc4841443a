"""Logprobs go out with the text that they belong to, and never with a stop string."""

from __future__ import annotations

import random
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from api.logprobs import ChosenLogprob, SentLogprobs
from api.stop_strings import StopStrings
from runtime.events import Logprobs, Token
from runtime.models import SEEDLING, find_model
from runtime.text import Text

EOS = 2


@cache
def text() -> Text:
    return Text.load(find_model(SEEDLING))


def token(token_id: int) -> Token:
    return Token(token_id, Logprobs(-1.5, ((token_id, -1.5), (5, float("-inf")))))


def sent(token_ids: list[int], stops: list[str]) -> tuple[str, list[ChosenLogprob]]:
    """What a client gets of these tokens."""
    logprobs, stopping, detokenizer = SentLogprobs(text(), {EOS}), StopStrings(stops), text().detokenizer()
    told: list[ChosenLogprob] = []
    out = ""
    for token_id in token_ids:
        spelt = detokenizer.feed(token_id)
        logprobs.feed(token(token_id), spelt)
        piece = stopping.feed(spelt)
        told += logprobs.sent(piece, is_last=False)
        out += piece
        assert len(b"".join(bytes(one.bytes) for one in told)) <= len(out.encode())
        if stopping.has_stopped:
            return out, told
    rest = stopping.end()
    return out + rest, told + list(logprobs.sent(rest, is_last=True))


def spelling(told: list[ChosenLogprob]) -> bytes:
    return b"".join(bytes(one.bytes) for one in told)


@settings(max_examples=100)
@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_without_a_stop_the_bytes_of_all_tokens_are_the_text(said: str) -> None:
    token_ids = text().encode(said)

    out, told = sent([*token_ids, EOS], [])

    assert spelling(told) == out.encode()
    assert len(told) == len(token_ids)


@settings(max_examples=200)
@given(st.text("ab é☃", max_size=30), st.lists(st.text("ab é☃", min_size=1, max_size=4), min_size=1, max_size=4))
def test_no_token_that_has_a_part_in_a_stop_string_is_told(said: str, stops: list[str]) -> None:
    out, told = sent(text().encode(said), stops)

    assert out.encode().startswith(spelling(told))
    assert not any(stop in out for stop in stops)


def test_bytes_that_never_make_a_character_are_told_in_the_end() -> None:
    first_of_two = text().encode("é")[0] if len(text().encode("é")) > 1 else text().encode("☃")[0]

    out, told = sent([*text().encode("a"), first_of_two], [])

    assert told[0].bytes == list(b"a")
    assert len(told) == 2
    assert told[1].token == "\ufffd"
    assert out == "a"


def test_a_likely_token_is_spelt_and_an_impossible_one_has_a_number_that_json_knows() -> None:
    _, [told] = sent(text().encode("a"), [])

    assert [(one.token, one.logprob) for one in told.top_logprobs] == [
        ("a", -1.5),
        (told.top_logprobs[1].token, -9999.0),
    ]


@settings(max_examples=50)
@given(st.randoms())
def test_any_tokens_at_all_are_told_once_at_most(chance: random.Random) -> None:
    token_ids = [chance.randrange(3, 2048) for _ in range(30)]

    _, told = sent(token_ids, [])

    assert [one.bytes for one in told] == [list(text().spelling(token_id)) for token_id in token_ids][: len(told)]
