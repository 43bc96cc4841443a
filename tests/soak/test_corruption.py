"""Two thousand directories, each damaged in one way: no server dies, nothing wrong is told, the touched session alone is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.actors.test_durable_faults import lost_by_touching

pytestmark = pytest.mark.soak

CORRUPTIONS = 2000


async def test_two_thousand_corruptions_kill_no_server_and_change_no_token_in_silence(
    record: Callable[[str, str], None],
) -> None:
    lost: Counter[int] = Counter()
    for seed in range(1000, 1000 + CORRUPTIONS):
        with TemporaryDirectory() as directory:
            lost[await lost_by_touching(Path(directory), seed)] += 1
    assert max(lost) <= 2
    record(
        f"{CORRUPTIONS} copies of `state_dir`, each damaged once: bytes flipped or zeroed, a file cut short or swapped",
        "0 servers ended, 0 histories or tokens wrong; "
        + ", ".join(f"{times} lost {records} records" for records, times in sorted(lost.items())),
    )
