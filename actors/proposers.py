"""The proposers: look-up, a smaller model, and a model that fills masks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from actors.engine_thread import EngineThread
from actors.executor import ModelExecutor
from actors.feed import Feed
from runtime.events import Sampling
from runtime.proposers.diffusion import MaskedModel
from runtime.proposers.ngram import PromptLookup
from runtime.sampling import Draw
from runtime.slab import SlabPool


class Proposer(Protocol):
    """Suggests what may follow one session's history."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes what was added to the history."""
        ...

    def rewind(self, length: int) -> None:
        """Takes that the history has gone back to this length."""
        ...

    async def propose(self, history: array[int], count: int, sampling: Sampling) -> Sequence[int]:
        """About `count` tokens that may follow the history when they are drawn by `sampling`."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


class NgramProposer:
    """Suggests what followed the last tokens when they came before."""

    def __init__(self, lookup: PromptLookup) -> None:
        self._lookup = lookup

    def extend(self, token_ids: Sequence[int]) -> None:
        self._lookup.extend(token_ids)

    def rewind(self, length: int) -> None:
        pass  # What was said and taken back may well be said again.

    async def propose(self, history: array[int], count: int, sampling: Sampling) -> Sequence[int]:
        return self._lookup.propose(count)

    def close(self) -> None:
        pass


class DraftProposer:
    """Draws as the session does, from a smaller model that has a slab of its own (arXiv 2211.17192).

    The noise is the session's, so under sampling too both draw the same token where they think alike.
    """

    def __init__(self, pool: SlabPool, executor: ModelExecutor) -> None:
        self._pool = pool
        self._slab = pool.acquire()
        self._lease = executor.lease()
        self._feed = Feed(self._slab, self._lease)
        self._begin = 0  # Where in the history the last draft began.
        self._draft: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        pass

    def rewind(self, length: int) -> None:
        self._begin, self._draft = min(self._begin, length), []
        self._feed.retract(length)

    async def propose(self, history: array[int], count: int, sampling: Sampling) -> Sequence[int]:
        self._feed.retract(self._came_true(history))
        await self._skip_what_is_evicted(history)
        draw = Draw(sampling)
        self._begin, self._draft = len(history), []
        with self._lease:
            (first, *_), _ = await self._feed.draw(history, [], [draw])
            self._draft.append(first.token_id)
            while len(self._draft) < count:
                self._draft.append((await self._feed.follow(self._draft[-1], draw)).token_id)
        return self._draft

    def close(self) -> None:
        self._pool.release(self._slab)

    def _came_true(self, history: array[int]) -> int:
        """The length up to which the slab may have read what is the history now."""
        length = self._begin
        for token_id in self._draft:
            if length == len(history) or history[length] != token_id:
                break
            length += 1
        return length

    async def _skip_what_is_evicted(self, history: array[int]) -> None:
        # A session that comes from a disk or a fork may be long, and nobody waits for a draft of it all.
        spec = self._slab.spec
        if len(history) - self._feed.length > spec.visible:
            await self._feed.read(history[: spec.sink])
            self._feed.skip(len(history) - spec.window)


class DiffusionProposer:
    """Fills masks behind the end of the history, all of a block in a few steps."""

    def __init__(self, model: MaskedModel, thread: EngineThread, steps: int) -> None:
        self._model = model
        self._thread = thread
        self._steps = steps

    def extend(self, token_ids: Sequence[int]) -> None:
        pass

    def rewind(self, length: int) -> None:
        pass

    async def propose(self, history: array[int], count: int, sampling: Sampling) -> Sequence[int]:
        context = self._model.context(history)
        return await self._thread.run(self._model.fill, context, count, self._steps)

    def close(self) -> None:
        pass
