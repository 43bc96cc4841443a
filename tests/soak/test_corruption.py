"""Two thousand directories, each damaged in one way: no server dies, nothing wrong is told, the touched session alone is lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.actors.test_durable_faults import lost_by_touching

pytestmark = pytest.mark.soak

CORRUPTIONS = 2000


async def test_two_thousand_corruptions_kill_no_server_and_change_no_token_in_silence() -> None:
    lost: Counter[int] = Counter()
    for seed in range(1000, 1000 + CORRUPTIONS):
        with TemporaryDirectory() as directory:
            lost[await lost_by_touching(Path(directory), seed)] += 1
    print(f"\n{CORRUPTIONS} corruptions; records lost by each: {dict(sorted(lost.items()))}")
    assert max(lost) <= 2
