"""Text in and out of token ids: tokenizer, chat template, and a detokenizer that never emits half a character."""

from __future__ import annotations

import re
import secrets
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from runtime.errors import InvalidRequest, MalformedRequest, ModelUnavailable
from runtime.grammar import Grammar, json_source, lark_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# Stands for an answer whose text does not matter.
_MARK = "\u2234"
# A model may go on with bytes that are no text at all; so many tokens and no whole character are taken for that.
_MOST_HELD = 64
# Stands between the letters of a control token that somebody has written. Nobody knows it who writes.
_MASK = secrets.token_hex(8)
_MOST_REASON = 300


class Text:
    """The tokenizer and chat template of one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        """`tokenizer` must be a fast one; `eos_token_ids` end a turn of the assistant."""
        self._tokenizer: Any = tokenizer
        self._backend: Tokenizer = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = frozenset(self._tokenizer.all_special_ids)
        self.eos_token_ids = eos_token_ids

    @classmethod
    def load(cls, directory: Path) -> Text:
        """Raises ModelUnavailable where the directory has no fast tokenizer."""
        # It brings torch along, which a process that is given a tokenizer has no use for.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ModelUnavailable(f"{directory} has no tokenizer that can be loaded: {reason}") from error
        if not tokenizer.is_fast:
            raise ModelUnavailable(f"the tokenizer in {directory} has no tokenizer.json: convert it to a fast one")
        # For some architectures transformers makes up a tokenizer without words where the directory has none.
        if not tokenizer.encode("a", add_special_tokens=False):
            raise ModelUnavailable(f"{directory} has no tokenizer: add the model's tokenizer.json")
        return cls(tokenizer, _eos_token_ids(directory, tokenizer))

    def warm(self) -> None:
        """Makes now what the first grammar would wait for, and all else with it."""
        with suppress(InvalidRequest):
            self._guided  # noqa: B018 # It is cached.

    def grammar(self, source: str) -> Grammar:
        """Answers of the grammar with this text. Raises InvalidRequest where it is wrong, not supported or too complex."""
        return Grammar.compile(source, self._guided)

    def json_grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """Answers that are JSON of this schema. Raises InvalidRequest where it is wrong, not supported or too complex."""
        return self.grammar(json_source(schema))

    def lark_grammar(self, lark: str) -> Grammar:
        """Answers of a grammar in llguidance's dialect of Lark. Raises InvalidRequest."""
        return self.grammar(lark_source(lark))

    @cached_property
    def _guided(self) -> LLTokenizer:
        """The tokenizer as grammars know it; the first use takes a second for a large vocabulary. Raises InvalidRequest."""
        try:
            return LLTokenizer(self._backend.to_str(), eos_token=sorted(self.eos_token_ids))
        except ValueError as error:
            raise InvalidRequest(f"the model's tokenizer is of a kind that grammars cannot follow: {error}") from error

    def spelling(self, token_id: int) -> bytes:
        """The bytes of one token, which may be a part of a character. Empty for one that the tokenizer lacks."""
        return bytes(self._guided.decode_bytes([token_id])) if token_id < self._guided.vocab_size else b""

    def has_special_tokens(self, text: str) -> bool:
        """Whether some of the text's tokens are special ones, which a detokenizer leaves out."""
        return not self._special.isdisjoint(self.encode(text))

    def apply_template(
        self,
        messages: Messages,
        tools: Tools = (),
        *,
        is_turn_next: bool = True,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The text of a conversation, up to the assistant's turn if that `is_turn_next`; `options` are for the template.

        Raises MalformedRequest.
        """
        if not self._tokenizer.chat_template:
            raise MalformedRequest(
                "the model has no chat template: use the gRPC door, which takes token ids", "messages"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=is_turn_next, **options
            )
        except MemoryError:
            raise
        except Exception as error:
            # A template is a program of others', and what it cannot do with these messages it may fail of in any way.
            words = " ".join(f"{error}".split())[:_MOST_REASON] or type(error).__name__
            raise MalformedRequest(f"the chat template refuses these messages: {words}", "messages") from error
        return text

    @cached_property
    def chat_template(self) -> str:
        """The template as it is written; empty where the model has none."""
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    @property
    def thinks(self) -> bool:
        """Whether the model's answers may begin with reasoning between tags."""
        return "</think>" in self.chat_template

    def masked(self, value: Any) -> Any:
        """`value`, in whose strings no control token is spelled for `encode_masked` any more."""
        if isinstance(value, str):
            return self._control.sub(lambda found: _MASK.join(found[0]), value) if self._control else value
        if isinstance(value, Mapping):
            return {key: self.masked(one) for key, one in value.items()}
        return [self.masked(one) for one in value] if isinstance(value, list | tuple) else value

    def encode_masked(self, text: str) -> array[int]:
        """The tokens of a template's text: what was masked in it is plain text, letter by letter."""
        return array("I", (token_id for part in text.split(_MASK) for token_id in self.encode(part)))

    def from_eos(self, text: str) -> str:
        """The text from the first end-of-turn token that is spelled in it; empty where there is none."""
        places = [at for spelled in self._eos_spellings if (at := text.find(spelled)) >= 0]
        return text[min(places) :] if places else ""

    @cached_property
    def _eos_spellings(self) -> list[str]:
        spelled = (self._backend.id_to_token(token_id) for token_id in self.eos_token_ids)
        return [token for token in spelled if token]

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        """Tokens that the tokenizer finds in a text before it looks at words. Those of one letter cannot be masked."""
        added = [token.content for token in self._backend.get_added_tokens_decoder().values() if len(token.content) > 1]
        return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, special tokens in it included."""
        # Not through transformers, which warns of texts over the model's context: here a history has no such end. And as a
        # batch, for which the interpreter is let go and no offsets are counted.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        token_ids: list[int] = encoded.ids
        return token_ids

    @cached_property
    def longest_spelling(self) -> int:
        """The most characters that one token may stand for."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def __reduce__(self) -> tuple[type[Text], tuple[Any, frozenset[int]]]:
        # What is cached here is made anew where it is needed.
        return Text, (self._tokenizer, self.eos_token_ids)

    def spelled(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def render(self, messages: Messages, tools: Tools = ()) -> list[int]:
        """The tokens of a conversation, ready for the assistant's turn. Raises MalformedRequest if the template refuses."""
        return self.encode_masked(self.apply_template(self.masked(messages), tools)).tolist()

    def render_next_turn(self, content: str, is_after_eos: bool) -> list[int]:
        """The tokens that take a conversation from the end of the assistant's turn to its next, `content` between them.

        `is_after_eos` says whether the history ends with an end-of-turn token. Raises MalformedRequest.
        """
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _MARK}]
        text = self.apply_template([*before, {"role": "user", "content": self.masked(content)}])
        rest = text[text.index(_MARK) + len(_MARK) :]
        token_ids = self.encode_masked(rest).tolist()
        return token_ids[1:] if is_after_eos and token_ids[0] in self.eos_token_ids else token_ids

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._backend)


class Detokenizer:
    """Turns a stream of tokens into a stream of text, whole characters at a time, special tokens left out."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._said: list[int] = []
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that is complete with this token and was not before; often empty inside a character."""
        self._held.append(token_id)
        # The tokens of the last piece stand before those held: a decoder spells a token by what it follows.
        before, text = self._decode(self._said), self._decode(self._said + self._held)
        if text.endswith("\ufffd") and len(self._held) < _MOST_HELD:
            return ""
        # Bytes that are no text make some decoders spell the bytes before them anew; what was said stays said.
        piece = text[len(before) :] if text.startswith(before) else self._decode(self._held)
        if piece:
            self._said, self._held = self._held, []
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text


def overlap(text: str, word: str) -> int:
    """The length of the longest beginning of `word`, short of the whole, that the text ends with."""
    lengths = range(min(len(word) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(word[:length])), 0)


def _eos_token_ids(directory: Path, tokenizer: Any) -> frozenset[int]:
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:
        eos = None
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(token_id for token_id in (*ids, tokenizer.eos_token_id) if token_id is not None)
