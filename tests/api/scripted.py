"""A house whose model says what the test has written down for it, and counts the rows that ran."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import trio

from runtime import Sampling, Token
from runtime.engine import EngineFacts
from runtime.engine.torch_slab import as_torch
from runtime.items import Call, Item, Message, Reasoning
from runtime.models import SEEDLING, find_model
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw, draw_token
from runtime.text import Text
from tests.actors.engines import LedgerEngine


@cache
def _vocabulary() -> int:
    config = json.loads((find_model(SEEDLING) / "config.json").read_text())
    return int(config["vocab_size"])


def spelled(items: Sequence[Item], schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """What a model says that makes these items of an answer, as the templates of `tests.templates` spell it.

    Arguments are as the grammar of a tool's schema has them, which `schemas` hold by the tool's name.
    """
    said = ""
    for before, item in zip([None, *items], items, strict=False):
        match item:
            case Reasoning(thought):
                said += f"<think>\n{thought}\n</think>\n\n"
            case Message(_, words):
                said += words
            case Call(name, arguments):
                gap = "" if before is None or isinstance(before, Reasoning) else "\n"
                told = json.dumps(_followed(json.loads(arguments or "{}"), schemas[name]), ensure_ascii=False)
                said += f'{gap}<tool_call>\n{{"name": "{name}", "arguments": {told}}}\n</tool_call>'
    return said


def _followed(given: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with their fields in the schema's order, whole numbers as such, and without what it does not allow."""
    fields = schema.get("properties", {})
    known = {name: given[name] for name in fields if name in given}
    known |= {name: int(value) for name, value in known.items() if fields[name].get("type") == "integer"}
    return known | ({} if schema.get("additionalProperties") is False else {**given} | known)


class ScriptedEngine(LedgerEngine):
    """Draws what `script` holds. Once that has run out, each further draw waits for `go_on`, and is one that may come next."""

    def __init__(self, text: Text) -> None:
        super().__init__(sink=4, window=65_532, row_tile=256, layers=1)
        self.text = text
        self.script: deque[int] = deque()
        self.rows = 0
        self.drawn = 0
        self._last: Row | None = None
        self._ran_out = trio.Event()
        self._permits = threading.Semaphore(0)
        self._token = trio.lowlevel.current_trio_token()

    @property
    def facts(self) -> EngineFacts:
        return replace(super().facts, vocabulary=_vocabulary())

    @property
    def history(self) -> list[int]:
        """All tokens that the row which ran last could see, itself included."""
        assert self._last is not None
        held, end = as_torch(self._last.slab), self._last.position + 1
        positions = held.values[0, 0, :end, 0]
        assert torch.equal(positions, torch.arange(end, dtype=positions.dtype)), "the slab is not whole"
        return [int(token_id) for token_id in held.keys[0, 0, :end, 0].tolist()]

    def write(self, said: str, *, is_whole: bool = True) -> None:
        """Has the model say this next, and end its turn if that `is_whole`."""
        self.script.extend(self.text.encode(said))
        self.script.extend(self.text.eos_token_ids if is_whole else ())

    async def ran_out(self) -> None:
        """Returns once the model has said all that is written, and would go on."""
        await self._ran_out.wait()

    def go_on(self) -> None:
        self._permits.release()

    def open(self) -> None:
        super().open()
        self._permits.release(2**10)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        self.rows += len(batch.rows)
        self._last = batch.rows[-1]
        for piece in _pieces(batch):
            self._put(piece)
        return tuple(self._next(row, row.draw) for row in batch.rows if row.draw is not None)

    def _put(self, rows: Sequence[Row]) -> None:
        slab, first, last = as_torch(rows[0].slab), rows[0].position, rows[-1].position
        slots = torch.tensor([self.spec.slot(row.position) for row in rows])
        keys = torch.tensor([float(row.token_id) for row in rows], dtype=torch.float64).view(1, -1, 1)
        positions = torch.arange(first, last + 1, dtype=torch.float64).view(1, -1, 1)
        slab.write(0, slots, last + 1, keys, positions)

    def _next(self, row: Row, draw: Draw) -> Token:
        self.drawn += 1
        may = torch.zeros(_vocabulary())
        may[[*self.text.eos_token_ids]] = -1
        if self.script:
            may[self.script.popleft()] = 1
            wanted = int(may.argmax())
        else:
            wanted = None
            trio.from_thread.run_sync(self._ran_out.set, trio_token=self._token)
            self._permits.acquire()
        token = draw_token(may, replace(draw, sampling=Sampling()), row.position)
        assert wanted in (None, token.token_id), (
            f"{self.text.spelled([wanted or 0])!r} may not follow {self.text.spelled(self.history[-20:])!r}"
        )
        return token


def _pieces(batch: RowBatch) -> Iterator[list[Row]]:
    piece: list[Row] = []
    for row in batch.rows:
        if piece and (row.slab is not piece[-1].slab or row.position != piece[-1].position + 1):
            yield piece
            piece = []
        piece.append(row)
    yield piece
