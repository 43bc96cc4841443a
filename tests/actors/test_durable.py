"""Fork, save, restore and recovery: whatever happened to a session, its next tokens are those it would have given."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from actors import Runtime, open_runtime
from runtime import Overflow, Settings, Token
from runtime.errors import (
    CapacityExhausted,
    InvalidSetting,
    NotDurable,
    SessionNotFound,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotUnreadable,
)
from runtime.snapshot import Identity
from runtime.state import StateDirectory
from tests.actors.engines import LedgerEngine, generated, open_lab

PROMPT = [7, 8, 9, 10] * 10
IDENTITY = Identity("ledger", "ledger", "ledger", "none", "float64", 2, 14, 22)


@asynccontextmanager
async def open_durable(path: Path, identity: Identity = IDENTITY, **settings: Any) -> AsyncIterator[Runtime]:
    """A runtime on a ledger engine that keeps its sessions in `path`."""
    with ExitStack() as stack:
        state = stack.enter_context(StateDirectory.open(str(path), identity))
        async with open_lab(LedgerEngine(), state=state, **settings) as runtime:
            yield runtime


async def test_a_fork_and_its_original_go_on_alike_and_apart() -> None:
    async with open_lab(LedgerEngine()) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        fork = await runtime.fork_session(session.id)
        await session.append([1])

        tokens = await generated(fork, 20)

        assert tokens == LedgerEngine().continued(PROMPT, 20)
        assert await generated(session, 20) == LedgerEngine().continued([*PROMPT, 1], 20)


async def test_a_fork_runs_no_forward() -> None:
    engine = LedgerEngine()
    async with open_lab(engine) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        before = len(engine.batches)

        fork = await runtime.fork_session(session.id)

        assert (await fork.info()).history_digest == (await session.info()).history_digest
        assert len(engine.batches) == before


async def test_a_fork_waits_for_what_the_original_is_doing() -> None:
    async with open_lab(LedgerEngine()) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        async with session.generate(3) as events, trio.open_nursery() as nursery:
            forks: list[str] = []

            async def fork() -> None:
                forks.append((await runtime.fork_session(session.id)).id)

            nursery.start_soon(fork)
            tokens = [event.token_id async for event in events if isinstance(event, Token)]

        assert (await runtime.find_session(forks[0]).info()).history_length == len(PROMPT) + len(tokens)


async def test_a_fork_never_evicts_its_own_original() -> None:
    async with open_lab(LedgerEngine(), capacity=1) as runtime:
        session = await runtime.create_session()

        with pytest.raises(CapacityExhausted):
            await runtime.fork_session(session.id)

        await session.append(PROMPT)


async def test_a_fork_that_is_cancelled_in_the_line_leaves_no_slab_behind() -> None:
    engine = LedgerEngine()
    async with open_lab(engine, capacity=2) as runtime:
        session = await runtime.create_session()
        engine.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.append, PROMPT)
            await engine.begun()
            with trio.move_on_after(0.01):
                await runtime.fork_session(session.id)
            engine.open()

        await runtime.create_session()

        assert runtime.metrics.registry.get_sample_value("perennial_slab_in_use") == 2


async def test_a_restored_session_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session((5,), overflow=Overflow.EVICT, label="kept")
        await session.append(PROMPT)
        saved = await runtime.save_session(session.id)
        await session.close()

        restored = await runtime.restore_session(saved.snapshot_id)

        assert (await restored.info()).history_length == saved.history_length == len(PROMPT)
        tokens = await generated(restored, 20)
        assert tokens == LedgerEngine().continued(PROMPT, 20)[: len(tokens)]
        assert [one.label for one in runtime.list_sessions()] == ["kept"]


async def test_a_snapshot_outlives_the_server(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        saved = await runtime.save_session(session.id)
    async with open_durable(tmp_path) as runtime:
        restored = await runtime.restore_session(saved.snapshot_id)

        assert await generated(restored, 20) == LedgerEngine().continued(PROMPT, 20)


async def test_a_snapshot_of_another_model_is_refused_and_costs_no_slab(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        saved = await runtime.save_session(session.id)
        await session.close()
    other = Identity("other", "ledger", "ledger", "none", "float64", 2, 14, 22)
    async with open_durable(tmp_path, other, capacity=1) as runtime:
        with pytest.raises(SnapshotMismatch):
            await runtime.restore_session(saved.snapshot_id)

        await runtime.create_session()


@pytest.mark.parametrize("snapshot_id", ["nobody", "", "..", "../lock", "../sessions/x", "/etc/passwd", "a\0b"])
async def test_an_id_that_was_not_issued_finds_no_snapshot(tmp_path: Path, snapshot_id: str) -> None:
    async with open_durable(tmp_path) as runtime:
        with pytest.raises(SnapshotNotFound):
            await runtime.restore_session(snapshot_id)


async def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        saved = await runtime.save_session(session.id)
        path = tmp_path / "snapshots" / f"{saved.snapshot_id}.safetensors"
        path.write_bytes(path.read_bytes()[:-7])

        with pytest.raises(SnapshotUnreadable):
            await runtime.restore_session(saved.snapshot_id)


async def test_without_a_state_dir_nothing_can_be_saved() -> None:
    async with open_lab(LedgerEngine()) as runtime:
        session = await runtime.create_session()

        with pytest.raises(NotDurable):
            await runtime.save_session(session.id)


@pytest.mark.parametrize("generates", [0, 3, 40])
async def test_a_session_is_there_after_a_restart_and_goes_on(tmp_path: Path, generates: int) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session(label="durable")
        await session.append(PROMPT)
        before = await generated(session, generates) if generates else []
    async with open_durable(tmp_path) as runtime:
        again = runtime.find_session(session.id)

        after = await generated(again, 10)

        assert before + after == LedgerEngine().continued(PROMPT, generates + 10)
        assert [one.label for one in runtime.list_sessions()] == ["durable"]


async def test_a_session_that_was_closed_or_evicted_is_not_there_after_a_restart(tmp_path: Path) -> None:
    async with open_durable(tmp_path, capacity=1) as runtime:
        evicted = await runtime.create_session()
        closed = await runtime.create_session()
        await closed.close()
    async with open_durable(tmp_path) as runtime:
        for session in (evicted, closed):
            with pytest.raises(SessionNotFound):
                runtime.find_session(session.id)
    assert list((tmp_path / "sessions").iterdir()) == []


async def test_a_token_that_was_not_taken_is_not_there_after_a_restart(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT[:3])
        async with session.generate(10) as events:
            taken = [(await anext(events)).token_id for _ in range(2)]
    async with open_durable(tmp_path) as runtime:
        assert (await runtime.find_session(session.id).info()).history_length == 3 + len(taken)


async def test_a_damaged_journal_is_one_sessions_loss(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        lost, kept = await runtime.create_session(), await runtime.create_session()
        await lost.append(PROMPT)
        await kept.append(PROMPT)
    for path in (tmp_path / "sessions").glob(f"{lost.id}.journal*"):
        path.write_bytes(random.Random(0).randbytes(path.stat().st_size))
    async with open_durable(tmp_path) as runtime:
        with pytest.raises(SessionNotFound):
            runtime.find_session(lost.id)

        assert await generated(runtime.find_session(kept.id), 5) == LedgerEngine().continued(PROMPT, 5)


async def test_a_damaged_slab_on_disk_costs_time_only(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    path = tmp_path / "sessions" / f"{session.id}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(session.id), 5) == LedgerEngine().continued(PROMPT, 5)


async def test_sessions_of_another_model_stay_on_disk_until_it_is_back(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    async with open_durable(tmp_path, Identity("other", "ledger", "ledger", "none", "float64", 2, 14, 22)) as runtime:
        with pytest.raises(SessionNotFound):
            runtime.find_session(session.id)
    async with open_durable(tmp_path) as runtime:
        assert (await runtime.find_session(session.id).info()).history_length == len(PROMPT)


async def test_two_servers_never_share_a_state_dir(tmp_path: Path) -> None:
    async with open_durable(tmp_path):
        with pytest.raises(InvalidSetting, match="in use"):
            async with open_durable(tmp_path):
                pass


async def test_a_state_dir_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InvalidSetting, match="state_dir"):
        async with open_durable(tmp_path / "file" / "state"):
            pass


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 11}])
async def test_seedling_goes_on_bit_for_bit_after_fork_restore_and_restart(
    tmp_path: Path, sampling: dict[str, Any]
) -> None:
    settings = Settings(device="cpu", sink=4, window=60, state_dir=str(tmp_path))
    prompt = [3 + (7 * place) % 2000 for place in range(150)]
    async with open_runtime(settings) as runtime:
        session = await runtime.create_session()
        await session.append(prompt)
        fork = await runtime.fork_session(session.id)
        saved = await runtime.save_session(session.id)
        restored = await runtime.restore_session(saved.snapshot_id)
        expected = await generated(await runtime.fork_session(session.id), 30, **sampling)
        forked = await generated(fork, 30, **sampling)
        from_disk = await generated(restored, 30, **sampling)
    async with open_runtime(settings) as runtime:
        recovered = await generated(runtime.find_session(session.id), 30, **sampling)

    assert expected == forked == from_disk == recovered
