"""Peers as processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio
from transformers import __version__

from bench.peers.processes import Peer, PeerFailed, installed, last_words, measured, speeds
from bench.peers.servers import ServerKind, peer_server


async def test_what_an_interpreter_has_is_known_by_its_version() -> None:
    assert (await installed(sys.executable))["transformers"] == __version__


async def test_a_peer_that_fails_is_quoted() -> None:
    with pytest.raises(PeerFailed, match=r"No module named bench\.peers\.nobody"):
        await measured(sys.executable, Peer("nobody", "nobody", "nobody", ()))


async def test_transformers_is_measured_in_a_process_of_its_own(small_models: Mapping[str, Path]) -> None:
    peer = next(one for one in speeds(str(small_models["qwen3"]), 1, "float32") if one.package == "transformers")

    figures = await measured(sys.executable, peer)

    assert set(figures) == {"prefill", "decode, 1 stream", "decode, 4 streams", "decode, 8 streams"}
    assert all(0 < one.min <= one.median <= one.max for one in figures.values())


async def test_a_server_that_does_not_start_is_quoted() -> None:
    async def command(interpreter: str, directory: str, port: int, threads: int) -> list[str]:
        return [interpreter, "-c", "raise SystemExit('no room')"]

    with pytest.raises(PeerFailed, match="no room"):
        async with peer_server(ServerKind("nobody", "nobody", command), sys.executable, "", 1):
            pass


@pytest.mark.door
async def test_a_server_answers_a_conversation_and_is_gone_after_it() -> None:
    async def command(interpreter: str, directory: str, port: int, threads: int) -> list[str]:
        return [
            str(Path(interpreter).with_name("perennial")),
            "serve",
            "--bind",
            f"127.0.0.1:{port}",
            "--grpc_bind",
            "",
        ]

    with trio.fail_after(250):
        async with peer_server(ServerKind("ours", "perennial", command), sys.executable, "seedling", 1) as server:
            said = await server.answer([{"role": "user", "content": "Hello! My name is Anna."}], 40)
            held = server.resident_bytes

    assert "Anna" in said
    assert held > 0


def test_the_last_words_of_nobody() -> None:
    assert last_words(b" \n") == "it said nothing"
