"""Fork, save, restore and recovery: whatever happened to a session, its next tokens are those it would have given."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import Runtime, SessionHandle, open_runtime
from runtime import Overflow, Settings, Token
from runtime.durable import DirectoryStore, HistoryIdentity, SlabIdentity
from runtime.durable.files import Files
from runtime.errors import (
    CapacityExhausted,
    InvalidSetting,
    NotDurable,
    SessionNotFound,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotUnreadable,
)
from tests.actors.engines import VOCABULARY, LedgerEngine, generated, open_lab

PROMPT = [7, 8, 9, 10] * 10
MODEL = HistoryIdentity("ledger", VOCABULARY)
OTHER_MODEL = HistoryIdentity("other", VOCABULARY)
ENGINE = SlabIdentity("ledger", "ledger", "ledger", "none", "float64", "float64", 2, 14, 32)
OTHER_ENGINE = replace(ENGINE, kernels="of another CPU")


class WatchedFiles(Files):
    """Tells when a slab has come to its place."""

    def __init__(self) -> None:
        self.slab_is_there = trio.Event()

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        if target.suffix == ".slab":
            trio.from_thread.run_sync(self.slab_is_there.set)


class CountingFiles(Files):
    """Counts the slabs that were begun."""

    slabs_begun = 0

    def reuse(self, path: Path) -> int:
        self.slabs_begun += 1
        return super().reuse(path)


class HeldFiles(Files):
    """Tells when the writing of a slab begins, and goes on when it may."""

    def __init__(self) -> None:
        self.has_begun = trio.Event()
        self.may_go_on = threading.Event()

    def reuse(self, path: Path) -> int:
        if ".slab" in path.name:
            trio.from_thread.run_sync(self.has_begun.set)
            self.may_go_on.wait()
        return super().reuse(path)


@asynccontextmanager
async def open_durable(
    path: Path,
    model: HistoryIdentity = MODEL,
    engine: SlabIdentity = ENGINE,
    *,
    files: Files | None = None,
    most_bytes: int = 0,
    lab: LedgerEngine | None = None,
    **settings: Any,
) -> AsyncIterator[Runtime]:
    """A runtime on a ledger engine that keeps its sessions in `path`."""
    with ExitStack() as stack:
        store = stack.enter_context(DirectoryStore.open(str(path), model, engine, files=files, most_bytes=most_bytes))
        # A slow disk costs no test the slabs that it looks for.
        store.leaving_s = 1e9
        async with open_lab(lab or LedgerEngine(), store=store, **settings) as runtime:
            yield runtime


def everything(directory: Path) -> list[Path]:
    return [*directory.rglob("*")]


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
            async with trio.open_nursery() as leavers:
                leavers.start_soon(runtime.fork_session, session.id)
                await wait_all_tasks_blocked()
                leavers.cancel_scope.cancel()
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
    async with open_durable(tmp_path, OTHER_MODEL, capacity=1) as runtime:
        assert runtime.list_snapshots() == []
        with pytest.raises(SnapshotMismatch, match="another model"):
            await runtime.restore_session(saved.snapshot_id)

        await runtime.create_session()
    async with open_durable(tmp_path) as runtime:
        assert len(runtime.list_snapshots()) == 1


@pytest.mark.parametrize(
    "snapshot_id", ["nobody", "", "..", "../lock", "../sessions/x", "/etc/passwd", "a\0b", "a" * 300]
)
async def test_an_id_that_was_not_issued_finds_no_snapshot(tmp_path: Path, snapshot_id: str) -> None:
    async with open_durable(tmp_path) as runtime:
        with pytest.raises(SnapshotNotFound):
            await runtime.restore_session(snapshot_id)


async def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        saved = await runtime.save_session(session.id)
        path = tmp_path / "snapshots" / f"{saved.snapshot_id}.history"
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


async def test_a_session_that_was_closed_is_not_there_after_a_restart(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        closed = await runtime.create_session()
        await closed.append(PROMPT)
        await closed.close()
    async with open_durable(tmp_path) as runtime:
        with pytest.raises(SessionNotFound):
            runtime.find_session(closed.id)
    assert list((tmp_path / "sessions").iterdir()) == []


async def test_a_token_that_was_not_taken_is_not_there_after_a_restart(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT[:3])
        async with session.generate(10) as events:
            taken = [await anext(events) for _ in range(2)]
    async with open_durable(tmp_path) as runtime:
        assert (await runtime.find_session(session.id).info()).history_length == 3 + len(taken)


async def test_a_damaged_journal_is_one_sessions_loss(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        lost, kept = await runtime.create_session(), await runtime.create_session()
        await lost.append(PROMPT)
        await kept.append(PROMPT)
    path = tmp_path / "sessions" / f"{lost.id}.history"
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))
    async with open_durable(tmp_path) as runtime:
        with pytest.raises(SessionNotFound):
            runtime.find_session(lost.id)

        assert sorted(one.name for one in (tmp_path / "damaged").iterdir()) == [f"{lost.id}.history", f"{lost.id}.slab"]
        assert await generated(runtime.find_session(kept.id), 5) == LedgerEngine().continued(PROMPT, 5)


async def test_a_damaged_slab_on_disk_costs_time_only(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    path = tmp_path / "sessions" / f"{session.id}.slab"
    path.write_bytes(path.read_bytes()[:-1])
    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(session.id), 5) == LedgerEngine().continued(PROMPT, 5)


async def test_sessions_of_another_model_stay_on_disk_until_it_is_back(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    async with open_durable(tmp_path, OTHER_MODEL) as runtime:
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


async def test_under_another_engine_a_history_is_read_again_and_goes_on(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        saved = await runtime.save_session(session.id)
    lab = LedgerEngine()
    async with open_durable(tmp_path, engine=OTHER_ENGINE, lab=lab) as runtime:
        restored = await runtime.restore_session(saved.snapshot_id)

        assert await generated(runtime.find_session(session.id), 9) == LedgerEngine().continued(PROMPT, 9)
        assert await generated(restored, 9) == LedgerEngine().continued(PROMPT, 9)
    assert sum(len(batch.rows) for batch in lab.batches) >= 2 * len(PROMPT)


async def test_under_the_same_engine_nothing_is_read_again(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    lab = LedgerEngine()
    async with open_durable(tmp_path, lab=lab) as runtime:
        assert await generated(runtime.find_session(session.id), 9) == LedgerEngine().continued(PROMPT, 9)
    assert sum(len(batch.rows) for batch in lab.batches) == 9


async def test_more_sessions_than_slabs_all_go_on_with_their_own_tokens(tmp_path: Path) -> None:
    prompts = [[3 + number, *PROMPT] for number in range(7)]
    async with open_durable(tmp_path, capacity=2) as runtime:
        sessions = [await runtime.create_session() for _ in prompts]
        said: list[list[int]] = [[] for _ in prompts]
        for _ in range(3):
            for session, prompt, before in zip(sessions, prompts, said, strict=True):
                if not before:
                    await session.append(prompt)
                before += await generated(session, 4)
        assert len(runtime.list_sessions()) == len(prompts)
    async with open_durable(tmp_path, capacity=2) as runtime:
        for session, prompt, before in zip(sessions, prompts, said, strict=True):
            again = runtime.find_session(session.id)
            assert before + await generated(again, 3) == LedgerEngine().continued(prompt, 15)


async def test_the_session_used_longest_ago_falls_asleep_first_before_and_after_a_restart(tmp_path: Path) -> None:
    async with open_durable(tmp_path, capacity=2) as runtime:
        old, used = await runtime.create_session(label="old"), await runtime.create_session(label="used")
        await old.append(PROMPT)
        await used.append(PROMPT)
        await old.append([1])
        await runtime.create_session(label="new")
        await trio.testing.wait_all_tasks_blocked()
        assert [one.label for one in runtime.list_sessions()] == ["used", "old", "new"]
    with DirectoryStore.open(str(tmp_path), MODEL, ENGINE) as store:
        assert [one.terms.label for one in store.sleeping()] == ["used", "old", "new"]


async def test_two_calls_wake_a_session_once(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    async with open_durable(tmp_path, capacity=2) as runtime, trio.open_nursery() as nursery:
        for token in (1, 2):
            nursery.start_soon(runtime.find_session(session.id).append, [token])
    async with open_durable(tmp_path) as runtime:
        assert (await runtime.find_session(session.id).info()).history_length == len(PROMPT) + 2


async def test_where_every_slab_is_at_work_a_sleeping_session_says_so_and_sleeps_on(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    lab = LedgerEngine()
    async with open_durable(tmp_path, capacity=1, lab=lab) as runtime:
        busy = await runtime.create_session()
        lab.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy.append, PROMPT)
            await lab.begun()
            with pytest.raises(CapacityExhausted):
                await runtime.find_session(session.id).append([1])
            lab.open()
        assert (await runtime.find_session(session.id).append([1])).history_length == len(PROMPT) + 1


async def test_snapshots_are_listed_and_deleted(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session(label="mine")
        await session.append(PROMPT)
        saved = [await runtime.save_session(session.id) for _ in range(3)]
        listed = runtime.list_snapshots()
        assert [one.snapshot_id for one in listed] == [one.snapshot_id for one in saved]
        assert {(one.label, one.history_length) for one in listed} == {("mine", len(PROMPT))}

        assert await runtime.delete_snapshot(saved[1].snapshot_id) == saved[1].size_bytes

        with pytest.raises(SnapshotNotFound):
            await runtime.delete_snapshot(saved[1].snapshot_id)
        with pytest.raises(SnapshotNotFound):
            await runtime.restore_session(saved[1].snapshot_id)
    async with open_durable(tmp_path) as runtime:
        assert [one.snapshot_id for one in runtime.list_snapshots()] == [saved[0].snapshot_id, saved[2].snapshot_id]


async def test_the_directory_keeps_its_bound_and_the_oldest_go_first(tmp_path: Path) -> None:
    async with open_durable(tmp_path, most_bytes=20_000) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        saved = [await runtime.save_session(session.id) for _ in range(20)]

        kept = [one.snapshot_id for one in runtime.list_snapshots()]

        assert 0 < len(kept) < 20
        assert kept == [one.snapshot_id for one in saved[-len(kept) :]]
        size = sum(path.stat().st_size for path in everything(tmp_path) if path.is_file())
        assert size < 20_000 + saved[0].size_bytes
        await session.append([1])


def slabs(directory: Path) -> dict[str, int]:
    """The size of each session's slab in a directory, by the session's id."""
    return {path.stem: path.stat().st_size for path in directory.rglob("*.slab*")}


async def left_by(directory: Path) -> SessionHandle:
    """A session with a slab that a server without a bound left in a directory."""
    async with open_durable(directory) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    return session


async def test_slabs_that_are_left_on_disk_keep_the_bound_and_cost_no_session_and_no_snapshot(tmp_path: Path) -> None:
    free, bound = tmp_path / "free", tmp_path / "bound"
    left = await left_by(free)
    one_slab = slabs(free)[left.id]
    most_bytes = 4 * one_slab

    async with open_durable(bound, most_bytes=most_bytes, capacity=6) as runtime:
        sessions = [await runtime.create_session() for _ in range(6)]
        for session in sessions:
            await session.append(PROMPT)
        saved = await runtime.save_session(sessions[0].id)

    assert slabs(bound)
    assert sum(path.stat().st_size for path in everything(bound) if path.is_file()) < most_bytes
    async with open_durable(bound) as runtime:
        assert [one.snapshot_id for one in runtime.list_snapshots()] == [saved.snapshot_id]
        for session in sessions:
            assert await generated(runtime.find_session(session.id), 3) == LedgerEngine().continued(PROMPT, 3)


async def test_a_slab_takes_the_room_of_those_of_sessions_that_sleep(tmp_path: Path) -> None:
    old = await left_by(tmp_path)
    one_slab = slabs(tmp_path)[old.id]

    async with open_durable(tmp_path, most_bytes=2 * one_slab + one_slab // 2) as runtime:
        new = await runtime.create_session()
        await new.append(PROMPT)

    assert [*slabs(tmp_path)] == [new.id]
    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(old.id), 3) == LedgerEngine().continued(PROMPT, 3)


async def test_a_slab_for_which_there_is_no_room_is_not_begun(tmp_path: Path) -> None:
    free, bound = tmp_path / "free", tmp_path / "bound"
    left = await left_by(free)
    one_slab = slabs(free)[left.id]
    files = CountingFiles()

    async with open_durable(bound, files=files, most_bytes=one_slab) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)

    assert files.slabs_begun == 0
    async with open_durable(bound) as runtime:
        assert await generated(runtime.find_session(session.id), 3) == LedgerEngine().continued(PROMPT, 3)


async def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "sessions").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        async with open_durable(tmp_path) as runtime:
            session = await runtime.create_session()
            await session.append(PROMPT)
            await runtime.save_session(session.id)
    finally:
        os.umask(before)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in everything(tmp_path)}
    assert modes == {True: 0o700, False: 0o600}


async def test_a_slab_is_left_on_disk_while_its_session_is_idle(tmp_path: Path, autojump_clock: MockClock) -> None:
    files = WatchedFiles()
    # The clock jumps while a thread writes, too.
    async with open_durable(tmp_path, files=files, idle_ttl_s=0) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        assert not (tmp_path / "sessions" / f"{session.id}.slab").exists()

        await files.slab_is_there.wait()

        assert await generated(session, 5) == LedgerEngine().continued(PROMPT, 5)


async def test_a_message_that_waits_for_the_slab_to_be_written_is_answered_however_long_that_takes(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    files = HeldFiles()
    async with open_durable(tmp_path, files=files, idle_ttl_s=60) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        lengths: list[int] = []

        async def ask() -> None:
            lengths.append((await session.info()).history_length)

        await wait_all_tasks_blocked()
        mock_clock.jump(10)
        await files.has_begun.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            mock_clock.jump(100)
            await wait_all_tasks_blocked()
            files.may_go_on.set()

        assert lengths == [len(PROMPT)]


async def test_sessions_that_slept_too_long_are_deleted(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_durable(tmp_path, capacity=1) as runtime:
        old = await runtime.create_session()
        await old.append(PROMPT)
        await runtime.create_session()
    for path in (tmp_path / "sessions").iterdir():
        os.utime(path, (0, 0))
    moment = time.time() + 3600
    with DirectoryStore.open(str(tmp_path), MODEL, ENGINE, now=lambda: moment) as store:
        assert store.expire(7200) == 0
        assert store.expire(1800) == 2
    assert list((tmp_path / "sessions").iterdir()) == []


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


async def test_a_clients_session_is_there_after_a_restart_whatever_its_label(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session(label="conversation")
        await session.append(PROMPT)

    async with open_durable(tmp_path) as runtime:
        assert (await runtime.find_session(session.id).info()).history_length == len(PROMPT)
