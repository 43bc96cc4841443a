"""openai's client and openai-agents."""

from pathlib import Path

import pytest

from tests.agents.clients import Desk, python_program
from tests.agents.house import MODEL, check_rows, check_turns, open_house
from tests.agents.scripted import Line

pytestmark = pytest.mark.agents

PROGRAMS = Path(__file__).parent
SCRIPT = [
    Line("fetch the word", "I shall look.", "A command will tell.", (("shell", {"command": "echo per42ennial"}),)),
    Line("per42ennial", "The word is per42ennial."),
    Line("say it again", "It still is per42ennial."),
]


async def test_the_client_goes_on_from_response_ids_on_any_socket_and_lane(tmp_path: Path) -> None:
    python = python_program()
    async with open_house(SCRIPT) as house:
        said = await Desk(tmp_path / "desk").run(python, PROGRAMS / "with_openai.py", house.url, MODEL)
        assert said.splitlines()[-3:] == [
            "The word is per42ennial.",
            "It still is per42ennial.",
            "stored It still is per42ennial.",
        ]
        check_turns(house.answers())
        check_rows(house)


@pytest.mark.parametrize("how", ["resent_over_websocket", "chained_over_websocket", "streamed_over_http"])
async def test_an_agent_of_openai_agents_calls_a_tool_and_goes_on(tmp_path: Path, how: str) -> None:
    python = python_program()
    async with open_house(SCRIPT) as house:
        said = await Desk(tmp_path / "desk").run(python, PROGRAMS / "with_openai_agents.py", house.url, MODEL, how)
        assert said.splitlines()[-2:] == ["The word is per42ennial.", "It still is per42ennial."]
        check_turns(house.answers())
        check_rows(house)
