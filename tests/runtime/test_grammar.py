"""Grammars: whatever the model would say, what it may say is JSON of the schema."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.events import Sampling
from runtime.grammar import Grammar
from runtime.models import SEEDLING, find_model
from runtime.sampling import Draw, draw_token
from runtime.text import Text
from tests.actors.engines import tiny_text

VOCABULARY = 2048
MOST_TOKENS = 3000


@cache
def text() -> Text:
    return Text.load(find_model(SEEDLING))


SCALARS = st.one_of(
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 6)),
    st.builds(lambda most: {"type": "integer", "minimum": 0, "maximum": most}, st.integers(0, 99)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["red", 'gr"ee\n', 3]}, {"const": {"a": [1]}}]),
)
NAMES = st.text('abcé"\\ ', min_size=1, max_size=4)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(
            lambda fields: {
                "type": "object",
                "properties": fields,
                "required": list(fields),
                "additionalProperties": False,
            },
            st.dictionaries(NAMES, inner, max_size=3),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=5,
)


def said_by_chance(grammar: Grammar, seed: int, temperature: float = 1.0) -> str:
    """What a model says that knows nothing, to the end that the grammar comes to."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    constraint = grammar.follow()
    token_ids: list[int] = []
    while not constraint.is_complete:
        draw = Draw(Sampling(temperature, seed=seed), constraint.allowed())
        token_id = draw_token(logits, draw, len(token_ids)).token_id
        constraint.accept(token_id)
        if token_id in text().eos_token_ids:
            break
        token_ids.append(token_id)
        assert len(token_ids) < MOST_TOKENS
    return text().decode(token_ids)


@settings(max_examples=60)
@given(SCHEMAS, st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 100.0]))
def test_what_was_said_validates(schema: dict[str, Any], seed: int, temperature: float) -> None:
    said = said_by_chance(text().json_grammar(schema), seed, temperature)

    jsonschema.validate(json.loads(said), schema)


def test_each_generation_follows_a_grammar_from_its_start() -> None:
    grammar = text().json_grammar({"const": "again"})

    assert [said_by_chance(grammar, seed) for seed in range(3)] == ['"again"'] * 3


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"$ref": "#/nowhere"},
        {"type": "object", "properties": {"a": {"type": 5}}},
        {"type": "string", "pattern": "("},
        {"not": {"type": "string"}},
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_followed_is_refused_in_one_line(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="cannot be followed") as refused:
        text().json_grammar(schema)
    assert "\n" not in str(refused.value)


def test_a_grammar_of_lark_is_followed_and_a_wrong_one_refused() -> None:
    assert said_by_chance(text().lark_grammar('start: "yes" | "yes"'), 1) == "yes"
    with pytest.raises(InvalidRequest, match="cannot be followed"):
        text().lark_grammar("start: nowhere")


def test_a_token_that_was_not_allowed_is_an_error_and_not_a_silent_end() -> None:
    constraint = text().json_grammar({"const": 1}).follow()
    with pytest.raises(InvalidRequest):
        constraint.accept(text().encode("no")[0])


def test_a_proposed_token_that_only_the_model_has_is_not_allowed() -> None:
    constraint = text().json_grammar({"const": 1}).follow()

    assert len(constraint.allowed_along([10**6])) == 1


@settings(max_examples=60)
@given(SCHEMAS, st.integers(0, 2**32), st.integers(0, 8), st.booleans())
def test_what_is_allowed_along_a_proposal_is_what_would_be_step_by_step(
    schema: dict[str, Any], seed: int, begin: int, errs: bool
) -> None:
    grammar = text().json_grammar(schema)
    said = text().encode(said_by_chance(grammar, seed))
    constraint, stepwise = grammar.follow(), grammar.follow()
    for token_id in said[:begin]:
        constraint.accept(token_id)
        stepwise.accept(token_id)
    proposal = said[begin:][:6] + [VOCABULARY - 1] * errs
    if constraint.is_complete:
        return
    before = constraint.allowed()

    along = constraint.allowed_along(proposal)

    assert np.array_equal(constraint.allowed(), before)
    for mask, token_id in zip(along, proposal, strict=False):
        if stepwise.is_complete:
            break
        assert np.array_equal(mask, stepwise.allowed())
        if not mask[token_id // 32] >> (token_id % 32) & 1:
            break
        stepwise.accept(token_id)
    for token_id in said[begin:]:
        constraint.accept(token_id)


TOO_MUCH: dict[str, dict[str, Any]] = {
    "repeats of repeats of repeats": {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"},
    "the same in a field": {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "a schema of a MiB": {"enum": [f"{number:0100}" for number in range(11_000)]},
    "all of any of": {
        "allOf": [
            {
                "anyOf": [
                    {"type": "object", "properties": {f"p{place}": {"const": value}}, "required": [f"p{place}"]}
                    for value in range(8)
                ]
            }
            for place in range(12)
        ]
    },
}


@pytest.mark.parametrize("schema", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_grammar_over_the_budget_is_refused_or_breaks_off(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        said_by_chance(text().json_grammar(schema), seed=0)

    assert "Tokens" not in str(refused.value)


def test_a_tokenizer_that_grammars_cannot_know_is_named_as_the_reason() -> None:
    with pytest.raises(InvalidRequest, match="tokenizer"):
        tiny_text().json_grammar({"type": "integer"})


@pytest.mark.parametrize("name", ["maximum", "minimum", "const", "default", "multipleOf"])
def test_a_schema_of_numbers_that_grammars_cannot_hold_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tiny_text().json_grammar({"type": "integer", name: 2**64})
    (line,) = str(caught.value).splitlines()
    assert len(line) < 600
