"""Logprobs of the tokens whose text was sent, so that they reveal nothing of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Set

from pydantic import BaseModel, ConfigDict

from runtime.events import Token
from runtime.text import Text

# OpenAI's value for a token that is practically impossible; JSON has no infinity.
_LEAST = -9999.0


class TokenLogprob(BaseModel):
    """A token's text and bytes. If it has only some of a character's bytes, the text has a replacement character there."""

    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class SentLogprobs:
    """Holds a token's logprob back until the last character that the token is a part of has been sent."""

    def __init__(self, text: Text, eos_token_ids: Set[int]) -> None:
        self._text = text
        self._eos_token_ids = eos_token_ids
        self._spelt = self._sent = 0  # Counts of characters received and sent.
        self._in_a_character: list[ChosenLogprob] = []
        self._waiting: deque[tuple[int, ChosenLogprob]] = deque()

    def feed(self, token: Token, text: str) -> None:
        """Takes a token and the text that is complete with it. The token that ends a turn is no part of the answer."""
        if token.logprobs is None or token.token_id in self._eos_token_ids:
            return
        top = [self._as_logprob(token_id, logprob) for token_id, logprob in token.logprobs.top]
        chosen = self._as_logprob(token.token_id, token.logprobs.chosen)
        self._in_a_character.append(ChosenLogprob(**chosen.model_dump(), top_logprobs=top))
        if text:
            self._spelt += len(text)
            self._settle()

    def sent(self, text: str, *, is_last: bool) -> tuple[ChosenLogprob, ...]:
        """The logprobs of tokens whose text is now fully sent; `is_last` flushes the rest."""
        self._sent += len(text)
        if is_last:
            self._settle()
        ready = []
        while self._waiting and self._waiting[0][0] <= self._sent:
            ready.append(self._waiting.popleft()[1])
        return tuple(ready)

    def _settle(self) -> None:
        self._waiting += [(self._spelt, logprob) for logprob in self._in_a_character]
        self._in_a_character = []

    def _as_logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        spelling = self._text.spelling(token_id)
        return TokenLogprob(token=spelling.decode(errors="replace"), logprob=max(logprob, _LEAST), bytes=list(spelling))
