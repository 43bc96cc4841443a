"""What a generation may say: a grammar, followed token by token with llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# JSON as Python spells it, and most chat templates with it. Free whitespace would let a weak model go on for ever.
_JSON_SPELLING: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule in llguidance's Lark for JSON of this schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_SPELLING})}"


class Grammar:
    """A compiled grammar; each generation follows it from the start."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @classmethod
    def of_json(cls, schema: Mapping[str, Any], tokens: LLTokenizer) -> Grammar:
        """JSON that validates against `schema`. Raises InvalidRequest where the schema is wrong or not supported."""
        return cls._compiled(LLMatcher.grammar_from_json_schema(dict(schema), overrides=_JSON_SPELLING), tokens)

    @classmethod
    def of_lark(cls, lark: str, tokens: LLTokenizer) -> Grammar:
        """Text of a grammar in llguidance's dialect of Lark. Raises InvalidRequest."""
        return cls._compiled(LLMatcher.grammar_from_lark(lark), tokens)

    @classmethod
    def _compiled(cls, source: str, tokens: LLTokenizer) -> Grammar:
        matcher = LLMatcher(tokens, source, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"this grammar cannot be followed: {_line(matcher)}")
        return cls(matcher)

    def follow(self) -> Constraint:
        return Constraint(self._matcher.deep_copy())


class Constraint:
    """One generation's way through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end of the turn."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.int32]:
        """A bit for each token that may come next, from the lowest of 32-bit words up. Raises InvalidRequest."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self._check()
        return bits

    def allowed_along(self, proposal: Sequence[int]) -> list[NDArray[np.int32]]:
        """As `allowed` before each token of a proposal and after its last, up to the first that is not allowed."""
        masks = [self.allowed()]
        try:
            for token_id in proposal:
                if not _allows(masks[-1], token_id):
                    break
                self.accept(token_id)
                if self.is_complete:
                    # Nothing is drawn after it.
                    masks.append(masks[-1])
                    break
                masks.append(self.allowed())
        finally:
            self._matcher.rollback(len(masks) - 1)
        return masks

    def accept(self, token_id: int) -> None:
        """Goes on with a token that was allowed. Raises InvalidRequest."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(f"the grammar became too complex to follow: {_line(self._matcher)}")


def _allows(mask: NDArray[np.int32], token_id: int) -> bool:
    # A model may have tokens that its tokenizer does not.
    word, bit = divmod(token_id, 32)
    return word < len(mask) and bool(mask[word] >> bit & 1)


def _line(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().split())[:300]
