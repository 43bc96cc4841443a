"""The slab: where tokens lie, which of them a query sees, and who holds it."""

from array import array
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.torch_slab import SlabArena, TorchSlab, as_torch, torch_pool
from runtime.errors import CapacityExhausted
from runtime.slab import Slab, SlabPool, as_held, visible_slots
from runtime.slab_spec import BUCKET_SLOTS, CHUNK, RecurrentSpec, SlabSpec
from tests.reference.window import positions_seen


def spec_of(
    sink: int, window: int, row_tile: int, *, layers: int = 1, kv_heads: int = 1, head_dim: int = 1
) -> SlabSpec:
    return SlabSpec(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        sink=sink,
        window=window,
        row_tile=row_tile,
        dtype="float32",
    )


SPECS = st.builds(spec_of, st.integers(0, 9), st.integers(1, 40), st.integers(1, 16))
LONG_SPECS = st.builds(spec_of, st.integers(0, 9), st.integers(1, 1200), st.integers(1, 32))


@st.composite
def tiles(draw: st.DrawFn) -> tuple[SlabSpec, list[tuple[int, int]]]:
    """A spec and writes (start, length) of at most a tile, some of which go back and rewrite what a tile wrote."""
    spec = draw(SPECS)
    written: list[tuple[int, int]] = []
    frontier = 0
    for _ in range(draw(st.integers(1, 30))):
        start = frontier - draw(st.integers(0, min(frontier, spec.row_tile)))
        length = draw(st.integers(1, spec.row_tile))
        written.append((start, length))
        frontier = max(frontier, start + length)
    return spec, written


def seen_by(spec: SlabSpec, position: int, held: dict[int, int]) -> list[int | None]:
    """The positions that lie in the slots that a query at `position` attends to."""
    extent = spec.extent(position)
    visible = visible_slots(spec, torch.tensor([position]), extent)[0]
    return [held.get(slot) for slot in visible.nonzero().flatten().tolist()]


@settings(max_examples=150)
@given(tiles())
def test_a_query_sees_the_sink_and_the_window_and_nothing_else_whatever_was_written_when(
    spec_and_tiles: tuple[SlabSpec, list[tuple[int, int]]],
) -> None:
    spec, written = spec_and_tiles
    held: dict[int, int] = {}
    for start, length in written:
        tile = range(start, start + length)
        # A forward writes all of its rows, and only then do they attend.
        held |= {spec.slot(position): position for position in tile}
        for position in tile:
            assert sorted(seen_by(spec, position, held), key=repr) == sorted(
                positions_seen(position, spec.sink, spec.window), key=repr
            )


@settings(max_examples=100)
@given(SPECS, st.integers(0, 300), st.integers(1, 60))
def test_a_layer_with_a_window_of_its_own_sees_of_that_what_is_nearer(
    spec: SlabSpec, position: int, own_window: int
) -> None:
    held = {spec.slot(before): before for before in range(position + 1)}
    visible = visible_slots(spec, torch.tensor([position]), spec.extent(position), own_window)[0]

    seen = {held[slot] for slot in visible.nonzero().flatten().tolist()}

    assert seen == positions_seen(position, spec.sink, spec.window, own_window)
    if position >= spec.visible:
        lasting = spec.lasting_sinks(own_window)
        assert {one for one in seen if one < spec.sink} == set(range(lasting.start, lasting.stop))


@settings(max_examples=100)
@given(SPECS, st.integers(0, 10**12))
def test_a_query_sees_as_many_slots_far_out_as_the_window_has(spec: SlabSpec, beyond: int) -> None:
    position = spec.visible + beyond

    visible = visible_slots(spec, torch.tensor([position]), spec.extent(position))

    expected = {spec.slot(seen) for seen in range(spec.sink)}
    expected |= {spec.slot(seen) for seen in range(position - spec.window + 1, position + 1)}
    assert set(visible[0].nonzero().flatten().tolist()) == expected


@settings(max_examples=100)
@given(LONG_SPECS, st.integers(0, 5_000))
def test_an_extent_holds_all_that_is_visible_in_whole_buckets(spec: SlabSpec, position: int) -> None:
    extent = spec.extent(position)

    assert max(spec.slot(seen) for seen in positions_seen(position, spec.sink, spec.window)) < extent
    assert extent % BUCKET_SLOTS == 0 or extent == spec.slots


@settings(max_examples=100)
@given(LONG_SPECS, st.integers(0, 5_000))
def test_an_extent_never_shrinks_and_never_exceeds_the_slab(spec: SlabSpec, position: int) -> None:
    assert spec.extent(position) <= spec.extent(position + 1) <= spec.slots


@settings(max_examples=100)
@given(SPECS, st.integers(0, 10_000))
def test_the_tokens_of_a_tile_and_of_its_windows_lie_in_slots_of_their_own(spec: SlabSpec, start: int) -> None:
    tile = range(start, start + spec.row_tile)
    needed = set(tile).union(*(positions_seen(position, spec.sink, spec.window) for position in tile))

    assert len({spec.slot(position) for position in needed}) == len(needed)
    assert all(0 <= spec.slot(position) < spec.slots for position in needed)


def test_short_histories_cost_one_bucket_of_a_long_window() -> None:
    spec = spec_of(4, 4092, 32)

    assert [spec.extent(position) for position in (0, 255, 256, 511, 512)] == [256, 256, 512, 512, 768]


def test_a_smaller_bucket_lets_short_histories_cost_less() -> None:
    spec = replace(spec_of(4, 4092, 32), bucket=64)

    assert [spec.extent(position) for position in (0, 63, 64, 255, 256, 10**6)] == [64, 64, 128, 256, 320, spec.slots]


def test_the_ceiling_counts_keys_and_values_of_every_slot_in_every_layer() -> None:
    spec = spec_of(4, 60, 32, layers=3, kv_heads=2, head_dim=5)
    pool = torch_pool(spec, 1)

    slab = as_torch(pool.acquire())

    assert spec.ceiling_bytes == slab.keys.nbytes + slab.values.nbytes


def recurrent_slab(state: tuple[int, ...] = (2, 4, 4), row_tile: int = 32) -> TorchSlab:
    spec = replace(spec_of(2, 50, row_tile), recurrent=RecurrentSpec(layers=3, columns=5, reach=3, state=state))
    return as_torch(torch_pool(spec, 2).acquire())


@pytest.mark.parametrize("state", [(), (2, 4, 4)])
def test_the_ceiling_counts_what_recurrent_layers_keep_whatever_the_length(state: tuple[int, ...]) -> None:
    slab = recurrent_slab(state)
    spec = slab.spec

    kept = sum(one.nbytes for one in slab.recurrent_tensors())

    assert spec.kept_bytes == kept > 0
    assert spec.ceiling_bytes == slab.keys.nbytes + slab.values.nbytes + kept
    assert slab.live_bytes == 0
    slab.advance_all(1)
    assert slab.live_bytes == spec.token_bytes + kept


@settings(max_examples=50)
@given(st.integers(1, 40), st.data())
def test_a_recurrent_layer_finds_all_that_a_tile_may_need_whatever_was_taken_back(
    row_tile: int, data: st.DataObject
) -> None:
    slab = recurrent_slab(row_tile=row_tile)
    reach, frontier = 3, 0
    given: dict[int, float] = {}
    for value in range(20):
        start = frontier - data.draw(st.integers(0, min(frontier, row_tile - 1)))
        stop = start + data.draw(st.integers(1, row_tile))
        slab.write_inputs(1, torch.full((stop - start, 5), float(value)), start)
        given |= dict.fromkeys(range(start, stop), float(value))
        first = start // CHUNK * CHUNK
        for chunk in range(first // CHUNK, stop // CHUNK + 1):
            if start < chunk * CHUNK <= stop:
                slab.state(1, chunk).fill_(chunk)

        taken = slab.read_inputs(1, first - reach, stop)

        assert taken[:, 0].tolist() == [given.get(position, 0.0) for position in range(first - reach, stop)]
        assert not first or (slab.state(1, first // CHUNK) == first // CHUNK).all()
        frontier = max(frontier, stop)


@settings(max_examples=200)
@given(SPECS, st.booleans(), st.integers(1, 300), st.integers(0, 300))
def test_a_slab_that_says_it_is_whole_holds_all_that_the_next_token_needs(
    spec: SlabSpec, is_recurrent: bool, written: int, frontier: int
) -> None:
    if is_recurrent:
        spec = replace(spec, recurrent=RecurrentSpec(layers=1, columns=1, reach=3, state=(1, 1, 1)))
    frontier = min(frontier, written)
    if not spec.is_whole(written, frontier):
        assert frontier < written - spec.row_tile + 1
        return

    held = {spec.slot(position): position for position in range(written)}
    assert all(held[spec.slot(one)] == one for one in positions_seen(frontier, spec.sink, spec.window) - {frontier})
    if is_recurrent:
        chunk = frontier // CHUNK
        given = {position % spec.inputs: position for position in range(written)}
        states = {one % spec.states: one for one in range(1, written // CHUNK + 1)}
        assert all(given[one % spec.inputs] == one for one in range(max(0, chunk * CHUNK - 3), frontier))
        assert not chunk or states[chunk % spec.states] == chunk


def test_a_slab_that_went_back_knows_what_was_written_over_before() -> None:
    """Tokens that were taken back lie in the slots of older ones, which a second step back would need."""
    spec = spec_of(2, 40, 20)
    pool = torch_pool(spec, 2)
    slab, fork = pool.acquire(), pool.acquire()
    slab.advance_all(200)
    slab.retract(182)

    fork.copy_from(slab)

    assert spec.is_whole(182, 170)
    assert not slab.is_whole(170)
    assert not fork.is_whole(170)
    slab.clear()
    slab.advance_all(182)
    assert slab.is_whole(170)


def test_a_fork_has_what_recurrent_layers_keep_and_a_skip_forgets_it() -> None:
    slab, fork = recurrent_slab(), recurrent_slab()
    for one in slab.recurrent_tensors():
        one.normal_()

    fork.copy_from(slab)
    assert all(torch.equal(*pair) for pair in zip(fork.recurrent_tensors(), slab.recurrent_tensors(), strict=True))

    fork.skip(1_000)
    assert not any(one.any() for one in fork.recurrent_tensors())
    assert set(fork.frontiers) == {1_000}


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_a_row_of_8_bits_is_off_by_half_a_step_of_its_own_scale(seed: int, size: float) -> None:
    rows = size * torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(seed))
    rows[0] = 0

    held = as_held(rows, "int8")

    assert held.shape == (3, 2, replace(spec_of(1, 1, 1, head_dim=40), dtype="int8").width)
    scales = held[..., 40:].contiguous().view(torch.float32)
    assert torch.all((held[..., :40] * scales - rows).abs() <= 0.501 * scales)
    torch.testing.assert_close(127 * scales, rows.abs().amax(dim=-1, keepdim=True))


def written(slab: Slab, layer: int, start: int, count: int, value: float = 1.0) -> None:
    spec = slab.spec
    slots = torch.tensor([spec.slot(position) for position in range(start, start + count)])
    rows = torch.full((spec.kv_heads, count, spec.head_dim), value)
    as_torch(slab).write(layer, slots, start + count, rows, -rows)


def test_a_write_lands_in_its_slots_of_its_layer_and_nowhere_else() -> None:
    spec = spec_of(2, 5, 3, layers=2, kv_heads=2, head_dim=4)
    slab = as_torch(torch_pool(spec, 1).acquire())

    written(slab, layer=1, start=8, count=3, value=7.0)

    expected = torch.zeros_like(slab.keys)
    expected[1, :, [spec.slot(8), spec.slot(9), spec.slot(10)]] = 7.0
    assert torch.equal(slab.keys, expected)
    assert torch.equal(slab.values, -expected)


def test_the_live_length_is_that_of_the_layer_that_has_fewest() -> None:
    slab = as_torch(torch_pool(spec_of(2, 50, 8, layers=2), 1).acquire())

    written(slab, layer=0, start=0, count=8)
    written(slab, layer=1, start=0, count=5)

    assert (slab.frontiers, slab.live_length) == ((8, 5), 5)


def test_a_rewritten_position_takes_no_more_room() -> None:
    slab = as_torch(torch_pool(spec_of(2, 50, 8), 1).acquire())
    written(slab, layer=0, start=0, count=8)

    written(slab, layer=0, start=4, count=2)

    assert (slab.frontiers, slab.live_length) == ((8,), 8)


def test_the_live_length_stops_at_sink_and_window() -> None:
    spec = spec_of(2, 10, 8)
    slab = as_torch(torch_pool(spec, 1).acquire())

    for start in range(0, 80, 8):
        written(slab, layer=0, start=start, count=8)

    assert (slab.live_length, slab.live_bytes) == (12, 12 * spec.token_bytes)


def test_a_cleared_slab_holds_no_token() -> None:
    slab = as_torch(torch_pool(spec_of(2, 10, 8), 1).acquire())
    written(slab, layer=0, start=0, count=8)

    slab.clear()

    assert (slab.frontiers, slab.live_length, slab.live_bytes) == ((0,), 0, 0)


@settings(max_examples=200)
@given(SPECS, st.integers(0, 200), st.floats(0, 1))
def test_what_the_next_session_does_not_keep_reads_as_zeros(spec: SlabSpec, length: int, share: float) -> None:
    slab = as_torch(torch_pool(spec, 1).acquire())
    held: dict[int, int] = {}
    for position in range(length):
        written(slab, layer=0, start=position, count=1, value=float(position + 1))
        held[spec.slot(position)] = position
    possible = [0, *(kept for kept in range(1, length + 1) if slab.is_whole(kept))]
    kept = possible[int(share * (len(possible) - 1))]

    if kept:
        slab.keep(kept)
    else:
        slab.clear()

    assert slab.frontier == kept
    expected = torch.zeros(spec.slots)
    for slot, position in held.items():
        expected[slot] = position + 1 if position < kept else 0
    assert torch.equal(slab.keys[0, 0, :, 0], expected)
    assert torch.equal(slab.values[0, 0, :, 0], -expected)


def test_a_slab_whose_attention_reads_no_hidden_slot_costs_nothing_to_empty() -> None:
    slab = as_torch(SlabArena(spec_of(2, 10, 8), 1, are_wiped=False).pool(1).acquire())
    written(slab, layer=0, start=0, count=8)

    slab.clear()

    assert slab.keys.any()


@settings(max_examples=100)
@given(st.integers(1, 5), st.lists(st.one_of(st.just("acquire"), st.integers(0, 4)), max_size=40))
def test_a_pool_lends_each_slab_to_one_at_a_time_and_refuses_when_none_is_free(
    total: int, steps: list[str | int]
) -> None:
    pool = torch_pool(spec_of(1, 4, 4), total)
    lent: list[Slab] = []

    for step in steps:
        if step == "acquire" and len(lent) < total:
            slab = pool.acquire()
            assert all(slab is not other for other in lent)
            assert slab.live_length == 0
            written(slab, layer=0, start=0, count=3)
            lent.append(slab)
        elif step == "acquire":
            with pytest.raises(CapacityExhausted, match=f"all {total} slabs"):
                pool.acquire()
        elif isinstance(step, int) and step < len(lent):
            pool.release(lent.pop(step))
        assert (pool.in_use, pool.total) == (len(lent), total)


def test_slabs_of_a_pool_share_no_slot() -> None:
    pool = torch_pool(spec_of(1, 4, 4, layers=2, kv_heads=2, head_dim=3), 3)
    slabs = list(acquired(pool))

    for number, slab in enumerate(slabs):
        slab.keys.fill_(number)
        slab.values.fill_(-number)

    assert [slab.keys.unique().tolist() for slab in slabs] == [[0], [1], [2]]
    assert [slab.values.unique().tolist() for slab in slabs] == [[0], [-1], [-2]]


def acquired(pool: SlabPool) -> Iterator[TorchSlab]:
    while pool.in_use < pool.total:
        yield as_torch(pool.acquire())


def test_memory_is_taken_as_tokens_arrive_and_not_before() -> None:
    spec = spec_of(4, 4092, 32, layers=16, kv_heads=8, head_dim=64)
    before = psutil.Process().memory_info().rss

    pool = torch_pool(spec, 4)
    written(pool.acquire(), layer=0, start=0, count=32)

    assert psutil.Process().memory_info().rss - before < spec.ceiling_bytes // 4


def test_a_pool_gives_up_no_long_history_for_a_short_beginning_that_another_shares() -> None:
    pool = torch_pool(spec_of(1, 64, 4), 2)
    slab = pool.acquire()
    written(slab, layer=0, start=0, count=40)
    pool.release(slab, array("I", range(40)))

    other = pool.acquire(array("I", [*range(5), 99]))
    again = pool.acquire(array("I", range(40)))

    assert (other is not slab, other.frontier) == (True, 0)
    assert (again is slab, again.frontier) == (True, 40)


@settings(max_examples=200)
@given(SPECS, st.integers(0, 150), st.data())
def test_a_slab_is_whole_where_nothing_that_the_next_token_sees_was_written_over(
    spec: SlabSpec, written: int, data: st.DataObject
) -> None:
    frontier = data.draw(st.integers(0, written))
    held = {spec.slot(position): position for position in range(written)}
    # The token at the frontier is written before it attends.
    held[spec.slot(frontier)] = frontier

    seen = positions_seen(frontier, spec.sink, spec.window)
    is_there = all(held[spec.slot(position)] == position for position in seen)

    assert is_there or not spec.is_whole(written, frontier)
    # Of nothing but the sinks and itself a token may be told to read again.
    if spec.window > 1 and frontier > spec.sink:
        assert spec.is_whole(written, frontier) == is_there
