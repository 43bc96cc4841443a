"""How an engine comes from logits to tokens, whatever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from runtime.events import Token
from runtime.rows import RowBatch
from runtime.sampling import drawn


class DrawingEngine(ABC):
    """An engine that has `logits`."""

    @abstractmethod
    def logits(self, batch: RowBatch) -> Tensor:
        """Runs the batch and returns the logits of its rows with `draw`, [rows, vocabulary] float32, in row order."""

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        return self.drawn_from(self.logits(batch), batch)

    def drawn_from(self, logits: Tensor, batch: RowBatch) -> tuple[Token, ...]:
        """The tokens of a batch whose rows with `draw` came to these `logits`."""
        drawing = [(row.draw, row.position) for row in batch.rows if row.draw is not None]
        return tuple(drawn(line, draw, position + 1) for (draw, position), line in zip(drawing, logits, strict=True))
