"""The examples do what they say, against a real server, those in pages and docstrings too."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from api import client
from examples import chat_loop, fork_four, survives_a_restart
from tests.contract.servers import started

pytestmark = pytest.mark.door

ROOT = Path(__file__).parents[1]
GRPC = "127.0.0.1:50051"


def test_the_chat_loop_remembers_what_an_earlier_turn_said(capsys: pytest.CaptureFixture[str]) -> None:
    with started("perennial") as server:
        trio.run(chat_loop.main, server.grpc, ["Hello! My name is Anna.", "What is my name?"])

    first, _, second, answer = capsys.readouterr().out.splitlines()
    assert (first, second) == ("> Hello! My name is Anna.", "> What is my name?")
    assert "Anna" in answer


def test_four_forks_tell_a_story_each(capsys: pytest.CaptureFixture[str]) -> None:
    with started("perennial") as server:
        trio.run(fork_four.main, server.grpc)

    numbers, stories = zip(*(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()), strict=True)
    assert numbers == ("0", "1", "2", "3")
    assert all(stories)


def test_a_session_survives_the_kill_of_its_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    note = tmp_path / "session.txt"
    with started("perennial", state_dir=tmp_path / "state") as server:
        survives_a_restart.main(server.grpc, note)
        server.process.kill()
        server.process.wait()
    session_id = note.read_text()
    capsys.readouterr()

    with started("perennial", state_dir=tmp_path / "state") as server:
        survives_a_restart.main(server.grpc, note)

    assert note.read_text() == session_id
    assert "Anna" in capsys.readouterr().out


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with started("perennial") as server:
        yield server.grpc


def events_printed_by(program: str) -> list[str]:
    """The names of the events that `program` prints in a fresh interpreter, a line each."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.partition("(")[0] for line in done.stdout.splitlines()]


def python_in(page: Path) -> str:
    """The one program of a page."""
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return str(program)


def test_the_readmes_program_prints_the_events_of_a_generation() -> None:
    *tokens, last = events_printed_by(python_in(ROOT / "README.md"))

    assert {*tokens} == {"Token"}
    assert last == "Done"


def test_the_program_of_the_clients_readme_prints_the_events_of_a_generation(address: str) -> None:
    *tokens, last = events_printed_by(python_in(ROOT / "client" / "README.md").replace(GRPC, address))

    assert {*tokens} == {"Token"}
    assert last == "Done"


@pytest.mark.parametrize("loop", ["trio.run(main)", "asyncio.run(main())"])
def test_the_example_in_the_clients_docstring_works_in_either_loop(loop: str, address: str) -> None:
    example = inspect.cleandoc(client.__doc__ or "").split("\n\n")[1]
    program = f"import asyncio, trio\nfrom api.client import connect\nasync def main():\n{example}\n{loop}"

    *tokens, last = events_printed_by(program.replace(GRPC, address))

    assert {*tokens} == {"Token"}
    assert last == "Done"
