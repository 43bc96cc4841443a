"""Where a session's proposals come from: look-up, a smaller model, or a model that fills masks."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol

import trio

from actors.engine_thread import EngineThread
from actors.executor import ModelExecutor
from actors.feed import Feed
from actors.nursery import open_nursery
from runtime.engine import EngineFacts, load_engine
from runtime.errors import ModelUnavailable
from runtime.events import Sampling
from runtime.metrics import Metrics
from runtime.models import find_proposer_model
from runtime.proposers import Experience, NgramProposer, ProposalLength, Proposer
from runtime.proposers.diffusion import MaskedModel
from runtime.sampling import Draw
from runtime.settings import Settings
from runtime.slab import SlabPool


class Source(Protocol):
    """What one session's proposals come from."""

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


class AtOnce:
    """A proposer that needs no forward."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer

    def extend(self, token_ids: Sequence[int]) -> None:
        self._proposer.extend(token_ids)

    def rewind(self, length: int) -> None:
        pass  # What was said and taken back may well be said again.

    async def propose(self, history: array[int], count: int, sampling: Sampling) -> Sequence[int]:
        return self._proposer.propose(count)

    def close(self) -> None:
        pass


class Drafter:
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


class Filler:
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


class Proposals:
    """A session's proposals, and how much of them pays."""

    def __init__(self, source: Source, most: int, vocabulary: int, experience: Experience | None = None) -> None:
        """Proposals are of at most `most` tokens, each of which the model of that `vocabulary` could draw."""
        self._source = source
        self._length = ProposalLength(most, experience)
        self._vocabulary = vocabulary

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes what was added to the history."""
        self._source.extend(token_ids)

    def rewind(self, length: int) -> None:
        """Takes that the history has gone back to this length."""
        self._source.rewind(length)

    async def next(self, history: array[int], most: int, sampling: Sampling) -> list[int]:
        """The proposal for what follows the history, of at most `most` tokens."""
        count = min(most, self._length.choose())
        proposal: list[int] = []
        for token_id in (await self._source.propose(history, count, sampling))[:count] if count else ():
            if not 0 <= token_id < self._vocabulary:
                break
            proposal.append(token_id)
        return proposal

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        """Takes what a forward with so many `proposed` rows came to, and how long it and the proposal took."""
        self._length.learn(proposed, accepted, seconds)

    def close(self) -> None:
        """Gives back what the source holds."""
        self._source.close()


NewProposals = Callable[[], Proposals | None]


@asynccontextmanager
async def open_proposing(settings: Settings, facts: EngineFacts, thread: EngineThread) -> AsyncIterator[NewProposals]:
    """What gives each new session its proposals, if the settings ask for them, over the model of `facts`.

    A model that proposes runs on the engine's thread. Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
    """
    # A proposal and the token before it share a forward.
    most = min(settings.block_size, facts.row_tile - 1)

    experience = Experience()

    def proposals(source: Source) -> Proposals:
        return Proposals(source, most, facts.vocabulary, experience)

    match settings.proposer:
        case "ngram":
            yield lambda: proposals(AtOnce(NgramProposer()))
        case "draft":
            async with _open_drafting(settings, facts, thread) as new_drafter:
                yield lambda: proposals(new_drafter())
        case "diffusion":
            directory = await trio.to_thread.run_sync(find_proposer_model, settings)
            model = await thread.run(MaskedModel.load, directory, facts.vocabulary)
            yield lambda: proposals(Filler(model, thread, settings.num_diffusion_steps))
        case _:
            yield lambda: None


@asynccontextmanager
async def _open_drafting(
    settings: Settings, facts: EngineFacts, thread: EngineThread
) -> AsyncIterator[Callable[[], Drafter]]:
    directory = await trio.to_thread.run_sync(find_proposer_model, settings)
    # What it draws is checked: its kernels may be the fastest.
    of_draft = replace(settings, determinism="fast", weights="none", kv_dtype="auto", proposer="none")
    engine = await thread.run(load_engine, of_draft, directory, facts)
    if engine.facts.vocabulary < facts.vocabulary:
        raise ModelUnavailable(
            f"proposer_model knows {engine.facts.vocabulary} tokens and the model {facts.vocabulary}: "
            "give a model with the same tokenizer"
        )
    pool = engine.new_pool(settings.capacity + settings.max_concurrent)
    executor = ModelExecutor(engine, thread, Metrics())
    async with open_nursery() as nursery:
        nursery.start_soon(executor.run)
        yield lambda: Drafter(pool, executor)
        nursery.cancel_scope.cancel()
