"""The grounds of strict forwards: why a row's bits cannot depend on the rows beside it.

A kernel chooses its order of sums by the shape of its input, how many threads it has, and where in the input a value
lies. A strict forward calls a kernel only in a way in which none of these reaches a row's bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# torch gives at most this many values to one thread.
_GRAIN = 32_768
# torch's loops take two vectors of 64 bytes at a time; for the remaining values other code runs, which rounds differently.
_LOOP_BYTES = 128


_BY_NAME = (torch.sigmoid, torch.Tensor.sigmoid, nn.functional.silu)


class Ground(StrEnum):
    """Why the rows of a forward do not depend on each other."""

    WHOLE_NUMBERS = "sums of whole numbers, which no order rounds"
    FIXED_ROWS = "one fixed number of rows, always padded and cut to it"
    ROW_BY_ROW = "each row computed by itself, in one order"


@dataclass(frozen=True, slots=True)
class Claim:
    """One part of a forward, the form in which it runs, and the ground of its exactness."""

    part: str
    form: str
    ground: Ground

    def __str__(self) -> str:
        return f"{self.part} ({self.form}): {self.ground}"


def row_by_row(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """An elementwise `function` of `rows` [..., columns], such that a value's bits depend on it and its column alone.

    Functions such as exp round the last values of a loop differently from its vectors, and each thread has a loop of its
    own. So `function` is called with as many rows as one thread takes, or with one row if vectors do not fill it evenly.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    columns = flat.shape[1]
    at_once = max(1, _GRAIN // columns) if columns * rows.itemsize % _LOOP_BYTES == 0 else 1
    if rows.device.type != "cpu" or len(flat) <= at_once:
        return function(rows)
    return torch.cat([function(part) for part in flat.split(at_once)]).view(rows.shape)


class RowByRow(nn.Module):
    """An activation function applied by `row_by_row`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, rows: Tensor) -> Tensor:
        return row_by_row(self.function, rows)


class RowByRowCalls(nn.Module):
    """A module that calls activation functions by name, which here are applied by `row_by_row`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _CallsByRow():
            return self.module(*args, **kwargs)


class _CallsByRow(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = partial(func, **(kwargs or {}))
        return row_by_row(call, *args) if func in _BY_NAME else call(*args)
