"""From logits to tokens, whatever computed them."""

from __future__ import annotations

from torch import Tensor

from runtime.events import Token
from runtime.rows import RowBatch
from runtime.sampling import drawn


def draw_tokens(logits: Tensor, batch: RowBatch) -> tuple[Token, ...]:
    """The tokens of a batch whose rows with `draw` came to these `logits` [rows, vocabulary], float32, in row order."""
    drawing = [(row.draw, row.position) for row in batch.rows if row.draw is not None]
    return tuple(drawn(line, draw, position + 1) for (draw, position), line in zip(drawing, logits, strict=True))
