"""Text in and out of token ids: tokenizer, chat template, and a detokenizer that never emits half a character."""

from __future__ import annotations

import hashlib
import re
import secrets
import struct
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from runtime.checks import MOST_EOS_IDS
from runtime.errors import InvalidRequest, MalformedRequest, ModelUnavailable
from runtime.grammar import Grammar, json_source, lark_source, llguidance_tokenizer
from runtime.model_files import (
    CONFIG,
    is_file_there,
    one_line,
    quiet_transformers,
    read_checked_config,
    read_json_object,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# Placeholder for an answer whose text does not matter.
_MARK = "\u2234"
# A model may generate bytes that are no text. After this many tokens without a whole character they are taken for that.
_MOST_HELD = 64
# Put between the letters of a control token that a client has written. It is random, so clients cannot write it.
_MASK = secrets.token_hex(8)
_MOST_REASON = 300
# The name of what Rust's libraries raise where they fail unexpectedly; no module has the class.
_PANIC = "PanicException"


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
        """The Text of a directory or a GGUF file. Raises ModelUnavailable if it has no fast tokenizer."""
        # Imported here because they import torch, which a process that is only given a tokenizer does not need.
        if directory.is_file():
            from runtime.gguf_file import read_tokenizer

            return cls(*read_tokenizer(directory))
        from transformers import AutoTokenizer

        named = _named_eos(directory)
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            is_fast = tokenizer.is_fast
            # For some architectures transformers invents an empty tokenizer if the directory has none.
            has_words = bool(tokenizer.encode("a", add_special_tokens=False))
        # transformers raises errors of every kind for damaged files; those of tokenizers are of class Exception itself, or a
        # panic of Rust, which is of none of its subclasses.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            raise ModelUnavailable(f"{directory} has no tokenizer that can be loaded: {one_line(error)}") from error
        if not is_fast:
            raise ModelUnavailable(f"the tokenizer in {directory} has no tokenizer.json: convert it to a fast one")
        if not has_words:
            raise ModelUnavailable(f"{directory} has no tokenizer: add the model's tokenizer.json")
        if not isinstance(tokenizer.chat_template, str | dict | None):
            raise ModelUnavailable(
                f"the chat_template in {directory} is not text: remove it from tokenizer_config.json"
            )
        eos_token_ids = _eos_token_ids([*named, tokenizer.eos_token_id])
        if len(eos_token_ids) > MOST_EOS_IDS:
            raise ModelUnavailable(
                f"{directory} names {len(eos_token_ids)} tokens that end a turn, and a session has {MOST_EOS_IDS} at most: "
                "shorten eos_token_id in config.json and generation_config.json"
            )
        return cls(tokenizer, eos_token_ids)

    def warm(self) -> None:
        """Computes everything that is computed once now, such as what the first grammar would wait for."""
        self._guided, self.digest  # noqa: B018 # They are cached.

    def grammar(self, source: str) -> Grammar:
        """Compiles a grammar for answers. Raises InvalidRequest if it is wrong, not supported or too complex."""
        if isinstance(self._guided, ValueError):
            raise InvalidRequest(f"the model's tokenizer is of a kind that grammars cannot follow: {self._guided}")
        return Grammar.compile(source, self._guided, self.digest)

    def json_grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """A grammar for answers in JSON of this schema. Raises InvalidRequest if it is wrong, not supported or too complex."""
        return self.grammar(json_source(schema))

    def lark_grammar(self, lark: str) -> Grammar:
        """A grammar for answers, in llguidance's dialect of Lark. Raises InvalidRequest."""
        return self.grammar(lark_source(lark))

    @cached_property
    def digest(self) -> bytes:
        """A digest that differs between tokenizers with different tokens or ids; the first use takes long for a large vocabulary.

        BLAKE2b over each token in the order of ids: id and length as little-endian uint32, and its text in UTF-8.
        """
        digest = hashlib.blake2b()
        for token, token_id in sorted(self._backend.get_vocab().items(), key=itemgetter(1)):
            spelt = token.encode()
            digest.update(struct.pack("<II", token_id, len(spelt)) + spelt)
        return digest.digest()

    @cached_property
    def _guided(self) -> LLTokenizer | ValueError:
        """The tokenizer in the form for grammars, or the reason why there is none."""
        try:
            return llguidance_tokenizer(self._backend, self.eos_token_ids)
        except ValueError as error:
            return error

    def spelling(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character. Empty for a token that the tokenizer lacks."""
        if self._backend.id_to_token(token_id) is None:
            return b""
        if isinstance(self._guided, ValueError):
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        return bytes(self._guided.decode_bytes([token_id]))

    def has_special_tokens(self, text: str) -> bool:
        """Whether the text has special tokens, which a detokenizer leaves out."""
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
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # Not by the tokenizer's own method, which leaves out arguments that are None, while some templates test for
            # these.
            (text,), _ = render_jinja_template(
                [list(messages)],
                list(tools) or None,
                chat_template=self._tokenizer.get_chat_template(tools=list(tools) or None),
                add_generation_prompt=is_turn_next,
                **self._tokenizer.special_tokens_map | options,
            )
        except MemoryError:
            raise
        except Exception as error:
            # A template is somebody else's program, and may fail with any error on messages that it cannot handle.
            words = " ".join(f"{error}".split())[:_MOST_REASON] or type(error).__name__
            raise MalformedRequest(f"the chat template refuses these messages: {words}", "messages") from error
        return str(text)

    @cached_property
    def chat_template(self) -> str:
        """The source of the template; empty if the model has none."""
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    @property
    def thinks(self) -> bool:
        """Whether the model's answers may begin with reasoning between tags."""
        return "</think>" in self.chat_template

    def masked(self, value: Any) -> Any:
        """`value` with every control token in its strings masked, for `encode_masked`."""
        if isinstance(value, str):
            return self._control.sub(lambda found: _MASK.join(found[0]), value) if self._control else value
        if isinstance(value, Mapping):
            return {self.masked(key): self.masked(one) for key, one in value.items()}
        return [self.masked(one) for one in value] if isinstance(value, list | tuple) else value

    def encode_masked(self, text: str) -> array[int]:
        """The tokens of a template's text. Masked control tokens in it are encoded as plain text, letter by letter."""
        return array("I", (token_id for part in text.split(_MASK) for token_id in self.encode(part)))

    def from_eos(self, text: str) -> str:
        """The text from its first end-of-turn token on; empty if it has none."""
        places = [at for spelled in self._eos_spellings if (at := text.find(spelled)) >= 0]
        return text[min(places) :] if places else ""

    @cached_property
    def _eos_spellings(self) -> list[str]:
        spelled = (self._backend.id_to_token(token_id) for token_id in self.eos_token_ids)
        return [token for token in spelled if token]

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        """The tokens that the tokenizer finds in a text before it splits words. Those of one letter cannot be masked."""
        added = [token.content for token in self._backend.get_added_tokens_decoder().values() if len(token.content) > 1]
        return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None

    def encode(self, text: str) -> list[int]:
        """The tokens of plain text, special tokens in it included."""
        # Not through transformers, which warns of texts over the model's context, while a history here has no such limit.
        # And as a batch, which releases the interpreter lock and computes no offsets.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        token_ids: list[int] = encoded.ids
        return token_ids

    @cached_property
    def longest_spelling(self) -> int:
        """The most characters that one token may stand for."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def __reduce__(self) -> tuple[type[Text], tuple[Any, frozenset[int]]]:
        # Without the caches, which are rebuilt where they are needed.
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
        rest = text.partition(_MARK)[2]
        # The mark may stand in `content` too.
        if not rest or text.count(_MARK) <= content.count(_MARK):
            raise MalformedRequest(
                "the model's chat template leaves out earlier turns, so none can follow: begin a new session",
                "messages",
            )
        token_ids = self.encode_masked(rest).tolist()
        is_ended = is_after_eos and token_ids and token_ids[0] in self.eos_token_ids
        return token_ids[1:] if is_ended else token_ids

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._backend, self._unspoken)

    @cached_property
    def _unspoken(self) -> frozenset[str]:
        """The special tokens by their spelling, as the tokenizer tells them apart when it decodes."""
        added = self._backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)


class Detokenizer:
    """Turns a stream of tokens into a stream of text, whole characters at a time, special tokens left out."""

    def __init__(self, backend: Tokenizer, unspoken: frozenset[str]) -> None:
        self._backend = backend
        self._unspoken = unspoken
        self._said: list[int] = []
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often empty, inside a character."""
        token = self._backend.id_to_token(token_id)
        if token is None or token in self._unspoken:
            # The tokenizer drops it before it decodes the others. Held, it would be decoded with each token that follows.
            return ""
        self._held.append(token_id)
        # The tokens of the last piece are decoded again before those held, because a token's spelling depends on what it
        # follows.
        before, text = self._decode(self._said), self._decode(self._said + self._held)
        if text.endswith("\ufffd") and len(self._held) < _MOST_HELD:
            return ""
        # After bytes that are no text, some decoders spell earlier bytes differently; text that was returned is not changed.
        piece = text[len(before) :] if text.startswith(before) else self._decode(self._held)
        if piece:
            self._said, self._held = self._held, []
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text


def overlap(text: str, word: str) -> int:
    """The length of the longest proper prefix of `word` with which the text ends."""
    lengths = range(min(len(word) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(word[:length])), 0)


def _named_eos(directory: Path) -> list[object]:
    """The ids of end-of-turn tokens that config.json and generation_config.json name. Raises ModelUnavailable."""
    file = directory / "generation_config.json"
    config = read_checked_config(directory) if is_file_there(directory / CONFIG) else {}
    named: list[object] = []
    for source in (config, read_json_object(file) if is_file_there(file) or file.is_dir() else {}):
        eos = source.get("eos_token_id")
        named += eos if isinstance(eos, list) else [eos]
    return named


def _eos_token_ids(named: list[object]) -> frozenset[int]:
    # Some files have -1 or null for none.
    return frozenset(token_id for token_id in named if type(token_id) is int and 0 <= token_id < 2**32)
