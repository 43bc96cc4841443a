"""Proposers suggest the tokens that may come next; what they suggest changes nothing but speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runtime.proposers.length import ProposalLength
from runtime.proposers.ngram import NgramProposer
from runtime.settings import Settings

__all__ = ["Proposals", "Proposer", "make_proposals"]


class Proposer(Protocol):
    """One session's proposer. It sees every token of the history once, in order, and holds a bounded state."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes what was added to the history."""
        ...

    def propose(self, count: int) -> Sequence[int]:
        """At most `count` tokens that may follow the history; none where there is nothing to suggest."""
        ...


class Proposals:
    """A session's proposer, and how much of it pays."""

    def __init__(self, proposer: Proposer, most: int, vocabulary: int) -> None:
        """Proposals are of at most `most` tokens, each of which the model of that `vocabulary` could draw."""
        self._proposer = proposer
        self._length = ProposalLength(most)
        self._vocabulary = vocabulary

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes what was added to the history."""
        self._proposer.extend(token_ids)

    def next(self, most: int) -> list[int]:
        """The proposal for what follows the history, of at most `most` tokens."""
        count = min(most, self._length.choose())
        proposal: list[int] = []
        for token_id in self._proposer.propose(count)[:count] if count else ():
            if not 0 <= token_id < self._vocabulary:
                break
            proposal.append(token_id)
        return proposal

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        """Takes what a forward with so many `proposed` rows came to."""
        self._length.learn(proposed, accepted, seconds)


def make_proposals(settings: Settings, row_tile: int, vocabulary: int) -> Proposals | None:
    """For a new session, if the settings ask for them; a proposal and the token before it share a row tile."""
    if settings.proposer == "none":
        return None
    return Proposals(NgramProposer(), min(settings.block_size, row_tile - 1), vocabulary)
