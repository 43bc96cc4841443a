"""Rows and row batches: what one forward of the model works on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from runtime.sampling import Draw
from runtime.slab import Slab


@dataclass(frozen=True, slots=True)
class Row:
    """One token of one session at one position. With `draw`, the token that follows is drawn too."""

    slab: Slab
    position: int
    token_id: int
    draw: Draw | None = None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive rows of a batch that attend over the same extent of the same slab."""

    slab: Slab
    start: int
    stop: int
    extent: int
    is_past_window: bool


@dataclass(frozen=True, slots=True)
class RowBatch:
    """The rows of one forward. Rows of one slab are adjacent and in order of position."""

    rows: tuple[Row, ...]

    def stretches(self) -> tuple[Stretch, ...]:
        """The batch, cut wherever the slab, the extent or the side of the window's edge changes."""

        def kind(numbered: tuple[int, Row]) -> tuple[int, int, bool]:
            row = numbered[1]
            spec = row.slab.spec
            return id(row.slab), spec.extent(row.position), row.position >= spec.visible

        stretches = []
        for (_, extent, is_past_window), group in groupby(enumerate(self.rows), key=kind):
            members = list(group)
            first, last = members[0], members[-1]
            stretches.append(Stretch(first[1].slab, first[0], last[0] + 1, extent, is_past_window))
        return tuple(stretches)
