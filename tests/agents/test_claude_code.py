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
