"""A session's slab, and the forwards that bring it up to the history."""

from __future__ import annotations

from array import array

from actors.executor import Lease
from actors.mailbox import ActorFailed, ActorStopped
from actors.messages import Forward
from runtime.errors import EngineFailed, InvariantViolation
from runtime.events import Token
from runtime.rows import Row
from runtime.sampling import Draw
from runtime.slab import Slab


class Feed:
    """Asks the executor for the rows that a slab lacks. A part of one session, used by it alone."""

    def __init__(self, slab: Slab, lease: Lease) -> None:
        self._slab = slab
        self._lease = lease
        self._length = slab.frontier

    @property
    def length(self) -> int:
        """Tokens that the slab has read."""
        return self._length

    async def read(self, history: array[int]) -> None:
        """Brings the slab up to the history's end. Raises InvariantViolation or EngineFailed."""
        with self._lease:
            while self._length < len(history):
                await self._forward(history, self._length, [], [])

    async def draw(self, history: array[int], proposal: list[int], draws: list[Draw]) -> tuple[tuple[Token, ...], int]:
        """Brings the slab up to the history's end; returns the tokens drawn there, and how many proposed tokens were checked.

        The first token follows the history. Each further one follows a proposed token that equals the token drawn before it.
        `draws` are for what follows the history and each proposed token. Raises InvariantViolation or EngineFailed.
        """
        end = len(history)
        drawn: tuple[Token, ...] = ()
        while not drawn:
            # If the slab has read the last token already, it runs once more for its logits, and writes the same bits.
            drawn = await self._forward(history, min(self._length, end - 1), proposal, draws)
        checked = len(drawn) - 1
        accepted = 0
        while accepted < checked and drawn[accepted].token_id == proposal[accepted]:
            accepted += 1
        self.retract(end + accepted)
        return drawn[: accepted + 1], checked

    def retract(self, length: int) -> None:
        """Discards what the slab has read from `length` on.

        If too little of the window is left, the whole history must be read again.
        """
        if self._length > length:
            if self._slab.is_whole(length):
                self._slab.retract(length)
            else:
                self._slab.clear()
            self._length = self._slab.frontier

    async def follow(self, token_id: int, draw: Draw) -> Token:
        """Reads one more token and returns the token drawn after it. Raises InvariantViolation or EngineFailed."""
        (token,) = await self._run((Row(self._slab, self._length, token_id, draw),), is_prefill=False)
        return token

    def skip(self, length: int) -> None:
        """Continues at position `length`, with only the sinks before it."""
        self._slab.skip(length)
        self._length = length

    async def _forward(
        self, history: array[int], start: int, proposal: list[int], draws: list[Draw]
    ) -> tuple[Token, ...]:
        """Runs the history's tokens from `start` on and proposed ones after them, as many as fit into one forward."""
        end = len(history)
        tile = self._slab.spec.row_tile
        tokens = [*history[start : start + tile], *proposal][:tile]
        rows = tuple(
            Row(self._slab, position, token_id, draws[position - end + 1] if draws and position >= end - 1 else None)
            for position, token_id in enumerate(tokens, start)
        )
        return await self._run(rows, is_prefill=not draws or start < end - 1)

    async def _run(self, rows: tuple[Row, ...], is_prefill: bool) -> tuple[Token, ...]:
        before = self._slab.frontiers
        try:
            ran = await self._lease.ask(Forward(rows, is_prefill))
        except (ActorStopped, ActorFailed):
            raise EngineFailed("the engine has stopped") from None
        self._length = max(self._length, rows[0].position + ran.row_count)
        self._check_invariants(before)
        return ran.tokens

    def _check_invariants(self, before: tuple[int, ...]) -> None:
        frontiers = self._slab.frontiers
        if any(after < earlier for after, earlier in zip(frontiers, before, strict=True)):
            raise InvariantViolation("INV-2: a position went back in the slab: the session has failed", "inv2")
        if any(frontier != self._length for frontier in frontiers):
            raise InvariantViolation("INV-1: the slab's length is not the session's: the session has failed", "inv1")
