"""An answer as its tokens come: what is said, thought and called, and what a cut leaves of it."""

from __future__ import annotations

import json
from array import array

import pytest

from api.answer import Answer, CallBegun, CallGrown, ItemDone, Part, Said, Thought
from api.bounds import Bounds, Choice, Tool
from runtime.events import Done, StopReason, Token
from runtime.items import Call, Item, Message, Reasoning
from runtime.text import Text
from tests.templates import DEEPSEEK, HERMES, QWEN3, text_with

CLOCK = Tool("clock", None, {"type": "object", "properties": {"city": {"type": "string"}}})
ARGUMENTS = json.dumps({"city": "a town by the sea, far away"})
CALLED = f'<tool_call>\n{{"name": "clock", "arguments": {ARGUMENTS}}}\n</tool_call>'


def parts_of(answer: Answer, token_ids: list[int], reason: StopReason) -> list[Part]:
    parts = [part for token_id in token_ids for part in answer.take(Token(token_id))]
    return [*parts, *answer.take(Done(reason, len(token_ids), 0.0, 0.0))]


def calling(text: Text) -> Answer:
    return Answer(text, Bounds.of_tools([CLOCK], Choice(), text), text.eos_token_ids, array("I"))


def told(items: list[Item]) -> list[object]:
    """Items without their ids."""
    return [(item.name, item.arguments) if isinstance(item, Call) else item for item in items]


class TestACall:
    text = text_with(HERMES)

    def test_is_told_by_its_name_and_then_by_its_arguments_as_they_come(self) -> None:
        parts = parts_of(calling(self.text), self.text.encode(CALLED), StopReason.EOS)

        begun, *grown, done = parts
        assert isinstance(begun, CallBegun)
        assert begun.name == "clock"
        assert len(grown) > 5
        assert "".join(part.arguments for part in grown if isinstance(part, CallGrown)) == ARGUMENTS
        assert done == ItemDone(Call("clock", ARGUMENTS, begun.call_id))

    def test_that_is_whole_ends_the_answer_for_its_sake(self) -> None:
        answer = calling(self.text)
        parts_of(answer, self.text.encode(f"One moment.\n{CALLED}"), StopReason.EOS)

        assert answer.finish_reason == "tool_calls"
        assert told(answer.items) == [Message("assistant", "One moment.\n"), ("clock", ARGUMENTS)]

    def test_that_is_cut_is_never_told_as_words(self) -> None:
        token_ids = self.text.encode(CALLED)
        for length in range(len(token_ids)):
            answer = calling(self.text)
            parts = parts_of(answer, token_ids[:length], StopReason.MAX_TOKENS)

            assert answer.finish_reason == "length"
            words = "".join(part.text for part in parts if isinstance(part, Said))
            # What is no more than the beginning of a tag may be words yet.
            assert words != "<tool_call>"
            assert "<tool_call>".startswith(words)
            grown = "".join(part.arguments for part in parts if isinstance(part, CallGrown))
            assert ARGUMENTS.startswith(grown)
            assert not any(isinstance(item, Call) for item in answer.items)


@pytest.mark.parametrize("template", [QWEN3, DEEPSEEK], ids=["qwen3", "deepseek"])
def test_reasoning_is_told_apart_from_words(template: str) -> None:
    text = text_with(template)
    is_begun = template == DEEPSEEK
    answer = Answer(text, Bounds(), text.eos_token_ids, array("I"), is_in_reasoning=is_begun)
    said = ("" if is_begun else "<think>\n") + "The user says hello.\n</think>\n\nHello!"

    parts = parts_of(answer, text.encode(said), StopReason.EOS)

    assert "".join(part.text for part in parts if isinstance(part, Thought)) == "The user says hello."
    assert "".join(part.text for part in parts if isinstance(part, Said)) == "Hello!"
    assert [item.text for item in answer.items if isinstance(item, Message | Reasoning)] == [
        "The user says hello.",
        "Hello!",
    ]
    assert answer.finish_reason == "stop"
    assert answer.reasoning_tokens > 0


def test_a_model_that_does_not_think_may_write_the_tags() -> None:
    text = text_with(HERMES)
    answer = Answer(text, Bounds(), text.eos_token_ids, array("I"))

    parts = parts_of(answer, text.encode("<think>a</think>b"), StopReason.EOS)

    assert "".join(part.text for part in parts if isinstance(part, Said)) == "<think>a</think>b"
