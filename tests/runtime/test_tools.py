"""Tool calls: their form as real templates spell it, what a grammar lets through, and a reader that finds them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidRequest, MalformedRequest
from runtime.events import Sampling
from runtime.grammar import Grammar
from runtime.items import Call
from runtime.sampling import Draw, draw_token
from runtime.text import Text
from runtime.tools import CallForm
from tests.templates import HERMES, LLAMA, PLAIN, text_with

EOS = 2
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}


def said_by_chance(text: Text, grammar: Grammar, seed: int, most: int = 400) -> str:
    """What a model says that knows nothing, as far as the grammar lets it."""
    logits = torch.randn(2048, generator=torch.Generator().manual_seed(seed))
    constraint = grammar.follow()
    token_ids: list[int] = []
    while not constraint.is_complete and len(token_ids) < most:
        draw = Draw(Sampling(temperature=1.0, seed=seed), constraint.allowed())
        token_ids.append(draw_token(logits, draw, len(token_ids)).token_id)
        constraint.accept(token_ids[-1])
        if token_ids[-1] == EOS:
            break
    return text.decode(token_ids)


def read(form: CallForm, said: str) -> list[str | Call]:
    reader = form.reader()
    return [*reader.feed(said), *filter(None, [reader.end()])]


def test_a_form_is_read_from_a_template_with_tags() -> None:
    form = CallForm.of_template(text_with(HERMES))

    assert form == CallForm(
        opening="<tool_call>\n",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}\n</tool_call>",
        between="\n",
    )


def test_an_end_of_turn_that_the_tokenizer_lacks_changes_no_form() -> None:
    text = text_with(HERMES)
    known = CallForm.of_template(text)
    text.eos_token_ids |= {999_999}

    CallForm.of_template.cache_clear()

    assert CallForm.of_template(text) == known


def test_a_form_is_read_from_a_template_that_writes_one_call_and_no_tags() -> None:
    form = CallForm.of_template(text_with(LLAMA))

    assert form == CallForm(
        opening="", before_name='{"name": "', before_arguments='", "parameters": ', after_arguments="}", between=""
    )


def test_a_template_without_tools_is_refused_by_what_the_client_sent() -> None:
    with pytest.raises(MalformedRequest, match="knows no tools") as refused:
        CallForm.of_template(text_with(PLAIN))
    assert refused.value.param == "tools"


@pytest.mark.parametrize("template", [HERMES, LLAMA], ids=["hermes", "llama"])
@pytest.mark.parametrize("seed", range(6))
def test_who_must_call_calls_with_arguments_that_validate(template: str, seed: int) -> None:
    text = text_with(template)
    form = CallForm.of_template(text)
    grammar = text.grammar(form.source([WEATHER, CLOCK], is_required=True, is_parallel=False))

    said = said_by_chance(text, grammar, seed)

    [call] = read(form, said)
    assert isinstance(call, Call)
    arguments = json.loads(call.arguments)
    if call.name == "clock":
        assert arguments == {}
    else:
        assert call.name == "weather"
        assert set(arguments) in ({"city"}, {"city", "days"})
        assert len(arguments["city"]) <= 12
        assert isinstance(arguments.get("days", 0), int)


@pytest.mark.parametrize("seed", range(6))
def test_who_may_call_in_parallel_makes_whole_calls_only(seed: int) -> None:
    text = text_with(HERMES)
    form = CallForm.of_template(text)
    grammar = text.grammar(form.source([CLOCK], is_required=True, is_parallel=True))

    said = read(form, said_by_chance(text, grammar, seed, most=2000))

    assert said
    assert set(said) == {Call("clock", "{}")}


def follows(text: Text, grammar: Grammar, said: str) -> bool:
    """Whether a model may say this and end its turn there."""
    constraint = grammar.follow()
    for token_id in [*text.encode(said), EOS]:
        if constraint.is_complete:
            return token_id == EOS
        if not constraint.allowed()[token_id // 32] >> (token_id % 32) & 1:
            return False
        constraint.accept(token_id)
    return True


CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("said", "parallel", "single"),
    [
        ("Hello there.", True, True),
        ("", True, True),
        (CALL, True, True),
        (f"One moment.\n{CALL}", True, True),
        (f"{CALL}\n{CALL}", True, False),
        ("<tool_call>", False, False),
        (CALL.replace("clock", "cluck"), False, False),
        (CALL.replace("{}", "{1}"), False, False),
        ("a < b and <tool> too", True, True),
    ],
)
def test_who_may_call_says_anything_but_half_a_call(said: str, parallel: bool, single: bool) -> None:
    text = text_with(HERMES)
    form = CallForm.of_template(text)

    for is_parallel, expected in ((True, parallel), (False, single)):
        grammar = text.grammar(form.source([CLOCK], is_required=False, is_parallel=is_parallel))
        assert follows(text, grammar, said) is expected


def test_an_answer_of_a_schema_may_call_a_tool_instead() -> None:
    text = text_with(HERMES)
    form = CallForm.of_template(text)
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    grammar = text.grammar(form.source([CLOCK], is_required=False, is_parallel=True, schema=schema))

    assert follows(text, grammar, '{"city": "Rome"}')
    assert follows(text, grammar, CALL)
    assert follows(text, grammar, f"{CALL}\n{CALL}")
    assert not follows(text, grammar, "Rome")
    assert not follows(text, grammar, f'{{"city": "Rome"}}{CALL}')


def test_a_schema_that_cannot_be_followed_is_refused() -> None:
    text = text_with(HERMES)
    broken: dict[str, Any] = CLOCK | {"parameters": {"type": "nothing"}}
    with pytest.raises(InvalidRequest, match="cannot be followed"):
        text.grammar(CallForm.of_template(text).source([broken], is_required=True, is_parallel=True))


WORDS = st.text('ab{}"<tol_c>\n', max_size=12)


@settings(max_examples=300)
@given(st.lists(st.tuples(WORDS, st.dictionaries(WORDS, WORDS, max_size=2)), max_size=3), WORDS, st.randoms())
def test_calls_are_found_however_the_text_is_cut(
    turns: list[tuple[str, dict[str, str]]], last: str, chance: random.Random
) -> None:
    form = CallForm.of_template(text_with(HERMES))
    words = [*(word for word, _ in turns), last]
    said = "".join(
        f"{word}<tool_call>\n{json.dumps({'name': 'f', 'arguments': arguments})}\n</tool_call>"
        for word, arguments in turns
    )
    said += last
    reader = form.reader()

    found: list[str | Call] = []
    while said:
        cut = chance.randint(1, len(said))
        found += reader.feed(said[:cut])
        said = said[cut:]
    found.append(reader.end())

    assert [json.loads(one.arguments) for one in found if isinstance(one, Call)] == [call for _, call in turns]
    texts = "".join(one for one in found if isinstance(one, str))
    expected = words[0] + "".join(words[1:])
    assert "".join(texts.split()) == "".join(expected.split())


@settings(max_examples=200)
@given(st.dictionaries(WORDS, WORDS, max_size=3), WORDS, st.randoms())
@pytest.mark.parametrize("template", [HERMES, LLAMA], ids=["hermes", "llama"])
def test_a_call_that_comes_in_part_is_told_as_far_as_it_goes(
    template: str, arguments: dict[str, str], before: str, chance: random.Random
) -> None:
    form = CallForm.of_template(text_with(template))
    spelled = json.dumps(arguments)
    said = (
        f"{before.replace('<', '').replace('{', '')}{form.opening}{form.before_name}f{form.before_arguments}{spelled}"
    )
    said += form.after_arguments
    reader = form.reader()
    told: list[Call] = []
    whole: list[Call] = []

    while said:
        cut = chance.randint(1, 5)
        whole += [one for one in reader.feed(said[:cut]) if isinstance(one, Call)]
        said = said[cut:]
        told += [reader.begun] if reader.begun else []

    assert whole == [Call("f", spelled)]
    assert reader.begun is None
    assert all(one.name == "f" and spelled.startswith(one.arguments) for one in told)
    assert [len(one.arguments) for one in told] == sorted(len(one.arguments) for one in told)
