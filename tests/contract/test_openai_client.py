"""The HTTP door through OpenAI's own client, sync and async, on a server of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from runtime.models import SEEDLING, find_model
from runtime.text import Text
from tests.contract.openai_clients import (
    CLIENTS,
    TALK,
    Client,
    asked,
    async_client,
    options,
    reason_in,
    text_in,
    text_of,
)
from tests.contract.servers import ServerProcess, started, until

pytestmark = pytest.mark.door

# A model's whole context of tokens is 1024 here.
LONG_TALK = [{"role": "user", "content": "the sea " * 600}]
# Enough for seedling to come to an end of what it has to say.
ENOUGH = 200


@pytest.fixture(scope="module")
def endless() -> Iterator[ServerProcess]:
    """A server with one permit and two keys, whose completions come to no end when they are asked not to."""
    with started("perennial", http_overflow="evict", max_concurrent=1, api_keys="right,other") as server:
        yield server


def test_the_one_model_is_listed(client: Client) -> None:
    assert client.models() == [SEEDLING]


def test_an_answer_is_of_the_assistant_and_names_the_model(client: Client) -> None:
    answer = client.answer(max_tokens=1)

    assert (answer.object, answer.model, len(answer.choices)) == ("chat.completion", SEEDLING, 1)
    assert answer.choices[0].message.role == "assistant"


def test_the_role_comes_first_in_a_stream_and_only_once(client: Client) -> None:
    first, *rest = client.chunks(max_tokens=4)

    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.role for chunk in rest] == [None] * len(rest)


def test_the_chunks_of_a_stream_are_of_one_answer(client: Client) -> None:
    chunks = client.chunks(max_tokens=4)

    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_the_pieces_of_a_stream_make_the_text_of_the_answer(client: Client) -> None:
    chunks = client.chunks()

    assert text_in(chunks) == text_of(client.answer())
    assert len(chunks) > 3


@pytest.mark.parametrize(("more", "reason"), [({"max_tokens": ENOUGH}, "stop"), ({"max_tokens": 3}, "length")])
def test_the_finish_reason_says_whether_the_answer_is_whole(client: Client, more: Any, reason: str) -> None:
    answer = client.answer(**more)

    assert answer.choices[0].finish_reason == reason
    assert reason_in(client.chunks(**more)) == reason


def test_the_newer_name_of_max_tokens_bounds_the_answer_too(client: Client) -> None:
    answer = client.answer(max_tokens=openai.omit, max_completion_tokens=3)

    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_usage_counts_the_tokens_of_the_rendered_prompt_and_of_the_answer(client: Client) -> None:
    prompt_tokens = len(Text.load(find_model(SEEDLING)).render(TALK))

    usage = client.answer(max_tokens=5).usage

    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, 5)
    assert usage.total_tokens == prompt_tokens + 5


def test_usage_that_was_asked_for_comes_last_in_a_stream_in_a_chunk_without_a_choice(client: Client) -> None:
    *chunks, last = client.chunks(stream_options={"include_usage": True})

    assert (last.choices, last.usage) == ([], client.answer().usage)
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert all(chunk.choices for chunk in chunks)


def test_a_stream_has_no_usage_that_was_not_asked_for(client: Client) -> None:
    chunks = client.chunks(max_tokens=2)

    assert not any("usage" in chunk.model_fields_set for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


def test_one_seed_gives_one_text_and_another_seed_another(client: Client) -> None:
    drawn = {"temperature": 2, "extra_body": {"ignore_eos": True}}

    text = text_of(client.answer(seed=7, **drawn))

    assert text_of(client.answer(seed=7, **drawn)) == text_in(client.chunks(seed=7, **drawn)) == text
    assert text_of(client.answer(seed=8, **drawn)) != text


def test_top_k_of_one_is_greedy_at_any_temperature(client: Client) -> None:
    answer = client.answer(temperature=2, extra_body={"top_k": 1})

    assert text_of(answer) == text_of(client.answer())


# Within a word, across words, the very beginning, and the second of several.
@pytest.mark.parametrize("place", [slice(3, 5), slice(8, 16), slice(0, 1), slice(12, 13)])
def test_nothing_of_a_stop_string_is_sent(client: Client, place: slice) -> None:
    whole = text_of(client.answer())
    stop = whole[place]

    answer = client.answer(stop=["never said", stop])
    chunks = client.chunks(stop=stop)

    assert stop
    assert text_of(answer) == text_in(chunks) == whole.partition(stop)[0]
    assert answer.choices[0].finish_reason == reason_in(chunks) == "stop"


def test_a_stop_string_that_only_begins_is_sent_after_all(client: Client) -> None:
    whole = text_of(client.answer())

    chunks = client.chunks(stop=[f"{whole[-3:]}, never said", f"{whole[3:9]}, never said"])

    assert text_in(chunks) == whole


def test_an_answer_goes_on_past_the_end_of_the_turn_when_eos_is_ignored(client: Client) -> None:
    ended = client.answer(max_tokens=40)

    answer = client.answer(max_tokens=40, extra_body={"ignore_eos": True})

    assert ended.choices[0].finish_reason == "stop"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    assert text_of(answer).startswith(text_of(ended))


def test_as_many_answers_at_once_as_there_are_permits_are_all_the_same(server: ServerProcess) -> None:
    with async_client(server) as client:
        alone = text_of(client.answer())

        assert [text_of(answer) for answer in client.answers(4)] == [alone] * 4


each_form = pytest.mark.parametrize("form", ["answer", "chunks"])


@each_form
def test_a_prompt_over_the_window_is_a_bad_request(client: Client, form: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        getattr(client, form)(messages=LONG_TALK)

    assert caught.value.code == "context_length_exceeded"


@each_form
def test_a_model_that_is_not_here_is_not_found(client: Client, form: str) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4") as caught:
        getattr(client, form)(model="gpt-4")

    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@each_form
def test_a_field_that_is_not_supported_is_unprocessable(client: Client, form: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="not supported") as caught:
        getattr(client, form)(logit_bias={"5": 10})

    assert caught.value.param == "logit_bias"


each_client = pytest.mark.parametrize("open_client", CLIENTS.values(), ids=CLIENTS)


@each_client
def test_a_wrong_key_is_an_authentication_error(endless: ServerProcess, open_client: Any) -> None:
    with open_client(endless, key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.answer()
        with pytest.raises(openai.AuthenticationError):
            client.models()

    assert caught.value.code == "invalid_api_key"


@each_client
@pytest.mark.parametrize("key", ["right", "other"])
def test_each_of_the_keys_opens_the_door(endless: ServerProcess, open_client: Any, key: str) -> None:
    with open_client(endless, key=key) as client:
        assert client.models() == [SEEDLING]


ENDLESS = {"max_tokens": 2**31 - 1, "extra_body": {"ignore_eos": True}}


@each_client
@each_form
def test_one_completion_more_than_there_are_permits_is_a_rate_limit_error(
    endless: ServerProcess, open_client: Any, form: str
) -> None:
    with OpenAI(**options(endless, "right")) as holder, open_client(endless, key="right") as client:
        with holder.chat.completions.create(stream=True, **asked(ENDLESS)) as held:
            next(held)

            with pytest.raises(openai.RateLimitError) as caught:
                getattr(client, form)()

        until_admitted(client)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 0


def until_admitted(client: Client) -> None:
    """Returns once the permit is free: a server notices a little later that a client has left."""
    until(lambda: is_admitted(client))


def is_admitted(client: Client) -> bool:
    try:
        client.answer(max_tokens=1)
    except openai.RateLimitError:
        return False
    return True


@each_client
def test_an_error_after_a_stream_began_reaches_the_client_as_an_error(hurried: ServerProcess, open_client: Any) -> None:
    refused = pytest.raises(openai.APIError, match="not done within 6 s")

    with open_client(hurried) as client, refused as caught:
        client.chunks(**ENDLESS)

    assert caught.value.code == "timeout"
