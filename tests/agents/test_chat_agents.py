"""opencode, pi and qwen-code: agents that send the whole conversation each time, in the dialects that each speaks."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.agents.clients import Desk, node_program
from tests.agents.house import MODEL, Exchange, House, check_rows, check_turns, open_house
from tests.agents.scripted import Line

pytestmark = pytest.mark.agents

TITLE = Line("Generate a title", "About a word")
COMMAND = "echo per$((40 + 2))ennial"


@dataclass(frozen=True)
class Agent:
    """How an agent is pointed at a server, asked something, and asked to go on; and how it calls its shell.

    `rewrites` names the message that is another one when the agent goes on in another process.
    """

    package: str
    program: str
    configure: Callable[[Desk, str], None]
    ask: tuple[str, ...]
    go_on: tuple[str, ...]
    shell: tuple[str, Mapping[str, object]]
    rewrites: str | None = None

    @property
    def path(self) -> Path:
        return node_program(self.package, self.program)

    @property
    def looks(self) -> Line:
        return Line("fetch the word", "I shall look.", "A command will tell.", (self.shell,))


def opencode(library: str) -> Agent:
    def configure(desk: Desk, url: str) -> None:
        model = {"name": MODEL, "limit": {"context": 65_536, "output": 8_192}, "reasoning": True, "tool_call": True}
        provider = {
            "npm": library,
            "name": "Perennial",
            "options": {"baseURL": f"{url}/v1", "apiKey": "any"},
            "models": {MODEL: model},
        }
        config = {
            "provider": {"perennial": provider},
            "model": f"perennial/{MODEL}",
            "autoupdate": False,
            "share": "disabled",
        }
        desk.write(".config/opencode/opencode.json", json.dumps(config))

    shell = ("bash", {"command": COMMAND, "description": "Prints the word"})
    return Agent("opencode-ai", "opencode", configure, ("run", "--auto"), ("run", "--auto", "-c"), shell)


def pi(api: str, path: str = "/v1") -> Agent:
    def configure(desk: Desk, url: str) -> None:
        model = {"id": MODEL, "reasoning": True, "contextWindow": 65_536, "maxTokens": 8_192}
        provider = {"baseUrl": f"{url}{path}", "api": api, "apiKey": "any", "models": [model]}
        desk.write(".pi/agent/models.json", json.dumps({"providers": {"perennial": provider}}))

    options = ("-p", "--offline", "--provider", "perennial", "--model", MODEL)
    shell = ("bash", {"command": COMMAND})
    return Agent("@mariozechner/pi-coding-agent", "pi", configure, options, (*options, "-c"), shell)


def qwen_code() -> Agent:
    def configure(desk: Desk, url: str) -> None:
        settings = {
            "security": {"auth": {"selectedType": "openai", "apiKey": "any", "baseUrl": f"{url}/v1"}},
            "model": {"name": MODEL},
            "memory": {"enableManagedAutoMemory": False},
            "privacy": {"usageStatisticsEnabled": False},
            "general": {"disableAutoUpdate": True},
        }
        desk.write(".qwen/settings.json", json.dumps(settings))

    shell = ("run_shell_command", {"command": COMMAND, "is_background": False, "description": "Prints the word"})
    return Agent(
        "@qwen-code/qwen-code", "qwen", configure, ("--yolo", "-p"), ("--yolo", "-c", "-p"), shell, "messages.1"
    )


AGENTS = {
    "opencode over chat": opencode("@ai-sdk/openai-compatible"),
    "opencode over responses": opencode("@ai-sdk/openai"),
    "pi over chat": pi("openai-completions"),
    "pi over responses": pi("openai-responses"),
    "pi over messages": pi("anthropic-messages", ""),
    "qwen-code over chat": qwen_code(),
}
each_agent = pytest.mark.parametrize("agent", AGENTS.values(), ids=AGENTS.keys())


def turns_of(house: House) -> list[Exchange]:
    """The turns of the conversation itself: what is asked beside it, such as a title, is asked with fewer tools."""
    most = max(len(one.asked.get("tools", ())) for one in house.answers())
    return [one for one in house.answers() if len(one.asked.get("tools", ())) == most]


def check_resumed(agent: Agent, before: Exchange, after: Exchange) -> None:
    """What another process has gone on with cost what is new, or what follows the message that the agent rewrites."""
    if agent.rewrites is None:
        check_turns([before, after])
    else:
        assert after.read.broke_at == agent.rewrites
        assert after.read.read < 1000


@each_agent
async def test_it_calls_a_tool_answers_and_goes_on_in_another_process(tmp_path: Path, agent: Agent) -> None:
    program = agent.path
    script = [
        TITLE,
        agent.looks,
        Line("per42ennial", "The word is per42ennial."),
        Line("say it again", "It still is per42ennial."),
    ]
    async with open_house(script) as house:
        desk = Desk(tmp_path / "desk")
        agent.configure(desk, house.url)
        assert "The word is per42ennial." in await desk.run(program, *agent.ask, "fetch the word")
        assert "It still is per42ennial." in await desk.run(program, *agent.go_on, "say it again")
        first, second, resumed = turns_of(house)
        check_turns([first, second])
        check_resumed(agent, second, resumed)
        check_rows(house)


@each_agent
async def test_it_goes_on_after_an_interrupt(tmp_path: Path, agent: Agent) -> None:
    program = agent.path
    script = [
        TITLE,
        agent.looks,
        Line("per42ennial", "The word is per42ennial."),
        Line("Go on, please", "I had said much."),
        Line("speak at length", "and so on " * 10_000),
    ]
    async with open_house(script) as house:
        desk = Desk(tmp_path / "desk")
        agent.configure(desk, house.url)
        await desk.run(program, *agent.ask, "fetch the word")
        await desk.interrupt(house.spoken(100), program, *agent.go_on, "speak at length")
        assert "I had said much." in await desk.run(program, *agent.go_on, "Go on, please")
        first, second, resumed = turns_of(house)
        check_turns([first, second])
        # What it had asked before the interrupt is not read again either.
        assert resumed.read.reused > (second.read.total if agent.rewrites is None else first.read.prompt - 1000)
