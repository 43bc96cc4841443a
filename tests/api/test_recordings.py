"""Every recording of an agent, sent again: a turn costs its new tokens, and what costs more is said and named here."""

from __future__ import annotations

import pytest

from tests import templates
from tests.api.recordings import AGENTS
from tests.api.replaying import Turn, replayed

# The row of the token that ended the model's turn before, and of the line break that the template writes after it.
_JOINT = 2
# The heads of all conversations begin alike with a few words. They are used where they cost nobody anything.
_A_FEW = 64

# What the answers say of a broken prefix, by recording and request; and why it breaks, or reads more than was new.
_BROKEN = {
    ("claude-code/compact", 3): ("messages.5.content.1", "instructions are put behind a message that was answered"),
    ("claude-code/compact", 4): ("messages.5.content.1", "instructions are put behind a message that was answered"),
    ("claude-code/compact", 5): ("messages.0.content.0", "a compacted conversation has a new first message"),
    ("claude-code/kill", 2): ("messages.3.content.1", "words and an answer are made up for a turn that was broken off"),
    ("codex/app-compact-http", 4): ("input.4", "a compacted conversation goes on from its head"),
    ("codex/app-compact-ws", 5): ("input.4", "a compacted conversation goes on from its head"),
    ("codex/kill-http", 2): ("input.7", "a turn that was broken off comes back without its answer"),
    ("codex/kill-ws", 4): ("input.6", "a turn that was broken off comes back without its answer"),
    ("opencode/fidelity-responses", 2): (
        "input.4",
        "the recorded answer had words only in its last event, which are lost",
    ),
    ("opencode/fidelity-responses", 4): (
        "input.11",
        "the recorded answer had words only in its last event, which are lost",
    ),
    ("opencode/kill", 3): ("messages.4", "a call that was broken off comes back with other arguments"),
    ("opencode/resume-on-next-day", 4): ("messages.0", "the date stands in the head"),
    ("pi/kill", 2): ("messages.4", "a turn that was broken off comes back without its answer"),
    ("qwen-code/chat-task-and-resume", 3): ("messages.1", "a block of the first message is gone after a resume"),
    ("qwen-code/fidelity", 2): ("messages.1", "a block of the first message is gone after a resume"),
    ("qwen-code/kill", 2): ("messages.1", "a block of the first message is gone after a resume"),
    **{
        ("smolagents/tool", number): (f"messages.{at}", "calls and what came of them are folded into text")
        for number, at in [(1, 2), (2, 4), (3, 6), (4, 8), (6, 10), (7, 12), (8, 14), (9, 16), (10, 18), (11, 11)]
    },
    ("smolagents/tool", 5): (None, "the last question has another system prompt"),
}
# The second of two helpers that are told the same: the slab of the first gives up 225 tokens for the head that they share.
_GIVEN_UP = {("codex/spawn", 8)}


def broken(turns: dict[tuple[str, int], Turn]) -> dict[tuple[str, int], str | None]:
    """What the answers say of those turns that say something of it, or read more than was new."""
    return {name: turn.broke for name, turn in turns.items() if turn.broke or turn.read > turn.added + _JOINT}


@pytest.mark.parametrize("agent", AGENTS)
async def test_a_turn_costs_its_new_tokens_and_what_costs_more_says_why(agent: str) -> None:
    turns = await replayed(agent, templates.QWEN)

    expected = {name: broke for name, (broke, _) in _BROKEN.items() if name[0].startswith(f"{agent}/")}
    assert broken(turns) == expected
    for name, turn in turns.items():
        assert turn.prompt - turn.known <= turn.read or not turn.prompt, name
        if turn.known > _A_FEW and name not in _GIVEN_UP:
            assert turn.read == turn.prompt - turn.known, name
        if turn.reuse:
            usage = turn.reuse["reused"], turn.reuse["read"], turn.reuse["evicted"]
            assert usage == (turn.prompt - turn.read, turn.read, 0), name
            assert turn.cached == turn.prompt - turn.read, name
            assert turn.rows == turn.reuse["read"] + turn.drawn, name


@pytest.mark.parametrize(
    ("agent", "recording"),
    [("codex", "ws-task-and-resume"), ("codex", "http-task-and-resume"), ("pi", "chat-task-and-resume")],
)
async def test_a_template_that_would_drop_earlier_reasoning_costs_nothing_more(agent: str, recording: str) -> None:
    turns = await replayed(agent, templates.QWEN_FORGETFUL, [f"{agent}/{recording}"], kept_by=templates.QWEN)

    assert not broken(turns)


@pytest.mark.parametrize(
    ("agent", "recording", "asked"),
    [
        ("codex", "ws-task-and-resume", [1, 5]),
        ("codex", "http-task-and-resume", [3]),
        ("pi", "chat-task-and-resume", [3]),
    ],
)
async def test_where_tools_move_to_the_last_question_a_question_reads_again_and_says_so(
    agent: str, recording: str, asked: list[int]
) -> None:
    turns = await replayed(agent, templates.QWEN_LATE_TOOLS, [f"{agent}/{recording}"])

    assert broken(turns) == {
        (f"{agent}/{recording}", number): "the chat template writes earlier turns anew" for number in asked
    }
