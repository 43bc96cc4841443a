"""Proposers suggest the tokens that may come next; what they suggest changes nothing but speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runtime.proposers.length import Experience, ProposalLength
from runtime.proposers.ngram import NgramProposer

__all__ = ["Experience", "NgramProposer", "ProposalLength", "Proposer"]


class Proposer(Protocol):
    """One session's proposer. It sees every token of the history once, in order, and holds a bounded state."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes what was added to the history."""
        ...

    def propose(self, count: int) -> Sequence[int]:
        """At most `count` tokens that may follow the history; none where there is nothing to suggest."""
        ...
