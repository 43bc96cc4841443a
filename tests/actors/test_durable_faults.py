"""Sessions on a disk that fails, under a server that is killed: nothing acknowledged is lost, nothing wrong is told."""

from __future__ import annotations

import hashlib
import random
import struct
import threading
from array import array
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from actors import Runtime, SessionHandle
from runtime.durable import DirectoryStore, Terms
from runtime.durable.files import Files
from runtime.durable.framing import CHECKSUM_BYTES, checksum
from runtime.errors import (
    CapacityExhausted,
    RequestError,
    SessionNotFound,
    SnapshotMismatch,
    SnapshotUnreadable,
    StorageFailed,
)
from runtime.events import Token
from tests.actors.engines import LedgerEngine, generated
from tests.actors.test_durable import ENGINE, MODEL, PROMPT, everything, open_durable
from tests.runtime.durable.faults import FAULTS, FaultyFiles

OPERATIONS = ("create", "append", "append", "generate", "generate", "fork", "save", "restore", "close", "info")


class Step(NamedTuple):
    """One call, on the session of this number among those that live, with what it brings."""

    operation: str
    session: int
    tokens: tuple[int, ...]
    fault: tuple[int | None, int, float] | None


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(OPERATIONS),
        st.integers(0, 5),
        st.lists(st.integers(3, 50), min_size=1, max_size=25).map(tuple),
        st.none() | st.tuples(st.sampled_from([*FAULTS, None]), st.integers(0, 8), st.floats(0, 1)),
    ),
    max_size=14,
)


class Client:
    """Remembers what it was told, and what may have happened besides when a call had no answer."""

    def __init__(self) -> None:
        self.sessions: dict[str, list[list[int]]] = {}
        self.snapshots: dict[str, list[int]] = {}
        self.closing: set[str] = set()

    def chosen(self, number: int) -> str | None:
        ids = sorted(self.sessions)
        return ids[number % len(ids)] if ids else None

    async def check(self, runtime: Runtime) -> None:
        """Each session has one of the histories that it may have, and goes on as that history does."""
        for session_id, possible in list(self.sessions.items()):
            try:
                session = runtime.find_session(session_id)
            except SessionNotFound:
                assert session_id in self.closing
                del self.sessions[session_id]
                continue
            info = await session.info()
            found = [history for history in possible if digest(history) == info.history_digest]
            assert found, f"{info.history_length} tokens, and none of {[len(one) for one in possible]}"
            self.sessions[session_id] = [found[0]]
            if found[0]:
                tokens = await generated(session, 2)
                assert tokens == LedgerEngine().continued(found[0], 2)
                self.sessions[session_id] = [found[0] + tokens]
        for snapshot_id, history in self.snapshots.items():
            restored = await runtime.restore_session(snapshot_id)
            assert (await restored.info()).history_digest == digest(history)
            await restored.close()


def digest(history: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("I", history).tobytes()).digest()


async def served(path: Path, client: Client, steps: list[Step], files: FaultyFiles) -> None:
    """One life of a server, in which these calls are made."""
    async with open_durable(path, files=files, capacity=2) as runtime:
        await client.check(runtime)
        for step in steps:
            if step.fault:
                error, after, share = step.fault
                files.fail_next(error, after, share=share)
            try:
                await called(runtime, client, step)
            except (StorageFailed, CapacityExhausted):
                pass
            finally:
                if files.error is not None:
                    files.heal()


async def called(runtime: Runtime, client: Client, step: Step) -> None:
    if step.operation == "create":
        session = await runtime.create_session()
        client.sessions[session.id] = [[]]
        return
    session_id = client.chosen(step.session)
    if session_id is None:
        return
    session, history = runtime.find_session(session_id), client.sessions[session_id][0]
    match step.operation:
        case "append":
            client.sessions[session_id] = [history, history + list(step.tokens)]
            await session.append(step.tokens, len(history))
            client.sessions[session_id] = [history + list(step.tokens)]
        case "generate" if history:
            await drew(client, session, history, len(step.tokens))
        case "fork":
            fork = await runtime.fork_session(session_id)
            client.sessions[fork.id] = [list(history)]
        case "save":
            client.snapshots[(await runtime.save_session(session_id)).snapshot_id] = list(history)
        case "restore" if client.snapshots:
            snapshot_id = sorted(client.snapshots)[step.session % len(client.snapshots)]
            restored = await runtime.restore_session(snapshot_id)
            client.sessions[restored.id] = [list(client.snapshots[snapshot_id])]
        case "close":
            client.closing.add(session_id)
            assert await session.close() == len(history)
            del client.sessions[session_id]
        case "info":
            assert (await session.info()).history_length == len(history)


async def drew(client: Client, session: SessionHandle, history: list[int], count: int) -> None:
    """Takes up to so many tokens; the one that was on its way when all ended may have been recorded."""
    expected = LedgerEngine().continued(history, count + 1)
    taken: list[int] = []
    client.sessions[session.id] = [history, history + expected[:1]]
    async with session.generate(count) as events:
        async for event in events:
            if isinstance(event, Token):
                taken.append(event.token_id)
                assert taken == expected[: len(taken)]
                so_far = history + taken
                client.sessions[session.id] = [so_far, so_far + expected[len(taken) : len(taken) + 1]]
    client.sessions[session.id] = [history + taken]


@settings(max_examples=100)
@given(lives=st.lists(STEPS, min_size=1, max_size=4))
def test_nothing_acknowledged_is_lost_whatever_fails_and_whenever_the_server_is_killed(lives: list[list[Step]]) -> None:
    client = Client()
    with TemporaryDirectory() as directory:
        for steps in (*lives, []):
            files = FaultyFiles()
            try:
                trio.run(served, Path(directory), client, steps, files)
            except BaseException:
                # What a process that is killed would have answered, nobody hears.
                if not files.is_killed:
                    raise
            finally:
                files.reap()


@pytest.mark.parametrize("error", FAULTS)
@pytest.mark.parametrize("call", ["create", "fork", "save"])
async def test_a_call_that_cannot_be_recorded_says_so_and_leaves_nothing_behind(
    tmp_path: Path, mock_clock: MockClock, call: str, error: int
) -> None:
    # While the clock stands still, no thread begins a slab that would meet the fault in the call's place.
    files = FaultyFiles()
    async with open_durable(tmp_path, files=files) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "create": runtime.create_session,
            "fork": lambda: runtime.fork_session(session.id),
            "save": lambda: runtime.save_session(session.id),
        }
        before = names(tmp_path)
        for after in range(4):
            files.fail_next(error, after)
            with pytest.raises(StorageFailed, match="state_dir cannot be used") as caught:
                await calls[call]()
            assert len(str(caught.value).splitlines()) == 1
            files.heal()
            assert names(tmp_path) == before

        assert await generated(session, 5) == LedgerEngine().continued(PROMPT, 5)
        assert runtime.metrics.registry.get_sample_value("perennial_slab_in_use") == 1


@pytest.mark.parametrize("error", FAULTS)
async def test_an_append_that_cannot_be_recorded_changes_nothing_and_its_retry_works(
    tmp_path: Path, mock_clock: MockClock, error: int
) -> None:
    # While the clock stands still, no thread begins a slab that would meet the fault in the call's place.
    files = FaultyFiles()
    async with open_durable(tmp_path, files=files) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        for after in (0, 1):
            files.fail_next(error, after)
            with pytest.raises(StorageFailed):
                await session.append([1, 2], len(PROMPT))
            files.heal()

        assert (await session.append([1, 2], len(PROMPT))).history_length == len(PROMPT) + 2
    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(session.id), 5) == LedgerEngine().continued([*PROMPT, 1, 2], 5)


async def test_a_close_whose_files_cannot_be_deleted_ends_that_session_alone(tmp_path: Path) -> None:
    files = FaultyFiles()
    async with open_durable(tmp_path, files=files) as runtime:
        closed, other = await runtime.create_session(), await runtime.create_session()
        files.fail_next(FAULTS[1], 0, count=10)
        await closed.close()
        files.heal()

        with pytest.raises(SessionNotFound):
            await closed.append([1])
        await other.append(PROMPT)


async def test_where_a_history_cannot_be_read_just_now_its_session_sleeps_on(tmp_path: Path) -> None:
    files = FaultyFiles()
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    async with open_durable(tmp_path, files=files) as runtime:
        again = runtime.find_session(session.id)
        files.fail_next(FAULTS[3])
        with pytest.raises(StorageFailed, match="sleeps on"):
            await again.append([1])
        files.heal()

        assert await generated(again, 3) == LedgerEngine().continued(PROMPT, 3)


@pytest.mark.parametrize("error", FAULTS)
async def test_a_stream_that_is_left_while_nothing_can_be_written_costs_no_later_call(
    tmp_path: Path, mock_clock: MockClock, error: int
) -> None:
    # While the clock stands still, no thread begins a slab that would meet the fault in the call's place.
    files = FaultyFiles()
    async with open_durable(tmp_path, files=files) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT[:3])
        async with session.generate(10) as events:
            taken = [event.token_id for event in [await anext(events), await anext(events)] if isinstance(event, Token)]
            files.fail_next(error, count=100)
        length = (await session.info()).history_length
        files.heal()

        assert length == 3 + len(taken)
        for token in (1, 2):
            length = (await session.append([token], length)).history_length
    history = [*PROMPT[:3], *taken, 1, 2]
    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(session.id), 5) == LedgerEngine().continued(history, 5)


async def test_tokens_that_the_model_does_not_have_cost_their_session_and_their_snapshot_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = array("I", [1, 2, 5_000_000])
    slab = LedgerEngine().new_pool(1).acquire()
    with DirectoryStore.open(str(tmp_path), MODEL, ENGINE) as store:
        session_id = store.create(Terms(), history).id
        snapshot_id = store.save(Terms(), history, slab).snapshot_id
    for _ in range(2):
        async with open_durable(tmp_path) as runtime:
            with pytest.raises(SessionNotFound):
                await runtime.find_session(session_id).append([1])
            with pytest.raises(SnapshotUnreadable):
                await runtime.restore_session(snapshot_id)
            other = await runtime.create_session()
            await other.append(PROMPT)

            assert await generated(other, 5) == LedgerEngine().continued(PROMPT, 5)
    assert caplog.text.count(session_id) == 1


def of_format(content: bytes, number: int) -> bytes:
    """A file as a server of this format would have begun it."""
    head = struct.Struct("<8sII")
    magic, _, length = head.unpack_from(content)
    changed = head.pack(magic, number, length) + content[head.size : head.size + length]
    return changed + checksum(changed) + content[head.size + length + CHECKSUM_BYTES :]


@pytest.mark.parametrize("number", [0, 2, 2**32 - 1])
async def test_a_file_of_another_format_is_left_as_it_is_with_one_line(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        saved = await runtime.save_session(session.id)
    paths = [path for path in everything(tmp_path) if path.suffix == ".history"]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(of_format(content, number))
    caplog.clear()
    async with open_durable(tmp_path) as runtime:
        with pytest.raises(SessionNotFound):
            runtime.find_session(session.id)
        with pytest.raises(SnapshotMismatch, match=f"format {number}"):
            await runtime.restore_session(saved.snapshot_id)
    assert [path.read_bytes() for path in paths] == [of_format(content, number) for content in contents]
    for path, content in zip(paths, contents, strict=True):
        assert caplog.text.count(path.stem) == 1
        path.write_bytes(content)
    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(session.id), 5) == LedgerEngine().continued(PROMPT, 5)


async def test_a_slab_of_another_format_costs_time_only(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
    path = tmp_path / "sessions" / f"{session.id}.slab"
    path.write_bytes(of_format(path.read_bytes(), 2))
    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(session.id), 5) == LedgerEngine().continued(PROMPT, 5)


class ThreadedFiles(Files):
    """Notes in which threads slabs are written and read."""

    def __init__(self) -> None:
        self.threads: dict[str, set[int]] = {"write": set(), "read": set()}
        self._slabs: set[int] = set()

    def create(self, path: Path) -> int:
        return self._noted(path, super().create(path))

    def reuse(self, path: Path) -> int:
        return self._noted(path, super().reuse(path))

    def open(self, path: Path) -> int:
        return self._noted(path, super().open(path))

    def close(self, file: int) -> None:
        self._slabs.discard(file)
        super().close(file)

    def write(self, file: int, offset: int, content: bytes | memoryview) -> None:
        self._note("write", file)
        super().write(file, offset, content)

    def read(self, file: int, offset: int, count: int) -> bytes:
        self._note("read", file)
        return super().read(file, offset, count)

    def _noted(self, path: Path, file: int) -> int:
        if "slab" in path.suffix:
            self._slabs.add(file)
        return file

    def _note(self, operation: str, file: int) -> None:
        if file in self._slabs:
            self.threads[operation].add(threading.get_ident())


async def test_slabs_are_written_and_read_beside_the_loop(tmp_path: Path) -> None:
    files = ThreadedFiles()
    async with open_durable(tmp_path, files=files) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        saved = await runtime.save_session(session.id)
    async with open_durable(tmp_path, files=files) as runtime:
        await runtime.find_session(session.id).append([1])
        await runtime.restore_session(saved.snapshot_id)

    assert all(files.threads.values())
    assert threading.get_ident() not in files.threads["write"] | files.threads["read"]


async def test_a_snapshot_for_which_there_is_no_folder_costs_nothing_else(tmp_path: Path) -> None:
    async with open_durable(tmp_path) as runtime:
        session = await runtime.create_session()
        await session.append(PROMPT)
        (tmp_path / "snapshots").rmdir()
        with pytest.raises(StorageFailed):
            await runtime.save_session(session.id)

        await session.append([1])
    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(session.id), 5) == LedgerEngine().continued([*PROMPT, 1], 5)


@pytest.mark.parametrize("seed", range(60))
async def test_a_directory_that_was_touched_costs_the_touched_session_at_most(tmp_path: Path, seed: int) -> None:
    await lost_by_touching(tmp_path, seed)


async def lost_by_touching(directory: Path, seed: int) -> int:
    """How many of three sessions and a snapshot are gone once bytes were flipped, zeroed or cut off, or files changed places.

    Each other one has the history that it had, and goes on as it would have.
    """
    prompts = [[3 + number, *PROMPT] for number in range(3)]
    async with open_durable(directory) as runtime:
        ids = []
        for prompt in prompts:
            session = await runtime.create_session()
            await session.append(prompt[:9])
            await session.append(prompt[9:])
            ids.append(session.id)
        saved = await runtime.save_session(ids[0])
    touched = touch(directory, random.Random(seed))
    lost = 0
    async with open_durable(directory) as runtime:
        for session_id, prompt in zip(ids, prompts, strict=True):
            try:
                session = runtime.find_session(session_id)
                assert (await session.info()).history_digest == digest(prompt)
                assert await generated(session, 16) == LedgerEngine().continued(prompt, 16)
            except SessionNotFound:
                assert session_id in touched
                lost += 1
        try:
            restored = await runtime.restore_session(saved.snapshot_id)
            assert await generated(restored, 16) == LedgerEngine().continued(prompts[0], 16)
        except RequestError:
            assert saved.snapshot_id in touched
            lost += 1
    return lost


def touch(directory: Path, choice: random.Random) -> set[str]:
    """Damages one file, or swaps two; the ids of those that were damaged."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in (".history", ".slab"))
    path = choice.choice(files)
    content = bytearray(path.read_bytes())
    match choice.choice(["flip", "zero", "cut", "swap", "remove", "garbage"]):
        case "flip":
            for _ in range(choice.choice([1, 1, 5])):
                content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        case "zero":
            first = choice.randrange(len(content))
            content[first : first + 4096] = bytes(len(content[first : first + 4096]))
        case "cut":
            del content[choice.randrange(len(content)) :]
        case "garbage":
            content[:] = choice.randbytes(len(content))
        case "remove":
            path.unlink()
            return {path.stem}
        case _:
            other = choice.choice([one for one in files if one.suffix == path.suffix and one != path])
            content, theirs = bytearray(other.read_bytes()), bytes(content)
            other.write_bytes(theirs)
            path.write_bytes(content)
            return {path.stem, other.stem}
    path.write_bytes(content)
    return {path.stem}


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.parametrize("name", ["{id}.slab", "{id}.history", "x.slab", "x.history"])
async def test_a_file_that_cannot_be_looked_at_costs_its_own_session_at_most(tmp_path: Path, name: str) -> None:
    async with open_durable(tmp_path) as runtime:
        sessions = [await runtime.create_session() for _ in range(2)]
        for session in sessions:
            await session.append(PROMPT)
    file = tmp_path / "sessions" / name.format(id=sessions[0].id)
    file.unlink(missing_ok=True)
    file.symlink_to(file)

    async with open_durable(tmp_path) as runtime:
        assert await generated(runtime.find_session(sessions[1].id), 5) == LedgerEngine().continued(PROMPT, 5)
        if not name.endswith("history"):
            assert await generated(runtime.find_session(sessions[0].id), 5) == LedgerEngine().continued(PROMPT, 5)
