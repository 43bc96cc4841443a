"""Draws tokens from an engine's logits."""

from __future__ import annotations

from torch import Tensor

from runtime.events import Token
from runtime.rows import RowBatch
from runtime.sampling import draw_token


def draw_tokens(logits: Tensor, batch: RowBatch) -> tuple[Token, ...]:
    """The tokens drawn from `logits` [rows, vocabulary] float32, those of the batch's rows with `draw`, in row order."""
    drawing = [(row.draw, row.position) for row in batch.rows if row.draw is not None]
    return tuple(draw_token(line, draw, position + 1) for (draw, position), line in zip(drawing, logits, strict=True))
