"""Slabs on disk, whatever was left there of an earlier attempt."""

from __future__ import annotations

from array import array
from pathlib import Path

import torch

from runtime.durable.files import Files
from runtime.durable.slab_file import PARTIAL, SlabWriter, read_slab, write_slab
from runtime.engine.torch_slab import torch_pool
from runtime.slab import Slab, SlabSpec
from tests.actors.test_durable import ENGINE

SPEC = SlabSpec(2, 2, 8, sink=4, window=60, row_tile=8, dtype=torch.float32, device=torch.device("cpu"))


def filled(length: int) -> tuple[Slab, array[int]]:
    """A slab that has read so many tokens, and their history."""
    slab = torch_pool(SPEC, 1).acquire()
    block = torch.randn(SPEC.layers, SPEC.kv_heads, length, SPEC.head_dim)
    slab.fill(block, -block, length)
    return slab, array("I", range(length))


def test_what_an_attempt_left_half_way_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "session.slab"
    slab, history = filled(60)
    given_up = SlabWriter(Files(), path, ENGINE, slab, history)
    for _ in range(5):
        assert given_up.step()
    given_up.close()
    assert path.with_suffix(PARTIAL).stat().st_size > 0

    shorter, its_history = filled(10)
    size = write_slab(Files(), path, ENGINE, shorter, its_history)

    assert path.stat().st_size == size
    assert not path.with_suffix(PARTIAL).exists()
    read = torch_pool(SPEC, 1).acquire()
    read_slab(Files(), path, ENGINE, read, its_history)
    for layer in range(SPEC.layers):
        assert all(torch.equal(*pair) for pair in zip(read.held(layer), shorter.held(layer), strict=True))
