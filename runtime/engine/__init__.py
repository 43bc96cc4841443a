"""What runs the model. A backend is imported only when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runtime.errors import InvalidSetting
from runtime.events import Token
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool, SlabSpec

__all__ = ["Engine", "EngineFacts", "load_engine"]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What this machine gives for the chosen model: `row_tile` rows a forward, padded to the next of `row_sizes`."""

    backend: str
    device: str
    dtype: str
    architecture: str
    vocabulary: int
    weights_bytes: int
    row_tile: int
    row_sizes: tuple[int, ...]
    is_bit_exact: bool
    slab: SlabSpec


class Engine(Protocol):
    """Runs forwards; it holds weights and no state of any session. One thread at a time may call it."""

    @property
    def facts(self) -> EngineFacts: ...

    def new_pool(self, count: int) -> SlabPool:
        """`count` slabs of this engine's shape."""
        ...

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        """Runs at most `row_tile` rows and returns the tokens drawn, one for each row with `draw`, in row order."""
        ...


def load_engine(settings: Settings, directory: Path, beside: EngineFacts | None = None) -> Engine:
    """The engine of `settings` with the model in `directory`; the memory and threads of one that is `beside` it stay its own.

    Raises InvalidSetting, ModelUnavailable or NotEnoughMemory, each with one line that says what to do.
    """
    if settings.backend == "mlx":
        raise InvalidSetting("backend=mlx is not available in this release: set backend to auto or torch")
    from runtime.engine.torch_engine import TorchEngine

    return TorchEngine.load(settings, directory, beside)
