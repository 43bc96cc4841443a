"""How an engine holds the matrices of a GGUF file, with a report of what became of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from runtime.dtypes import name_of
from runtime.engine.blocks import Blocks, unpack
from runtime.engine.openvino_fit import GROUP
from runtime.gguf_file import StoredTensor

Matrix = Blocks | Tensor


def matrix_of(stored: StoredTensor, tally: Tally) -> Matrix:
    """The matrix as Blocks, or in the file's own type if it is not quantised; `tally` counts it.

    Kinds that have no form here are rounded to 8 bits.
    """
    plain = stored.plain()
    matrix = unpack(stored) if plain is None else plain
    error = 0.0
    if matrix is None:
        weights = stored.dense()
        matrix = Blocks(*quantise(weights, "int8"), offsets=None, bits=8)
        error = float((matrix.dense(torch.float32) - weights).abs().max() / weights.abs().max().clamp(min=1e-30))
    tally.add(stored, form_of(matrix), matrix.nbytes, error)
    return matrix


def form_of(matrix: Matrix) -> str:
    """The form in which a matrix is held, in words. Matrices of one form can be joined."""
    if isinstance(matrix, Tensor):
        return name_of(matrix.dtype)
    offsets = "" if matrix.offsets is None else " and an offset"
    scales = name_of(matrix.scales.dtype)
    return f"{matrix.bits} bits with a scale in {scales}{offsets} for each {matrix.group}"


def join(first: Matrix, second: Matrix) -> Matrix:
    """Two matrices of one form as one, with the outputs of both."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        assert isinstance(first, Tensor)
        assert isinstance(second, Tensor)
        return torch.cat((first, second))
    offsets = None
    if first.offsets is not None and second.offsets is not None:
        offsets = torch.cat((first.offsets, second.offsets))
    return Blocks(torch.cat((first.steps, second.steps)), torch.cat((first.scales, second.scales)), offsets, first.bits)


@dataclass(slots=True)
class _Became:
    """The matrices of one kind: their number, their bytes in the file and here, and the largest error."""

    form: str
    count: int = 0
    stored_bytes: int = 0
    held_bytes: int = 0
    error: float = 0.0


class Tally:
    """Counts what becomes of each kind of tensor."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[GGMLQuantizationType, str], _Became] = {}

    def add(self, stored: StoredTensor, form: str, held_bytes: int, error: float = 0.0) -> None:
        """`error` is the largest change of a value, as a share of the matrix's largest value."""
        became = self._kinds.setdefault((stored.kind, form), _Became(form))
        became.count += 1
        became.stored_bytes += stored.nbytes
        became.held_bytes += held_bytes
        became.error = max(became.error, error)

    def add_all(self, other: Tally) -> None:
        """What another has counted too."""
        for key, one in other._kinds.items():
            became = self._kinds.setdefault(key, _Became(one.form))
            became.count += one.count
            became.stored_bytes += one.stored_bytes
            became.held_bytes += one.held_bytes
            became.error = max(became.error, one.error)

    def lines(self) -> tuple[str, ...]:
        """A line for each kind."""
        return tuple(
            f"{one.count} of {kind.name}: {one.form}, {one.held_bytes / 2**20:.1f} MiB for {one.stored_bytes / 2**20:.1f} in "
            f"the file, {f'moved by at most {one.error:.2%} of the largest' if one.error else 'no value rounded'}"
            for (kind, _), one in self._kinds.items()
        )


def quantise(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Whole numbers [outputs, groups, 32] int8, and the scale [outputs, groups, 1] float16 of each group.

    With 8 bits they reach from -127 to 127. With 4 the value of the largest size is -8, as in Q4_0 of GGUF.
    """
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    if weights == "int8":
        lowest, highest = -127, 127
        scales = groups.abs().amax(dim=2, keepdim=True) / highest
    else:
        lowest, highest = -8, 7
        scales = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)) / lowest
    # Weights are rounded against the scale as stored, so that the scale's own rounding adds no error.
    kept = scales.half()
    steps = torch.where(kept == 0, 0.0, groups / kept.float())
    return steps.round().clamp(lowest, highest).to(torch.int8), kept
