"""codex, over a WebSocket and over HTTP."""

from pathlib import Path

import pytest

from tests.agents.clients import Desk, node_program
from tests.agents.house import MODEL, House, check_rows, check_turns, open_house
from tests.agents.scripted import Line

pytestmark = pytest.mark.agents

CONFIG = """
model = "{model}"
model_provider = "perennial"
{more}
[model_providers.perennial]
name = "Perennial"
base_url = "{url}/v1"
env_key = "PERENNIAL_API_KEY"
wire_api = "responses"
supports_websockets = {has_sockets}
"""
FREE = "--dangerously-bypass-approvals-and-sandbox"

is_either_way = pytest.mark.parametrize("has_sockets", [True, False], ids=["WebSocket", "HTTP"])


def looks(command: str) -> Line:
    return Line("fetch the word", "I shall look.", "A command will tell.", (("exec_command", {"cmd": command}),))


def new_desk(place: Path, house: House, has_sockets: bool, more: str = "") -> Desk:
    desk = Desk(place / "desk", {"PERENNIAL_API_KEY": "any"})
    config = CONFIG.format(model=MODEL, url=house.url, has_sockets=str(has_sockets).lower(), more=more)
    desk.write(".codex/config.toml", config)
    return desk


@is_either_way
async def test_it_calls_a_tool_answers_and_goes_on_in_another_process(tmp_path: Path, has_sockets: bool) -> None:
    codex = node_program("@openai/codex", "codex")
    script = [
        looks("echo per$((40 + 2))ennial"),
        Line("per42ennial", "The word is per42ennial."),
        Line("say it again", "It still is per42ennial."),
    ]
    async with open_house(script) as house:
        desk = new_desk(tmp_path, house, has_sockets)
        assert "The word is per42ennial." in await desk.run(codex, "exec", FREE, "fetch the word")
        assert "It still is per42ennial." in await desk.run(codex, "exec", "resume", "--last", FREE, "say it again")
        check_turns(house.answers())
        check_rows(house)


@is_either_way
async def test_it_goes_on_with_a_server_that_was_started_anew(tmp_path: Path, has_sockets: bool) -> None:
    codex = node_program("@openai/codex", "codex")
    script = [
        looks("echo per$((40 + 2))ennial"),
        Line("per42ennial", "The word is per42ennial."),
        Line("say it again", "It still is per42ennial."),
    ]
    async with open_house(script, tmp_path / "state") as house:
        desk = new_desk(tmp_path, house, has_sockets)
        await desk.run(codex, "exec", FREE, "fetch the word")
        before = house.answers()
    async with open_house(script, tmp_path / "state", house.address) as house:
        assert "It still is per42ennial." in await desk.run(codex, "exec", "resume", "--last", FREE, "say it again")
        check_turns([*before, *house.answers()])
        check_rows(house)


@is_either_way
async def test_it_goes_on_after_an_interrupt(tmp_path: Path, has_sockets: bool) -> None:
    codex = node_program("@openai/codex", "codex")
    script = [
        looks("echo per$((40 + 2))ennial"),
        Line("per42ennial", "The word is per42ennial."),
        Line("Go on, please", "I had said much."),
        Line("speak at length", "and so on " * 10_000),
    ]
    async with open_house(script) as house:
        desk = new_desk(tmp_path, house, has_sockets)
        await desk.run(codex, "exec", FREE, "fetch the word")
        await desk.interrupt(house.spoken(100), codex, "exec", "resume", "--last", FREE, "speak at length")
        assert "I had said much." in await desk.run(codex, "exec", "resume", "--last", FREE, "Go on, please")
        *finished, resumed = house.answers()
        check_turns(finished)
        # What it had asked before the interrupt is not read again either.
        assert resumed.read.reused > finished[-1].read.total


@is_either_way
async def test_it_compacts_its_history(tmp_path: Path, has_sockets: bool) -> None:
    codex = node_program("@openai/codex", "codex")
    script = [
        Line("CONTEXT CHECKPOINT COMPACTION", "Many numbers were read."),
        # Of what was said before a compaction the user's part stays.
        Line("say how many", "There were a thousand."),
        looks("seq 1000 1999"),
        Line("1998", "There were many."),
    ]
    async with open_house(script) as house:
        desk = new_desk(tmp_path, house, has_sockets, "model_auto_compact_token_limit = 21000")
        await desk.run(codex, "exec", FREE, "fetch the word")
        assert "There were a thousand." in await desk.run(codex, "exec", "resume", "--last", FREE, "say how many")
        first, second, compaction, after = house.answers()
        check_turns([first, second, compaction])
        check_rows(house)
        assert after.read.prompt < second.read.prompt
        assert after.read.read < 1000
