"""A session far past its window takes no more room than one that has just filled it."""

from __future__ import annotations

import psutil
import pytest

from tests.contract.conftest import KEYS, VISIBLE
from tests.contract.servers import ServerProcess
from tests.contract.stubs import Stubs, stock

pytestmark = pytest.mark.door

TURNS = 20
# By then the window is full, and every allocator has seen the largest forward.
SETTLED = 5
SLACK_BYTES = 4 * 2**20


def test_twenty_turns_leave_memory_where_five_left_it(keyed: ServerProcess, stubs: Stubs) -> None:
    process = psutil.Process(keyed.process.pid)
    live_bytes, resident_bytes = [], []
    with stock(stubs, keyed.grpc, KEYS[0]) as client:
        session = client.create()
        for turn in range(TURNS):
            client.append(session, [100 + turn] * 44)
            client.generated(session, 18, temperature=1.0, seed=turn)
            live_bytes.append(client.info(session).kv_live_bytes)
            resident_bytes.append(process.memory_info().rss)

        assert client.close(session) == TURNS * 62 > 4 * VISIBLE
    assert set(live_bytes[SETTLED:]) == {live_bytes[SETTLED]}
    assert max(resident_bytes[SETTLED:]) - resident_bytes[SETTLED] <= SLACK_BYTES
