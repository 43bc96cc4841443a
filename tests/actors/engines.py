"""An engine that obeys the protocol and costs next to nothing, and the runtime around it."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import torch
import trio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from actors import Runtime, SessionHandle
from actors.engine_thread import EngineThread
from actors.proposing import NewProposals
from actors.tree import open_sessions
from runtime import Sampling, Settings, Token
from runtime.durable import SessionStore
from runtime.engine import EngineFacts
from runtime.engine.torch_slab import as_torch, torch_pool
from runtime.metrics import Metrics
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.slab import Slab, SlabPool, visible_slots
from runtime.slab_spec import SlabSpec
from runtime.text import Text

VOCABULARY = 100
_PLAIN = Sampling()
GREEDY = Draw(_PLAIN)

# Tokens that are never drawn. A row that brings one of them makes the engine err in the way that its name says.
SKIPS_A_LAYER, GOES_BACK, BREAKS, BREAKS_BADLY, DRAWS_NOTHING = range(90, 95)

# No test waits this long; without it a test that fails while a forward is held would never end.
_LONGEST_HOLD_S = 250


class Broken(Exception):
    """What an engine raises that met the token BREAKS."""


class BrokenBadly(BaseException):
    """What native code may raise beside every Exception, as panics of Rust do."""


class LedgerEngine:
    """Writes each token with its position into the slab, and draws from all that a query sees there.

    A token is thus a function of the visible history, and tells when a slab holds anything else. `hold` makes forwards
    wait for the test.
    """

    def __init__(self, *, sink: int = 2, window: int = 14, row_tile: int = 8, layers: int = 2) -> None:
        self.spec = SlabSpec(
            layers=layers,
            kv_heads=1,
            head_dim=1,
            sink=sink,
            window=window,
            row_tile=row_tile,
            dtype="float64",
        )
        self.batches: list[RowBatch] = []
        self.threads: set[int] = set()
        self._lock = threading.Lock()
        self._is_held = False
        self._may_go_on = threading.Event()
        self._trio: trio.lowlevel.TrioToken | None = None
        self._begin, self._begun = trio.open_memory_channel[RowBatch](math.inf)

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            backend="ledger",
            device="cpu",
            dtype="float64",
            weights="none",
            form_reason="",
            architecture="ledger",
            vocabulary=VOCABULARY,
            weights_bytes=0,
            row_tile=self.spec.row_tile,
            row_step=1,
            is_bit_exact=True,
            claims=(),
            tried="",
            cpu_features="",
            kernel_class="ledger",
            slab=self.spec,
        )

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self.spec, count)

    def hold(self) -> None:
        """From now on a forward waits, before it does anything, until `end` or `open` is called."""
        with self._lock:
            self._trio = trio.lowlevel.current_trio_token()
            self._is_held = True

    async def begun(self) -> RowBatch:
        """The next forward that was held, once it has begun."""
        return await self._begun.receive()

    def end(self) -> None:
        """Lets the forward that has begun go on."""
        self._may_go_on.set()

    def open(self) -> None:
        """Lets that forward and all that follow go on."""
        with self._lock:
            self._is_held = False
            self._may_go_on.set()

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        assert 0 < len(batch.rows) <= self.spec.row_tile
        self.batches.append(batch)
        self.threads.add(threading.get_ident())
        self._wait_while_held(batch)
        for row in batch.rows:
            self._write(row)
        return tuple(
            Token(self._draw(row.slab, row.position, row.draw.sampling))
            for row in batch.rows
            if row.draw is not None and row.token_id != DRAWS_NOTHING
        )

    def continued(self, history: Sequence[int], count: int, sampling: Sampling = _PLAIN) -> list[int]:
        """The `count` tokens that follow a history, found without slabs: what the actors must come to."""
        tokens = list(history)
        for _ in range(count):
            last = len(tokens) - 1
            seen = [
                (float(position), float(token_id))
                for position, token_id in enumerate(tokens)
                if position < self.spec.sink or position > last - self.spec.window
            ]
            tokens.append(_drawn(seen, sampling))
        return tokens[len(history) :]

    def _wait_while_held(self, batch: RowBatch) -> None:
        with self._lock:
            if not self._is_held:
                return
            # Each forward has its own event: one that was let go on is not caught by the next `hold`.
            may_go_on = self._may_go_on = threading.Event()
        trio.from_thread.run_sync(self._begin.send_nowait, batch, trio_token=self._trio)
        assert may_go_on.wait(_LONGEST_HOLD_S), "the test let no forward end"

    def _write(self, row: Row) -> None:
        if row.token_id == BREAKS:
            raise Broken("a wire is loose")
        if row.token_id == BREAKS_BADLY:
            raise BrokenBadly
        if row.token_id == GOES_BACK:
            row.slab.clear()
            return
        slot = torch.tensor([self.spec.slot(row.position)])
        key = torch.full((1, 1, 1), float(row.token_id), dtype=torch.float64)
        value = torch.full((1, 1, 1), float(row.position), dtype=torch.float64)
        for layer in range(self.spec.layers - (row.token_id == SKIPS_A_LAYER)):
            as_torch(row.slab).write(layer, slot, row.position + 1, key, value)

    def _draw(self, slab: Slab, position: int, sampling: Sampling) -> int:
        held = as_torch(slab)
        extent = self.spec.extent(position)
        visible = visible_slots(self.spec, torch.tensor([position]), extent)[0]
        tokens = held.keys[-1, 0, :extent, 0][visible].tolist()
        positions = held.values[-1, 0, :extent, 0][visible].tolist()
        return _drawn(sorted(zip(positions, tokens, strict=True)), sampling)


def _drawn(seen: list[tuple[float, float]], sampling: Sampling) -> int:
    seed = sampling.seed if sampling.temperature else None
    return zlib.crc32(repr((seen, seed)).encode()) % SKIPS_A_LAYER


@cache
def tiny_text() -> Text:
    return Text(tiny_tokenizer(), frozenset({2}))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Of as many words as the engine has tokens."""
    words = {"hello": 0, "[UNK]": 1} | {f"word{token_id}": token_id for token_id in range(2, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return tokenizer


@asynccontextmanager
async def open_lab(
    engine: LedgerEngine,
    metrics: Metrics | None = None,
    store: SessionStore | None = None,
    new_proposals: NewProposals = lambda: None,
    text: Text | None = None,
    **settings: Any,
) -> AsyncIterator[Runtime]:
    """A runtime on this engine; a forward that is held goes on when the block ends."""
    with EngineThread() as thread:
        chosen = Settings(**settings)
        async with open_sessions(
            chosen, engine, thread, text or tiny_text(), metrics or Metrics(), new_proposals, store
        ) as runtime:
            try:
                yield runtime
            finally:
                engine.open()


async def generated(session: SessionHandle, max_tokens: int, **sampling: Any) -> list[int]:
    """The tokens of one generation, to its end."""
    async with session.generate(max_tokens, **sampling) as events:
        return [event.token_id async for event in events if isinstance(event, Token)]


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """What /metrics would say of one metric; 0 where it says nothing."""
    return metrics.registry.get_sample_value(f"perennial_{name}", labels) or 0.0
