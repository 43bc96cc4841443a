"""A response that is asked for nothing but to be read ahead."""

from typing import Any

import httpx

from tests.actors.engines import LedgerEngine
from tests.api.doors import House, open_house


async def used(house: House, **asked: Any) -> dict[str, int]:
    """What a response says that its input took."""
    host, port = house.http
    async with httpx.AsyncClient(timeout=60) as client:
        body = {"model": "seedling", "max_output_tokens": 4, **asked}
        answer = await client.post(f"http://{host}:{port}/v1/responses", json=body)
    details: dict[str, int] = answer.raise_for_status().json()["usage"]["input_tokens_details"]
    return details


async def test_it_says_how_much_of_its_input_is_held_already() -> None:
    async with open_house(LedgerEngine(window=200)) as house:
        first = await used(house, input="hello word5 word6", generate=False)
        assert (first["reused"], first["read"]) == (0, 3)
        await used(house, input="hello word5 word6")
        again = await used(house, input="hello word5 word6", generate=False)
        assert (again["reused"], again["read"]) == (3, 0)
