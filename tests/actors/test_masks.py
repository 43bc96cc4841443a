"""Masks are computed beside the loop: one that takes long holds up its own session alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.grammar import Grammar, Mask
from tests.actors.engines import VOCABULARY, LedgerEngine, generated, open_lab, tiny_text


class Anything(Grammar):
    """A grammar and a way through it, of all that there is; notes in which threads it is asked for masks."""

    is_complete = False

    def __init__(self) -> None:
        self.tokenizer_digest = tiny_text().digest
        self.threads: set[int] = set()

    def follow(self) -> Any:
        return self

    def allowed_along(self, proposal: Sequence[int]) -> list[Mask]:
        self.threads.add(threading.get_ident())
        return [np.full(VOCABULARY // 32 + 1, -1, np.int32)] * (len(proposal) + 1)

    def accept(self, token_id: int) -> None:
        pass


async def test_masks_are_computed_off_the_loop() -> None:
    grammar = Anything()
    async with open_lab(LedgerEngine()) as runtime:
        session = await runtime.create_session()
        await session.append([1, 2, 3])

        tokens = await generated(session, 4, grammar=grammar)

    assert len(tokens) == 4
    assert grammar.threads
    assert threading.get_ident() not in grammar.threads
