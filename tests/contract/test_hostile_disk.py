"""Servers of every kind on a disk that is full, damaged, or open to others: no call is lost in silence, no record deleted."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.contract.servers import KINDS, PATIENT, ServerProcess, complaints, processes_of, started
from tests.contract.stubs import PROMPT, Stock, Stubs, refused, stock

pytestmark = pytest.mark.door

# What a disk does is met by the store, which is the same under each of Hypercorn's workers.
each_kind = pytest.mark.parametrize("kind", KINDS[:2])
needs_prlimit = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")


@contextmanager
def full_disk(server: ServerProcess) -> Iterator[None]:
    """No process of the server can write into a file in the block, as on a disk without room."""
    before = {each.pid: resource.prlimit(each.pid, resource.RLIMIT_FSIZE) for each in processes_of(server)}
    try:
        for pid, (_, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        yield
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def files_in(directory: Path) -> dict[str, int]:
    """Names and sizes of all files."""
    return {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()}


def fork(client: Stock, session_id: str) -> str:
    forked: str = client.call("ForkSession", session_id=session_id).session_id
    return forked


@needs_prlimit
@each_kind
def test_on_a_full_disk_calls_say_so_and_nothing_is_lost(kind: str, stubs: Stubs, tmp_path: Path) -> None:
    with started(kind, state_dir=tmp_path) as server, stock(stubs, server.grpc) as client:
        session_id = client.create(PROMPT)
        expected = client.generated(fork(client, session_id), 10)
        before = files_in(tmp_path)
        with full_disk(server):
            for call in (
                client.create,
                lambda: fork(client, session_id),
                lambda: client.call("SaveSession", session_id=session_id),
                lambda: client.append(session_id, [1, 2]),
                lambda: client.generated(session_id, 2),
            ):
                with refused(grpc.StatusCode.UNAVAILABLE) as words:
                    call()
                assert words[0].startswith("state_dir cannot be used: ")
                assert "\n" not in words[0]
        assert files_in(tmp_path) == before

        assert client.generated(session_id, 10) == expected
        assert server.stop() == 0
    with started(kind, state_dir=tmp_path) as server, stock(stubs, server.grpc) as client:
        assert client.info(session_id).history_length == len(PROMPT) + 10


@each_kind
def test_without_its_folder_a_snapshot_is_refused_and_the_session_goes_on(
    kind: str, stubs: Stubs, tmp_path: Path
) -> None:
    with started(kind, state_dir=tmp_path) as server, stock(stubs, server.grpc) as client:
        session_id = client.create(PROMPT)
        expected = client.generated(fork(client, session_id), 10)
        shutil.rmtree(tmp_path / "snapshots")

        with refused(grpc.StatusCode.INTERNAL) as words:
            client.call("SaveSession", session_id=session_id)

        assert "\n" not in words[0]
        assert client.generated(session_id, 10) == expected
        assert (tmp_path / "sessions" / f"{session_id}.history").exists()


@each_kind
def test_an_id_of_any_length_is_not_found(kind: str, stubs: Stubs, tmp_path: Path) -> None:
    with started(kind, state_dir=tmp_path) as server, stock(stubs, server.grpc) as client:
        for long in ("x" * 300, "x" * 100_000, "../" * 100, "é" * 300):
            for method in ("RestoreSession", "DeleteSnapshot"):
                with refused(grpc.StatusCode.NOT_FOUND):
                    client.call(method, snapshot_id=long)
            for method in ("GetSessionInfo", "ForkSession", "SaveSession", "CloseSession", "AppendTokens"):
                with refused(grpc.StatusCode.NOT_FOUND):
                    client.call(method, session_id=long)
        assert server.stop() == 0
    assert complaints("".join(server.said)) == []


@each_kind
@pytest.mark.parametrize("umask", [0, 0o277])
def test_a_directory_open_to_others_holds_nothing_that_others_may_read(
    kind: str, umask: int, stubs: Stubs, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o755)
    before = os.umask(umask)
    try:
        with started(kind, application=PATIENT, state_dir=state) as server, stock(stubs, server.grpc) as client:
            session_id = client.create(PROMPT)
            client.call("SaveSession", session_id=session_id)
            assert server.stop() == 0
    finally:
        os.umask(before)

    assert {path.is_dir(): path.stat().st_mode & 0o777 for path in state.rglob("*")} == {True: 0o700, False: 0o600}
    assert len(files_in(state)) == 6


@each_kind
def test_a_damaged_record_is_set_aside_with_one_line_and_the_others_go_on(
    kind: str, stubs: Stubs, tmp_path: Path
) -> None:
    with started(kind, state_dir=tmp_path) as server, stock(stubs, server.grpc) as client:
        damaged, untouched = client.create(PROMPT), client.create(PROMPT)
        expected = client.generated(fork(client, untouched), 10)
        assert server.stop() == 0
    path = tmp_path / "sessions" / f"{damaged}.history"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)

    with started(kind, state_dir=tmp_path) as server, stock(stubs, server.grpc) as client:
        assert client.generated(untouched, 10) == expected
        with refused(grpc.StatusCode.NOT_FOUND):
            client.info(damaged)
        assert server.stop() == 0
    (line,) = complaints("".join(server.said))
    assert damaged in line
    assert (tmp_path / "damaged" / path.name).read_bytes() == content
