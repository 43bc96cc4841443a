"""Ways to bring a history into slabs, for tests of what comes out."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import count, repeat
from pathlib import Path
from typing import Any, Protocol, cast

import pytest
import torch
from torch import Tensor

from runtime.engine import Engine, findings, load_engine, openvino_engine
from runtime.engine.graph_engine import GraphEngine
from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.settings import Settings
from runtime.slab import Slab

GREEDY = Draw(Sampling())
BACKENDS = ("torch", "mlx", "openvino")
# With the double of the CUDA engine, which no setting chooses.
ENGINES = (*BACKENDS, "step")
# An engine of one step has all of its slabs from the start.
MOST_SLABS = 24


class LogitsEngine(Engine, Protocol):
    """An engine that shows what its rows come to before tokens are drawn."""

    def logits(self, batch: RowBatch) -> Tensor: ...


Load = Callable[..., LogitsEngine]


@cache
def load(
    directory: Path,
    dtype: str = "float32",
    *,
    sink: int = 4,
    window: int = 4092,
    determinism: str = "strict",
    weights: str = "none",
    backend: str = "torch",
    kv_dtype: str = "auto",
    is_probed: bool = False,
) -> LogitsEngine:
    """The engine of a model, loaded once for all tests that ask for the same.

    Unless it `is_probed`, what a load would try takes no time: it holds, as tests of exactness and of probes show.
    """
    settings = Settings(
        dtype=dtype,
        device="auto" if backend == "mlx" else "cpu",
        sink=sink,
        window=window,
        determinism=determinism,
        weights=weights,
        backend="torch" if backend == "step" else backend,
        kv_dtype=kv_dtype,
        capacity=MOST_SLABS,
    )
    # The CUDA engine's double: the same step, which nothing captures.
    load_double = partial(GraphEngine.load, device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if not is_probed:
            patch.setattr(findings, "find_or_probe", lambda subject, probe: True)
        engine: Any = (load_double if backend == "step" else load_engine)(settings, directory)
    return cast(LogitsEngine, engine)


def random_tokens(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    choice = random.Random(seed)
    return [choice.randrange(vocabulary) for _ in range(length)]


def random_cut(longest: int, seed: int = 0) -> Iterator[int]:
    choice = random.Random(seed)
    return (choice.randint(1, longest) for _ in count())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on so many threads: kernels share out their work by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class BusyNeighbours:
    """Sessions at work beside the one under test: each has rows in every forward, one or several, before or behind."""

    def __init__(self, engine: LogitsEngine, sessions: int, seed: int = 0) -> None:
        pool = engine.new_pool(sessions)
        self._vocabulary = engine.facts.vocabulary
        self._tile = engine.facts.row_tile
        self._choice = random.Random(seed)
        # They are at different places: inside the window, at its edge and past it.
        spec = engine.facts.slab
        self._slabs = {pool.acquire(): index * spec.slots // 2 for index in range(sessions)}

    def __len__(self) -> int:
        return len(self._slabs)

    def join(self, rows: tuple[Row, ...]) -> RowBatch:
        """A batch of `rows` and the neighbours' next ones, no more than a tile."""
        room = self._tile - len(rows) - len(self._slabs)
        assert room >= 0
        groups = [rows]
        for slab, position in self._slabs.items():
            length = 1 + self._choice.randint(0, min(room, 5))
            room -= length - 1
            groups.append(
                tuple(
                    Row(slab, position + offset, self._choice.randrange(self._vocabulary), GREEDY)
                    for offset in range(length)
                )
            )
            self._slabs[slab] += length
        self._choice.shuffle(groups)
        return RowBatch(tuple(row for group in groups for row in group))


def batches(
    slab: Slab,
    tokens: Sequence[int],
    cuts: Iterable[int],
    start: int = 0,
    neighbours: BusyNeighbours | None = None,
    draw: Draw = GREEDY,
) -> Iterator[RowBatch]:
    """Forwards that bring `tokens` into `slab` from position `start` on, cut by `cuts`; every row draws."""
    at = 0
    for length in cuts:
        if at == len(tokens):
            return
        rows = tuple(
            Row(slab, start + at + offset, token, draw) for offset, token in enumerate(tokens[at : at + length])
        )
        yield neighbours.join(rows) if neighbours else RowBatch(rows)
        at += len(rows)


def feed(
    engine: LogitsEngine,
    slab: Slab,
    tokens: Sequence[int],
    cuts: Iterable[int] | None = None,
    start: int = 0,
    neighbours: BusyNeighbours | None = None,
) -> Tensor:
    """Logits [tokens, vocabulary] of the history fed; in forwards as large as they can be unless `cuts` are given."""
    whole = repeat(engine.facts.row_tile)
    logits = []
    for batch in batches(slab, tokens, cuts or whole, start, neighbours):
        mine = [index for index, row in enumerate(batch.rows) if row.slab is slab]
        logits.append(engine.logits(batch)[mine])
    return torch.cat(logits)


def without_products_of_bytes(patch: pytest.MonkeyPatch) -> None:
    """As on a CPU whose instructions OpenVINO multiplies only floats with."""
    patch.setattr(openvino_engine, "sums_bytes", lambda: False)
