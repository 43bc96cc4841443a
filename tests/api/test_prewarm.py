"""A response that is asked for nothing but to be read ahead."""

from typing import Any

import httpx

from tests.actors.engines import LedgerEngine
from tests.api.doors import House, open_house


async def responded(house: House, **asked: Any) -> dict[str, Any]:
    host, port = house.http
    async with httpx.AsyncClient(timeout=60) as client:
        body = {"model": "seedling", "max_output_tokens": 4, **asked}
        answer = await client.post(f"http://{host}:{port}/v1/responses", json=body)
    response: dict[str, Any] = answer.raise_for_status().json()
    return response


async def used(house: House, **asked: Any) -> dict[str, int]:
    """What a response says that its input took."""
    details: dict[str, int] = (await responded(house, **asked))["usage"]["input_tokens_details"]
    return details


async def test_it_says_how_much_of_its_input_is_held_already() -> None:
    async with open_house(LedgerEngine(window=200)) as house:
        first = await used(house, input="hello word5 word6", generate=False)
        assert (first["reused"], first["read"]) == (0, 3)
        await used(house, input="hello word5 word6")
        again = await used(house, input="hello word5 word6", generate=False)
        assert (again["reused"], again["read"]) == (3, 0)


async def test_what_follows_instructions_that_were_read_ahead_is_the_prompt_that_it_would_be_without_them() -> None:
    asked = {"instructions": "word7 word8", "input": "hello word5"}
    async with open_house(LedgerEngine(window=200)) as house:
        expected = (await responded(house, **asked))["usage"]["input_tokens"]
    async with open_house(LedgerEngine(window=200)) as house:
        ahead = await responded(house, **asked | {"input": []}, generate=False)
        follows = await responded(house, **asked, previous_response_id=ahead["id"])

    assert follows["usage"]["input_tokens"] == expected > ahead["usage"]["input_tokens"] > 0


async def test_a_conversation_goes_on_after_it_was_read_ahead_as_it_would_without() -> None:
    async with open_house(LedgerEngine(window=200)) as house:
        first = await responded(house, input="hello word5")
        expected = (await responded(house, input="word6", previous_response_id=first["id"]))["usage"]["input_tokens"]
        for _ in range(2):
            ahead = await responded(house, input=[], previous_response_id=first["id"], generate=False)
        follows = await responded(house, input="word6", previous_response_id=ahead["id"])

    assert follows["usage"]["input_tokens"] == expected
