"""A connection that lives for hours holds no more at their end than at their beginning."""

from __future__ import annotations

import gc

from h2.utilities import SizeLimitDict

from api.client import connect
from tests.api.doors import open_house

CALLS = 600


async def test_calls_that_have_ended_are_forgotten() -> None:
    """By h2, which remembers streams in case frames for them are still on their way."""
    async with open_house() as house, connect(house.grpc) as client, client.session() as session:
        for _ in range(CALLS):
            await session.info()
        remembered = [len(one) for one in gc.get_objects() if type(one) is SizeLimitDict]

    assert 0 < max(remembered) < CALLS // 2
