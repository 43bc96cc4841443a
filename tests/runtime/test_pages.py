"""Memory that is handed back early."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from runtime.foreign.pages import page_out

LENGTH = 64 * 2**20


def test_what_was_handed_back_keeps_its_content() -> None:
    ours = torch.arange(3 * 2**20, dtype=torch.int32)

    page_out([ours[5:-7]])

    assert torch.equal(ours, torch.arange(3 * 2**20, dtype=torch.int32))


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere the system takes pages back when it needs them"
)
def test_pages_of_a_file_no_longer_count_as_ours(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * (LENGTH // 256))
    mapped = torch.from_file(str(tmp_path / "weights"), size=LENGTH, dtype=torch.uint8)
    total = int(mapped.sum(dtype=torch.int64))
    before = psutil.Process().memory_info().rss

    page_out([mapped])

    assert before - psutil.Process().memory_info().rss > LENGTH // 2
    assert int(mapped.sum(dtype=torch.int64)) == total
