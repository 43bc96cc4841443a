"""Slabs on disk, whatever was left there of an earlier attempt."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.durable.files import Files
from runtime.durable.framing import CHECKSUM_BYTES, Damaged, Unknown
from runtime.durable.slab_file import PARTIAL, SlabWriter, read_slab, write_slab
from runtime.engine.torch_slab import torch_pool
from runtime.slab import Slab
from runtime.slab_spec import RecurrentSpec, SlabSpec
from tests.actors.test_durable import ENGINE

RECURRENT = RecurrentSpec(layers=2, columns=6, reach=2, state=(3, 4, 4))
SPEC = SlabSpec(2, 2, 8, sink=4, window=60, row_tile=8, dtype="float32")


def filled(length: int, spec: SlabSpec = SPEC) -> tuple[Slab, array[int]]:
    """A slab that has read so many tokens, and their history."""
    slab = torch_pool(spec, 1).acquire()
    block = torch.randn(spec.layers, spec.kv_heads, length, spec.head_dim)
    slab.fill(block, -block, length)
    for tensor in slab.recurrent_tensors():
        tensor.normal_()
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


def test_what_recurrent_layers_keep_comes_back_whole(tmp_path: Path) -> None:
    slab, history = filled(40, replace(SPEC, recurrent=RECURRENT))
    path = tmp_path / "session.slab"
    size = write_slab(Files(), path, ENGINE, slab, history)

    read = torch_pool(slab.spec, 1).acquire()
    read_slab(Files(), path, ENGINE, read, history)

    assert size > slab.spec.kept_bytes
    assert read.frontiers == slab.frontiers == (40,) * (SPEC.layers + RECURRENT.layers)
    assert len(read.recurrent_tensors()) == 2 * RECURRENT.layers
    assert all(torch.equal(*pair) for pair in zip(read.recurrent_tensors(), slab.recurrent_tensors(), strict=True))


def test_a_slab_comes_back_as_one_that_went_back(tmp_path: Path) -> None:
    slab, history = filled(60)
    slab.retract(55)
    path = tmp_path / "session.slab"
    write_slab(Files(), path, ENGINE, slab, history)

    read = torch_pool(SPEC, 1).acquire()
    read_slab(Files(), path, ENGINE, read, history)

    assert (read.frontier, read.written) == (55, 60)


def test_a_byte_changed_in_what_recurrent_layers_keep_is_damage(tmp_path: Path) -> None:
    slab, history = filled(40, replace(SPEC, recurrent=RECURRENT))
    path = tmp_path / "session.slab"
    write_slab(Files(), path, ENGINE, slab, history)
    content = bytearray(path.read_bytes())
    content[-CHECKSUM_BYTES - 1] ^= 1
    path.write_bytes(content)

    read = torch_pool(slab.spec, 1).acquire()
    with pytest.raises(Damaged):
        read_slab(Files(), path, ENGINE, read, history)

    assert read.frontier == 0


def test_a_slab_of_layers_that_attend_alone_is_read_in_its_own_format_and_no_other(tmp_path: Path) -> None:
    slab, history = filled(40)
    path = tmp_path / "session.slab"
    write_slab(Files(), path, ENGINE, slab, history)

    assert int.from_bytes(path.read_bytes()[8:12], "little") == 1
    with pytest.raises(Unknown, match="format 1"):
        read_slab(Files(), path, ENGINE, torch_pool(replace(SPEC, recurrent=RECURRENT), 1).acquire(), history)
