"""The examples do what they say, against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from examples import chat_loop, fork_four, survives_a_restart
from tests.contract.servers import started

pytestmark = pytest.mark.door


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
