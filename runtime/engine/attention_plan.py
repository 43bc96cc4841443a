"""What a forward computes once for the attention of all layers: into which slots rows are written, and which slots they see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.engine.architectures import LayerKind
from runtime.engine.rotary import ExactRotary
from runtime.engine.torch_slab import SlabStore, as_torch
from runtime.rows import RowBatch, Stretch
from runtime.slab import visible_slots
from runtime.slab_spec import SlabSpec

_LINE_BYTES = 64
# A block of fewer queries would not be faster for a single row.
_LEAST_QUERIES = 4
# If a block has a multiple of this many queries, each thread's share of flash attention's buffers is a whole number of
# lines.
_QUERY_STEP = 8


@dataclass(frozen=True, slots=True)
class StretchPlan:
    """The positions of one stretch, from `begin` to `end` (exclusive), and the slots for its keys and values."""

    stretch: Stretch
    begin: int
    end: int
    slots: Tensor  # [N]


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks for one call of attention: all of one stretch, or one each of stretches whose slabs lie side by side."""

    store: SlabStore
    slabs: slice
    extent: int
    blocks: int
    queries: slice  # a range of the forward's queries, block after block
    # [1 or G, blocks, M, extent], 0 where a query sees a slot, else -inf. Past the window each layer writes into its first
    # columns what brings the sinks within reach. Keyed by the layers' own windows.
    hidden: Mapping[int | None, Tensor]
    is_past_window: bool


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """The stretches and stacks of a forward, and the parts of the plan that all of its queries share."""

    stretches: tuple[StretchPlan, ...]
    stacks: tuple[Stack, ...]
    rows: Tensor  # [queries]: the batch's row for each query
    places: Tensor  # [rows]: a query for each of the batch's rows
    kinds: tuple[LayerKind, ...]
    # Cosines and sines [queries, D] that turn a query to within the window's distance of the sinks, by the name of the
    # rotary embedding.
    sink_turns: Mapping[str | None, tuple[Tensor, Tensor]]
    # The sinks that a query past the window sees, keyed by the layers' own windows.
    lasting_sinks: Mapping[int | None, slice]


def block_shape(spec: SlabSpec, heads: int, threads: int) -> tuple[int, int]:
    """The rows R of a block, and its queries M: those of all Q heads of a group, and padding.

    Blocks are given to threads head by head, so if threads can share the heads evenly, all blocks of a head go to one
    thread.
    """
    heads_a_group = heads // spec.kv_heads
    rows = max(1, _LEAST_QUERIES // heads_a_group)
    block_bytes = rows * heads_a_group * spec.head_dim * spec.item_bytes
    if spec.kv_heads % threads == 0 and block_bytes % _LINE_BYTES == 0:
        return rows, rows * heads_a_group
    rows = max(1, _QUERY_STEP // heads_a_group)
    return rows, -(-rows * heads_a_group // _QUERY_STEP) * _QUERY_STEP


def plan_forward(
    batch: RowBatch, rotaries: Mapping[str, ExactRotary], heads: int, kinds: tuple[LayerKind, ...]
) -> ForwardPlan:
    """The plan of a batch, for a model of that many query `heads` with layers of these `kinds`."""
    stretches = batch.stretches()
    spec = batch.rows[0].slab.spec
    keys = as_torch(batch.rows[0].slab).store.keys
    size, queries = block_shape(spec, heads, torch.get_num_threads())
    positions = torch.tensor([row.position for row in batch.rows], device=keys.device)
    # Devices other than CPUs only take a mask of the queries' type.
    dtype = torch.float32 if keys.device.type == "cpu" else keys.dtype
    extent = max(stretch.extent for stretch in stretches)
    hidden = {
        window: torch.zeros(len(positions), extent, dtype=dtype, device=keys.device).masked_fill_(
            ~visible_slots(spec, positions, extent, window), float("-inf")
        )
        for window in {kind.window for kind in kinds}
    }
    row_of: list[int] = []
    place_of = [0] * len(batch.rows)
    stacks = []
    for members in _group_stretches(stretches, size):
        begin, first, lead = len(row_of), members[0], as_torch(members[0].slab)
        for stretch in members:
            count = stretch.stop - stretch.start
            place_of[stretch.start : stretch.stop] = range(len(row_of), len(row_of) + count)
            row_of += [*range(stretch.start, stretch.stop), *[stretch.stop - 1] * (-count % size)]
        if spec.kv_heads == 1 and len(row_of) - begin == size:
            # A call for a single block would run outside torch's threads, and the matrix product inside it would start
            # threads of its own.
            row_of += [row_of[-1]] * size
        blocks = (len(row_of) - begin) // size
        of_each_head = spec.kv_heads if first.is_past_window and spec.sink else 1
        shape = (of_each_head, blocks, heads // spec.kv_heads, size, first.extent)
        stacks.append(
            Stack(
                store=lead.store,
                slabs=slice(lead.index, lead.index + len(members)),
                extent=first.extent,
                blocks=blocks,
                queries=slice(begin, len(row_of)),
                hidden={
                    window: _in_blocks(of_all[row_of[begin:]], shape, queries) for window, of_all in hidden.items()
                },
                is_past_window=first.is_past_window,
            )
        )
    rows = torch.tensor(row_of, device=keys.device)
    slots = torch.tensor([spec.slot(row.position) for row in batch.rows], device=keys.device)
    sink_turns: dict[str | None, tuple[Tensor, Tensor]] = {}
    if spec.sink and any(stretch.is_past_window for stretch in stretches):
        too_far = (spec.visible - 1 - positions.index_select(0, rows)).clamp(max=0)
        for name, rotary in rotaries.items():
            cosines, sines = rotary.turn(too_far)
            sink_turns[name] = cosines.float(), sines.float()
    return ForwardPlan(
        stretches=tuple(
            StretchPlan(
                stretch,
                batch.rows[stretch.start].position,
                batch.rows[stretch.stop - 1].position + 1,
                slots[stretch.start : stretch.stop],
            )
            for stretch in stretches
        ),
        stacks=tuple(stacks),
        rows=rows,
        places=torch.tensor(place_of, device=keys.device),
        kinds=kinds,
        sink_turns=sink_turns,
        lasting_sinks={window: spec.lasting_sinks(window) for window in hidden},
    )


def _in_blocks(hidden: Tensor, shape: tuple[int, int, int, int, int], queries: int) -> Tensor:
    """The mask `hidden` [queries, slots] as [1 or G, blocks, M, extent], for a `shape` [1 or G, blocks, Q, R, extent]."""
    _, blocks, _, size, extent = shape
    of_each_head = hidden[:, :extent].view(1, blocks, 1, size, extent).expand(shape)
    return pad_rows(of_each_head.flatten(2, 3), queries).contiguous()


def pad_rows(blocks: Tensor, queries: int) -> Tensor:
    """Blocks [..., rows, columns] with rows of zeros appended, up to `queries` rows."""
    missing = queries - blocks.shape[-2]
    return nn.functional.pad(blocks, (0, 0, 0, missing)) if missing else blocks


def _group_stretches(stretches: tuple[Stretch, ...], size: int) -> list[list[Stretch]]:
    """Groups stretches for stacks.

    Stretches of one block form runs whose slabs follow each other in one store, with the same extent and on the same side of
    the window's edge; each longer stretch is alone.
    """

    def kind(stretch: Stretch) -> tuple[int, int, bool]:
        return id(as_torch(stretch.slab).store), stretch.extent, stretch.is_past_window

    runs: list[list[Stretch]] = []
    for stretch in sorted(stretches, key=lambda stretch: (*kind(stretch), as_torch(stretch.slab).index)):
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and kind(before) == kind(stretch)
            and as_torch(before.slab).index + 1 == as_torch(stretch.slab).index
            and max(before.stop - before.start, stretch.stop - stretch.start) <= size
        ):
            runs[-1].append(stretch)
        else:
            runs.append([stretch])
    return runs
