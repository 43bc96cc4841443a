"""Grammars that a generation must follow, token by token, with llguidance.

A client can make compiling and computing masks take up to a second. They release the interpreter lock, so call them in a
thread. llguidance ends both by budgets of its own, which count steps and not seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# JSON as Python and most chat templates write it. With free whitespace a weak model might go on for ever.
_JSON_SPELLING: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# A quarter of llguidance's own limits; grammars for real tools need a hundredth of them.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=250_000,
    step_lexer_fuel=100_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    # The rest of llguidance's message would show what was generated so far.
    verbose_errors=False,
)
# This text does not depend on a tokenizer.
_NO_END = "<|end of a grammar, for a model without an end|>"
MOST_SOURCE_CHARACTERS = 2**20
"""In the text of one grammar, schemas included."""

Mask = NDArray[np.int32]
"""A bit for each token, from the lowest of 32-bit words up."""


def json_source(schema: Mapping[str, Any]) -> str:
    """The text of a grammar of JSON that validates against `schema`.

    Raises InvalidRequest for one that is too long, or has numbers that grammars cannot hold.
    """
    try:
        return _check_length(LLMatcher.grammar_from_json_schema(dict(schema), overrides=_JSON_SPELLING))
    except ValueError as error:
        raise InvalidRequest(f"this schema cannot be followed: {_one_line(str(error))}") from error


def lark_source(lark: str) -> str:
    """The text of a grammar in llguidance's dialect of Lark. Raises InvalidRequest for one that is too long."""
    return _check_length(LLMatcher.grammar_from_lark(lark))


def _check_length(source: str) -> str:
    if len(source) > MOST_SOURCE_CHARACTERS:
        raise InvalidRequest(f"schemas may have {MOST_SOURCE_CHARACTERS} characters together: leave some out")
    return source


def check_source(source: str) -> None:
    """Raises InvalidRequest if this grammar is wrong or not supported."""
    is_wrong, reasons = LLMatcher.validate_grammar_with_warnings(source, limits=_LIMITS)
    if is_wrong:
        raise InvalidRequest(f"this grammar cannot be followed: {_one_line(reasons[0])}")


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule in llguidance's Lark for JSON of this schema."""
    asked = schema.get("x-guidance")
    guidance = {**(asked if isinstance(asked, Mapping) else {}), **_JSON_SPELLING}
    return f"%json {json.dumps({**schema, 'x-guidance': guidance})}"


def llguidance_tokenizer(tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """The tokenizer in llguidance's form; takes a second for a large vocabulary. Raises ValueError if it has no such form."""
    source = tokenizer.to_str()
    ends = sorted(token_id for token_id in eos_token_ids if tokenizer.id_to_token(token_id) is not None)
    if not ends:
        # If no end token is named, llguidance takes some word as the end; so add a token that is never drawn.
        more = Tokenizer.from_str(source)
        more.add_special_tokens([_NO_END])
        end = more.token_to_id(_NO_END)
        assert end is not None
        source, ends = more.to_str(), [end]
    return LLTokenizer(source, eos_token=ends)


class Grammar:
    """A compiled grammar; each generation follows it from the start."""

    def __init__(self, matcher: LLMatcher, tokenizer_digest: bytes) -> None:
        """Its masks are for the tokenizer with this digest."""
        self._matcher = matcher
        self.tokenizer_digest = tokenizer_digest

    @classmethod
    def compile(cls, source: str, tokens: LLTokenizer, tokenizer_digest: bytes) -> Grammar:
        """Compiles a grammar. Raises InvalidRequest if it is wrong, not supported or over the budget."""
        matcher = LLMatcher(tokens, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise InvalidRequest(f"this grammar cannot be followed: {_line(matcher)}")
        grammar = cls(matcher, tokenizer_digest)
        # Compute the first mask now: a grammar that fails at its beginning is better refused than broken off.
        grammar.follow().allowed()
        return grammar

    def follow(self) -> Constraint:
        return Constraint(self._matcher.deep_copy())


class Constraint:
    """One generation's state in a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether only the end of the turn may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Mask:
        """A mask of the tokens that may come next. Raises InvalidRequest."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self._check()
        return bits

    def allowed_along(self, proposal: Sequence[int]) -> list[Mask]:
        """The masks before each token of a proposal and after its last, up to the first token that is not allowed."""
        masks = [self.allowed()]
        try:
            for token_id in proposal:
                if not _allows(masks[-1], token_id):
                    break
                self.accept(token_id)
                if self.is_complete:
                    # No token is drawn after that one.
                    masks.append(masks[-1])
                    break
                masks.append(self.allowed())
        finally:
            self._matcher.rollback(len(masks) - 1)
        return masks

    def accept(self, token_id: int) -> None:
        """Advances by a token that was allowed. Raises InvalidRequest."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(f"the grammar became too complex to follow: {_line(self._matcher)}")


def _allows(mask: Mask, token_id: int) -> bool:
    # A model may have more tokens than its tokenizer.
    word, bit = divmod(token_id, 32)
    return word < len(mask) and bool(mask[word] >> bit & 1)


def _line(matcher: LLMatcher) -> str:
    return _one_line(matcher.get_error())


def _one_line(words: str) -> str:
    return " ".join(words.split())[:300]
