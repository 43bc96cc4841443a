"""Slabs in an object store, in parts: whole, or told to be none, whoever else writes one and whatever was given up."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.durable.parts import PartFiles
from runtime.durable.shared import fill
from runtime.durable.slab_file import SlabWriter, write_slab
from runtime.durable.store import Kept
from runtime.engine.torch_slab import torch_pool
from runtime.slab import Slab
from runtime.slab_spec import SlabSpec
from tests.actors.test_durable import ENGINE, OTHER_ENGINE
from tests.runtime.durable.buckets import Fault, FaultyObjects
from tests.runtime.durable.test_slab_file import RECURRENT, SPEC, filled

PATH = Path("sessions/an-id/an-id.slab")
PART_BYTES = 1000


def files_of(objects: FaultyObjects) -> PartFiles:
    return PartFiles(objects, PART_BYTES)


def read(objects: FaultyObjects, history: array[int], like: Slab) -> tuple[Kept, Slab]:
    slab = torch_pool(like.spec, 1).acquire()
    return fill(files_of(objects), PATH, ENGINE, slab, history), slab


def is_equal(one: Slab, other: Slab) -> bool:
    return one.frontier == other.frontier and all(
        torch.equal(*pair)
        for layer in range(one.spec.layers)
        for pair in zip(one.held(layer), other.held(layer), strict=True)
    )


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, recurrent=RECURRENT)])
@pytest.mark.parametrize("length", [1, 30, 60])
def test_a_slab_comes_back_whole(spec: SlabSpec, length: int) -> None:
    objects = FaultyObjects()
    slab, history = filled(length, spec)
    write_slab(files_of(objects), PATH, ENGINE, slab, history)

    kept, found = read(objects, history, slab)

    assert kept is Kept.SLAB
    assert is_equal(found, slab)
    assert all(one.size <= PART_BYTES for one in objects.list("sessions/"))


def test_a_later_slab_takes_the_place_of_an_earlier_one_and_leaves_none_of_its_parts() -> None:
    objects = FaultyObjects()
    for length in (60, 20):
        slab, history = filled(length)
        size = write_slab(files_of(objects), PATH, ENGINE, slab, history)

    kept, found = read(objects, history, slab)

    assert kept is Kept.SLAB
    assert is_equal(found, slab)
    assert sum(one.size for one in objects.list("sessions/an-id/parts/")) == size


def test_one_that_was_given_up_half_way_leaves_the_one_before_it_as_it_is() -> None:
    objects = FaultyObjects()
    slab, history = filled(30)
    write_slab(files_of(objects), PATH, ENGINE, slab, history)
    writer = SlabWriter(files_of(objects), PATH, ENGINE, *filled(60))
    for _ in range(6):
        assert writer.step()
    writer.close()

    kept, found = read(objects, history, slab)

    assert kept is Kept.SLAB
    assert is_equal(found, slab)


@pytest.mark.parametrize("seed", range(20))
def test_of_two_who_write_at_once_one_is_whole_or_there_is_none(seed: int) -> None:
    objects, chance = FaultyObjects(), random.Random(seed)
    both = [filled(60), filled(50)]
    writers = [SlabWriter(files_of(objects), PATH, ENGINE, *one) for one in both]
    while writers:
        writer = chance.choice(writers)
        if not writer.step():
            writer.finish()
            writer.close()
            writers.remove(writer)

    found = [read(objects, history, slab) for slab, history in both]

    assert all(
        kept is not Kept.SLAB or is_equal(back, slab) for (kept, back), (slab, _) in zip(found, both, strict=True)
    )


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("after", range(4))
def test_a_slab_that_could_not_be_written_is_none_and_costs_the_one_before_it_nothing(fault: Fault, after: int) -> None:
    objects = FaultyObjects()
    slab, history = filled(30)
    write_slab(files_of(objects), PATH, ENGINE, slab, history)
    puts = iter(range(10_000))
    objects.fault = lambda name, key: fault if name == "put" and next(puts) == after else None
    with pytest.raises(Exception, match="does not answer"):
        write_slab(files_of(objects), PATH, ENGINE, *filled(60))
    objects.heal()

    kept, found = read(objects, history, slab)

    assert kept is Kept.SLAB
    assert is_equal(found, slab)


@pytest.mark.parametrize(
    "damage", ["part gone", "part cut", "part changed", "names gone", "names changed", "other engine"]
)
def test_what_is_not_whole_is_read_again(damage: str) -> None:
    objects = FaultyObjects()
    slab, history = filled(60)
    write_slab(files_of(objects), PATH, OTHER_ENGINE if damage == "other engine" else ENGINE, slab, history)
    part = objects.list("sessions/an-id/parts/")[3].key
    content = objects.read(part)
    match damage:
        case "part gone":
            objects.delete([part])
        case "part cut":
            objects.put(part, content[:-1])
        case "part changed":
            objects.put(part, bytes([content[0] ^ 1]) + content[1:])
        case "names gone":
            objects.delete([PATH.as_posix()])
        case "names changed":
            objects.put(PATH.as_posix(), b"{}")

    kept, found = read(objects, history, slab)

    expected = {"part gone": Kept.NOTHING, "names gone": Kept.NOTHING, "other engine": Kept.OTHER_ENGINE}
    assert kept is expected.get(damage, Kept.DAMAGED)
    assert found.frontier == 0
