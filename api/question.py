"""A client's question, independent of the dialect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from api.bounds import Bounds
from runtime.errors import MalformedRequest, SlabOverflow
from runtime.items import Item, length_of
from runtime.script import Head
from runtime.text import Text

# OpenAI's default temperature.
DEFAULT_TEMPERATURE = 1.0
# Every template writes some tokens even for an empty message, though it may leave a few messages out.
_MESSAGES_BESIDE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Question:
    """The items to answer, the place of each in the request, and how to answer. `is_open_turn`: the last item begins the answer.

    `forgets`: whether tokens that do not fit are evicted rather than refused; None means as the settings say.
    """

    items: tuple[Item, ...]
    places: tuple[str, ...]
    head: Head
    options: Mapping[str, Any] = field(default_factory=dict)
    bounds: Bounds = field(default_factory=Bounds)
    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    count: int = 1
    ignores_eos: bool = False
    is_open_turn: bool = False
    forgets: bool | None = None


def temperature_of(temperature: float | None, top_p: float | None) -> float:
    """The temperature to draw with. It is 0 if `top_p` is 0, which leaves only the likeliest token."""
    return 0.0 if top_p == 0 else DEFAULT_TEMPERATURE if temperature is None else temperature


def check_length(items: tuple[Item, ...], text: Text, most_tokens: int) -> None:
    """Refuses items that cannot fit into `most_tokens`, before any work is done for each of their characters.

    Raises SlabOverflow.
    """
    characters = sum(map(length_of, items))
    if characters > most_tokens * text.longest_spelling:
        raise SlabOverflow(f"the messages have {characters} characters, and the most tokens here are {most_tokens}")
    if len(items) > most_tokens + _MESSAGES_BESIDE_TOKENS:
        raise SlabOverflow(f"there are {len(items)} messages, and the most tokens here are {most_tokens}")


def thinking_options(text: Text, effort: str | None, given: Mapping[str, Any], param: str) -> dict[str, Any]:
    """The template's options that make a model think as much as `effort` asks; `given` are options that the client set.

    Raises MalformedRequest if the model is to answer without thinking and its template has no option for that.
    """
    options = dict(given)
    if effort is None:
        return options
    template = text.chat_template
    if "reasoning_effort" in template:
        options.setdefault("reasoning_effort", effort)
    switches = [name for name in ("enable_thinking", "thinking") if re.search(rf"\b{name}\b", template)]
    if effort == "none":
        for name in switches:
            options.setdefault(name, False)
        if text.thinks and not switches and "reasoning_effort" not in template:
            raise MalformedRequest(f"{param}: this model's template cannot have it answer without reasoning", param)
    return options
