"""`/v1/responses` as a WebSocket, through OpenAI's own client, on a server of every kind."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess

pytestmark = [
    pytest.mark.door,
    # OpenAI's client opens sockets in the older way.
    pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning"),
]

ASKED: dict[str, Any] = {"model": "seedling", "max_output_tokens": 12, "temperature": 0}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.http}/v1", api_key="any", max_retries=0) as client:
        yield client


def opened(client: OpenAI) -> Any:
    """A socket."""
    # What websockets knows, and the type of OpenAI's options does not name.
    options: Any = {"open_timeout": MOST_S}
    return client.responses.connect(websocket_connection_options=options)


def last_word(connection: Any, lane: str | None = None) -> Any:
    """The event that ends what was asked on a lane."""
    for event in connection:
        if event.type in ("response.completed", "response.incomplete", "response.failed", "error"):
            assert getattr(event, "stream_id", None) == lane
            return event
    raise AssertionError("the server has closed the socket")


def answered(connection: Any, **asked: Any) -> Any:
    """The response to what is asked."""
    connection.response.create(**ASKED | asked)
    return last_word(connection).response


def total(response: Any) -> int:
    count: int = response.usage.total_tokens
    return count


def reused(response: Any) -> int:
    count: int = response.usage.input_tokens_details.cached_tokens
    return count


def test_a_turn_reads_what_is_new_on_this_socket_and_on_another(client: OpenAI) -> None:
    with opened(client) as connection:
        ahead = answered(connection, input="What do you know of the sea?", generate=False)
        first = answered(connection, input=[], previous_response_id=ahead.id)
        assert reused(first) == total(ahead)
        second = answered(connection, input="And of the wind?", previous_response_id=first.id)
        # The token that was drawn last has not been read.
        assert reused(second) == total(first) - 1
    with opened(client) as connection:
        third = answered(connection, input="Of rain?", previous_response_id=second.id)
        assert reused(third) == total(second) - 1


def test_what_is_said_over_a_socket_is_what_is_said_over_http(client: OpenAI) -> None:
    with opened(client) as connection:
        said = answered(connection, input="What do you know of the wind?")
    stored = client.responses.retrieve(said.id)
    assert (
        stored.output_text
        == said.output_text
        == client.responses.create(**ASKED, input="What do you know of the wind?").output_text
    )


def test_lanes_are_answered_each_in_its_order(client: OpenAI) -> None:
    with opened(client) as connection:
        for lane in ("one", "two"):
            for number in (1, 2):
                asked = f"Lane {lane}, number {number}."
                connection.response.create(**ASKED, input=asked, stream_id=lane, metadata={"asked": asked})
        heard: dict[str, list[str]] = {"one": [], "two": []}
        for event in connection:
            if event.type in ("response.completed", "response.incomplete"):
                assert event.stream_id
                assert event.response.metadata
                heard[event.stream_id].append(event.response.metadata["asked"])
            if sum(map(len, heard.values())) == 4:
                break
    assert heard == {lane: [f"Lane {lane}, number {number}." for number in (1, 2)] for lane in heard}


def test_what_is_wrong_is_told_and_the_socket_goes_on(client: OpenAI) -> None:
    with opened(client) as connection:
        connection.response.create(**ASKED, input="go on", previous_response_id="resp_of_nobody")
        refused: Any = last_word(connection)
        assert (refused.type, refused.error.code) == ("error", "previous_response_not_found")
        connection.response.create(**ASKED, input="go on", background=True)
        refused = last_word(connection)
        assert (refused.type, refused.error.param) == ("error", "background")
        assert total(answered(connection, input="go on")) > 0
