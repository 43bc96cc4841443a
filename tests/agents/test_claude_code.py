"""claude-code."""

from pathlib import Path

import pytest

from tests.agents.clients import Desk, node_program
from tests.agents.house import MODEL, House, check_rows, check_turns, open_house
from tests.agents.scripted import Line

pytestmark = pytest.mark.agents

LOOKS = Line(
    "fetch the word",
    "I shall look.",
    "A command will tell.",
    (("Bash", {"command": "echo per$((40 + 2))ennial", "description": "Prints the word"}),),
)


def new_desk(place: Path, house: House) -> Desk:
    # Of another model than the one that the server has it would ask for titles.
    models = dict.fromkeys(("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL"), MODEL)
    quiet = dict.fromkeys(("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_AUTOUPDATER"), "1")
    return Desk(place / "desk", {"ANTHROPIC_BASE_URL": house.url, "ANTHROPIC_API_KEY": "any", **models, **quiet})


async def test_it_calls_a_tool_answers_and_goes_on_in_another_process(tmp_path: Path) -> None:
    claude = node_program("@anthropic-ai/claude-code", "claude")
    script = [LOOKS, Line("per42ennial", "The word is per42ennial."), Line("say it again", "It still is per42ennial.")]
    async with open_house(script) as house:
        desk = new_desk(tmp_path, house)
        said = await desk.run(claude, "-p", "fetch the word", "--allowedTools", "Bash")
        assert "The word is per42ennial." in said
        assert "It still is per42ennial." in await desk.run(claude, "-c", "-p", "say it again")
        check_turns(house.answers())
        check_rows(house)


async def test_it_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    claude = node_program("@anthropic-ai/claude-code", "claude")
    script = [
        LOOKS,
        Line("per42ennial", "The word is per42ennial."),
        Line("Go on, please", "I had said much."),
        Line("speak at length", "and so on " * 10_000),
    ]
    async with open_house(script) as house:
        desk = new_desk(tmp_path, house)
        await desk.run(claude, "-p", "fetch the word", "--allowedTools", "Bash")
        await desk.interrupt(house.spoken(100), claude, "-c", "-p", "speak at length")
        assert "I had said much." in await desk.run(claude, "-c", "-p", "Go on, please")
        *finished, resumed = house.answers()
        check_turns(finished)
        # What it had asked before the interrupt is not read again either.
        assert resumed.read.reused > finished[-1].read.total


async def test_it_compacts_its_history(tmp_path: Path) -> None:
    claude = node_program("@anthropic-ai/claude-code", "claude")
    script = [
        Line("detailed summary of the conversation", "<summary>A word was fetched.</summary>"),
        Line("say it again", "It still is per42ennial."),
        LOOKS,
        Line("per42ennial", "The word is per42ennial."),
    ]
    async with open_house(script) as house:
        desk = new_desk(tmp_path, house)
        await desk.run(claude, "-p", "fetch the word", "--allowedTools", "Bash")
        await desk.run(claude, "-c", "-p", "/compact")
        assert "It still is per42ennial." in await desk.run(claude, "-c", "-p", "say it again")
        first, second, compaction, after = house.answers()
        check_turns([first, second])
        # It asks for a summary in place of the last answer, and keeps tools and system.
        assert compaction.read.reused > second.read.prompt - 10
        assert after.read.reused > 0.75 * first.read.prompt
        check_rows(house)


async def test_it_has_its_context_counted(tmp_path: Path) -> None:
    claude = node_program("@anthropic-ai/claude-code", "claude")
    async with open_house([]) as house:
        said = await new_desk(tmp_path, house).run(claude, "-p", "/context")
        assert "System tools" in said
        counted = [one for one in house.recorder.exchanges if one.path.endswith("/count_tokens")]
        assert counted
        assert all(one.heard[-1]["input_tokens"] > 0 for one in counted)
        assert house.rows == 0
