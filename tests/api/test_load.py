"""How full a server says it is, by which a deployment has more of them."""

from __future__ import annotations

from tests.api.doors import open_house


async def test_it_is_full_when_its_sessions_slabs_are_at_work_however_many_completions_it_could_run() -> None:
    async with open_house(capacity=2, max_concurrent=8) as house:
        assert house.server.load == 0
        with house.server.call(), house.server.call():
            assert house.server.load == 1


async def test_it_is_full_when_its_permits_are_taken_however_many_sessions_it_could_hold() -> None:
    async with open_house(capacity=8, max_concurrent=2) as house:
        with house.server.call() as runtime:
            async with runtime.permit(), runtime.permit():
                assert house.server.load == 1
