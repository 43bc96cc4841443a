"""A session's proposals: what its proposer suggests, in lengths that pay."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace

import trio

from actors.engine_thread import EngineThread
from actors.executor import ModelExecutor
from actors.nursery import open_nursery
from actors.proposers import DiffusionProposer, DraftProposer, NgramProposer, Proposer
from runtime.engine import EngineFacts, load_engine
from runtime.errors import ModelUnavailable
from runtime.events import Sampling
from runtime.metrics import Metrics
from runtime.models import find_proposer_model
from runtime.proposers.budget import Budget, Experience
from runtime.proposers.diffusion import MaskedModel
from runtime.proposers.ngram import PromptLookup
from runtime.settings import Settings


class Proposals:
    """A session's proposer and its budget."""

    def __init__(self, proposer: Proposer, budget: Budget, vocabulary: int) -> None:
        """Tokens outside the model's `vocabulary` are not proposed."""
        self._proposer = proposer
        self._budget = budget
        self._vocabulary = vocabulary

    def extend(self, token_ids: Sequence[int]) -> None:
        """Records that these tokens were added to the history."""
        self._proposer.extend(token_ids)

    def rewind(self, length: int) -> None:
        """Records that the history was cut back to this length."""
        self._proposer.rewind(length)

    async def next(self, history: array[int], most: int, sampling: Sampling) -> list[int]:
        """A proposal of at most `most` tokens for what follows the history."""
        count = min(most, self._budget.choose())
        proposal: list[int] = []
        for token_id in (await self._proposer.propose(history, count, sampling))[:count] if count else ():
            if not 0 <= token_id < self._vocabulary:
                break
            proposal.append(token_id)
        return proposal

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        """Records how many of `proposed` tokens a forward accepted, and how long it and the proposal took."""
        self._budget.learn(proposed, accepted, seconds)

    def close(self) -> None:
        """Releases what the proposer holds."""
        self._proposer.close()


NewProposals = Callable[[], Proposals | None]


@asynccontextmanager
async def open_proposing(settings: Settings, facts: EngineFacts, thread: EngineThread) -> AsyncIterator[NewProposals]:
    """Yields the function that gives each new session its proposals, or None if the settings ask for none.

    Proposals are for the model of `facts`. A model that proposes runs on the engine's thread. Raises InvalidSetting,
    ModelUnavailable or NotEnoughMemory.
    """
    # A proposal shares a forward with the token before it.
    most = min(settings.block_size, facts.row_tile - 1)
    experience = Experience()

    def proposals(proposer: Proposer) -> Proposals:
        return Proposals(proposer, Budget(most, experience), facts.vocabulary)

    match settings.proposer:
        case "ngram":
            yield lambda: proposals(NgramProposer(PromptLookup()))
        case "draft":
            async with _open_draft(settings, facts, thread) as new_proposer:
                yield lambda: proposals(new_proposer())
        case "diffusion":
            directory = await trio.to_thread.run_sync(find_proposer_model, settings)
            # Slabs take their memory as they fill; those on a GPU take none of what the model is loaded into.
            slabs = 0 if facts.device == "cuda" else settings.capacity + settings.max_concurrent
            reserved = slabs * facts.slab.ceiling_bytes
            model = await thread.run(MaskedModel.load, directory, facts.vocabulary, reserved=reserved)
            yield lambda: proposals(DiffusionProposer(model, thread, settings.num_diffusion_steps))
        case _:
            yield lambda: None


@asynccontextmanager
async def _open_draft(
    settings: Settings, facts: EngineFacts, thread: EngineThread
) -> AsyncIterator[Callable[[], DraftProposer]]:
    directory = await trio.to_thread.run_sync(find_proposer_model, settings)
    # Its tokens are verified, so it may use the fastest kernels.
    of_draft = replace(settings, determinism="fast", weights="none", kv_dtype="auto", proposer="none")
    engine = await thread.run(load_engine, of_draft, directory, facts)
    if engine.facts.vocabulary < facts.vocabulary:
        raise ModelUnavailable(
            f"proposer_model knows {engine.facts.vocabulary} tokens and the model {facts.vocabulary}: "
            "give a model with the same tokenizer"
        )
    executor = ModelExecutor(engine, thread, Metrics())
    with closing(engine.new_pool(settings.capacity + settings.max_concurrent)) as pool:
        async with open_nursery() as nursery:
            nursery.start_soon(executor.run)
            yield lambda: DraftProposer(pool, executor)
            nursery.cancel_scope.cancel()
