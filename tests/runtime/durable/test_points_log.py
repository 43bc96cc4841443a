"""The tree of conversations on disk: what was told is there again, and what was damaged is not believed."""

from __future__ import annotations

import errno
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.durable import DirectoryStore, HistoryIdentity
from runtime.durable.files import Files
from runtime.durable.points_log import PointLog, open_points
from runtime.errors import InvalidSetting, StorageFailed
from runtime.items import Call, Item, Message, Output, Reasoning
from runtime.points import Point, PointTree, Span
from runtime.script import Head
from tests.actors.test_durable import ENGINE
from tests.runtime.durable.faults import FaultyFiles, Killed

IDENTITY = HistoryIdentity("a model", 1000)
MOST_BYTES = 2**20
TEXT = st.text(max_size=8)
ITEMS = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT),
    st.builds(Reasoning, TEXT),
    st.builds(Call, TEXT, TEXT, TEXT),
    st.builds(Output, TEXT, TEXT),
)
TOKENS = st.lists(st.integers(0, 999), max_size=6).map(lambda tokens: array("I", tokens))


class FullDisk(Files):
    """A disk on which there is no room for more, once `is_full`."""

    is_full = False

    def write(self, file: int, offset: int, content: bytes | memoryview) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(file, offset, content)


class WatchedFiles(Files):
    """Tells when a file is on disk."""

    def __init__(self) -> None:
        self.is_synced = threading.Event()

    def sync(self, file: int) -> None:
        super().sync(file)
        self.is_synced.set()


class Later(Executor):
    """Workers who begin when a test says so."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, partial(call, *args, **kwargs)))
        return future

    @property
    def is_asked(self) -> bool:
        return bool(self._waiting)

    def work(self) -> None:
        while self._waiting:
            future, call = self._waiting.pop()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "damaged").mkdir()
    return tmp_path / "conversations.tree"


def opened(
    path: Path, files: Files | None = None, most_bytes: int = MOST_BYTES, workers: Executor | None = None
) -> tuple[PointTree, PointLog]:
    def is_token(tokens: array[int]) -> bool:
        return not tokens or max(tokens) < IDENTITY.vocabulary

    aside = path.parent / "damaged"
    return open_points(files or Files(), path, aside, IDENTITY, most_bytes, is_token, workers or Later())


def told(tree: PointTree) -> list[Any]:
    """All that a tree holds, in an order of its own."""
    nodes = [
        (point.history.tolist(), point.items, [(s.begin, s.end, s.characters) for s in node.spans], point.head)
        for node in tree.nodes()
        for point in [Point(node, len(node.tokens))]
    ]
    names = [(name, point.history.tolist(), tree.record(name)) for name in tree.names() if (point := tree.named(name))]
    return [sorted(nodes, key=repr), sorted(names)]


def grown(tree: PointTree, point: Point, item: Item, tokens: array[int]) -> Point:
    text = getattr(item, "text", "")
    spans = [Span(0, len(tokens), array("I", [len(text)] * len(tokens)))] if isinstance(item, Reasoning) else []
    return tree.grow(point, [item], tokens, spans)


@settings(max_examples=60)
@given(data=st.data())
def test_what_was_told_is_there_again_after_any_number_of_starts(tmp_path_factory: Any, data: st.DataObject) -> None:
    path: Path = tmp_path_factory.mktemp("state") / "conversations.tree"
    (path.parent / "damaged").mkdir()
    tree, log = opened(path)
    for _ in range(data.draw(st.integers(1, 4))):
        for _ in range(data.draw(st.integers(0, 5))):
            points = [
                tree.root(Head(instructions=data.draw(st.sampled_from("ab")))),
                *(Point(node, data.draw(st.integers(0, len(node.tokens)))) for node in tree.nodes()),
            ]
            point = data.draw(st.sampled_from(points))
            action = data.draw(st.sampled_from(["grow", "name", "forget"]))
            if action == "grow":
                grown(tree, point, data.draw(ITEMS), data.draw(TOKENS))
            elif action == "name":
                tree.name(data.draw(st.sampled_from("xyz")), point, data.draw(st.binary(max_size=4)))
            else:
                tree.forget(data.draw(st.sampled_from("xyz")))
        before, names = told(tree), tree.names()
        log.close()
        if data.draw(st.booleans()):
            # What was torn is left out of the file that is written then.
            with path.open("ab") as file:
                file.write(b"torn")
            opened(path)[1].close()
        tree, log = opened(path)
        assert told(tree) == before
        assert tree.names() == names
    log.close()


def test_a_start_after_much_was_forgotten_makes_the_file_short(path: Path) -> None:
    tree, log = opened(path)
    root = tree.root(Head())
    for number in range(40):
        tree.name("last", tree.grow(root, [Message("user", str(number))], array("I", [7]) * 20_000), b"x" * 30_000)
    size, before = path.stat().st_size, told(tree)
    log.close()

    tree, log = opened(path)
    log.close()

    assert told(tree) == before
    assert path.stat().st_size < size
    assert told(opened(path)[0]) == before


def test_conversations_used_longest_ago_go_where_room_is_short(path: Path) -> None:
    tree, log = opened(path, most_bytes=20_000)
    root = tree.root(Head())
    points = [tree.grow(root, [Message("user", str(n))], array("I", [n]) * 1000) for n in range(8)]
    tree.use(points[0])
    for n in range(8, 11):
        tree.grow(root, [Message("user", str(n))], array("I", [n]) * 1000)

    held = {node.items[0] for node in tree.nodes()}
    assert Message("user", "10") in held
    assert tree.size_bytes <= 20_000
    log.close()
    assert told(opened(path, most_bytes=20_000)[0]) == told(tree)


def test_who_goes_on_from_what_was_forgotten_meanwhile_does_no_harm(path: Path) -> None:
    tree, log = opened(path, most_bytes=20_000)
    root = tree.root(Head())
    point = tree.grow(root, [Message("user", "first")], array("I", [1]) * 2000)
    tree.grow(root, [Message("user", "second")], array("I", [2]) * 2000)
    assert point.node not in tree.nodes()

    further = tree.grow(point, [Message("user", "more")], array("I", [3]))
    tree.name("further", further)

    assert further.history == array("I", [1]) * 2000 + array("I", [3])
    assert tree.named("further") is None
    log.close()
    assert told(opened(path, most_bytes=20_000)[0]) == told(tree)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_of_a_damaged_file_what_stands_before_the_damage_is_kept_and_the_file_is_set_aside(
    path: Path, place: float
) -> None:
    tree, log = opened(path)
    point = tree.root(Head())
    for number in range(20):
        point = tree.grow(point, [Message("user", str(number))], array("I", [number]))
    whole = [node.items for node in tree.nodes()]
    log.close()
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)

    tree, log = opened(path)

    kept = [node.items for node in tree.nodes()]
    assert kept == whole[: len(kept)]
    assert len(kept) < len(whole)
    assert (path.parent / "damaged" / path.name).read_bytes() == content
    log.close()
    assert [node.items for node in opened(path)[0].nodes()] == kept


def test_another_models_conversations_are_not_gone_on_with(path: Path) -> None:
    tree, log = opened(path)
    tree.grow(tree.root(Head()), [Message("user", "hello")], array("I", [1]))
    log.close()

    other = HistoryIdentity("another model", 1000)
    tree, _ = open_points(Files(), path, path.parent / "damaged", other, MOST_BYTES, lambda _: True, Later())

    assert not [*tree.nodes()]


def test_tokens_that_the_model_does_not_have_are_not_believed(path: Path) -> None:
    tree, log = opened(path)
    tree.grow(tree.root(Head()), [Message("user", "hello")], array("I", [IDENTITY.vocabulary]))
    log.close()

    assert not [*opened(path)[0].nodes()]


def test_what_cannot_be_written_does_not_happen(path: Path) -> None:
    disk = FullDisk()
    tree, log = opened(path, disk)
    point = tree.grow(tree.root(Head()), [Message("user", "hello")], array("I", [1]))
    before = told(tree)

    disk.is_full = True
    for change in (
        lambda: tree.grow(point, [Message("user", "more")], array("I", [2])),
        lambda: tree.name("a name", point),
        lambda: tree.grow(tree.root(Head(instructions="Be brief.")), [Message("user", "hello")], array("I", [1])),
    ):
        with pytest.raises(StorageFailed):
            change()
    assert told(tree) == before

    disk.is_full = False
    tree.name("a name", point)
    log.close()
    assert told(opened(path)[0]) == told(tree)


def renamed(tree: PointTree, times: int) -> Iterator[None]:
    """Gives one point the same name so often; each time a megabyte of the file is outdated."""
    point = tree.grow(tree.root(Head()), [Message("user", "hello")], array("I", [1]))
    for number in range(times):
        tree.name("last", point, bytes([number % 256]) * 2**20)
        yield


def order_of_use(tree: PointTree) -> list[tuple[Item, ...]]:
    return [node.items for node in tree.latest(1000)]


def test_the_file_does_not_grow_for_as_long_as_the_server_runs(tmp_path: Path) -> None:
    files = WatchedFiles()
    with DirectoryStore.open(str(tmp_path), IDENTITY, ENGINE, files=files) as store:
        tree, largest = store.open_points(2 * MOST_BYTES), 0
        files.is_synced.clear()
        for number, _ in enumerate(renamed(tree, 200)):
            if store.size < largest:
                break
            largest = store.size
            if number == 20:
                # A thread writes the shorter file, and a disk takes its time.
                assert files.is_synced.wait(200)
        assert store.size < largest
        before = told(tree)
    with DirectoryStore.open(str(tmp_path), IDENTITY, ENGINE) as store:
        assert told(store.open_points(2 * MOST_BYTES)) == before


def test_changes_go_on_while_a_shorter_file_is_written(path: Path) -> None:
    workers = Later()
    tree, log = opened(path, workers=workers, most_bytes=4 * MOST_BYTES)
    old = tree.grow(tree.root(Head(instructions="Be brief.")), [Message("user", "old")], array("I", [5]))
    tree.name("old", old)
    for _ in renamed(tree, 9):
        if workers.is_asked:
            break
    assert workers.is_asked
    size = log.size

    tree.forget("old")
    answer = grown(tree, old, Reasoning("because"), array("I", [6, 7]))
    other = tree.grow(tree.root(Head(instructions="Be long.")), [Message("user", "new")], array("I", [8]))
    tree.name("new", other, b"its record")
    workers.work()
    tree.name("newer", answer)

    assert log.size < size
    assert log.size == path.stat().st_size
    assert not path.with_suffix(".new").exists()
    log.close()
    again, _ = opened(path, most_bytes=4 * MOST_BYTES)
    assert told(again) == told(tree)
    assert again.names() == tree.names()


def test_a_name_of_the_beginning_of_conversations_that_were_forgotten_is_kept(path: Path) -> None:
    tree, log = opened(path, most_bytes=4000)
    first = tree.grow(tree.root(Head()), [Message("user", "hello")], array("I", [1]))
    [beginning] = tree.kindred(Head())
    tree.name("beginning", beginning)
    tree.grow(tree.root(Head(instructions="Be brief.")), [Message("user", "hello")], array("I", [1]) * 300)
    assert not first.node.is_held
    before = told(tree)
    log.close()
    with path.open("ab") as file:
        file.write(b"torn")

    for _ in range(2):
        again, log = opened(path, most_bytes=4000)
        log.close()
        assert told(again) == before


def test_a_shorter_file_tells_what_was_used_last(path: Path) -> None:
    workers = Later()
    tree, log = opened(path, workers=workers, most_bytes=4 * MOST_BYTES)
    root = tree.root(Head())
    points = [tree.grow(root, [Message("user", str(n))], array("I", [n])) for n in range(6)]
    further = tree.grow(points[2], [Message("assistant", "yes")], array("I", [7]))
    for point in (points[4], points[0], further, points[3]):
        tree.use(point)
    for _ in renamed(tree, 6):
        workers.work()
    log.close()

    assert order_of_use(opened(path, most_bytes=4 * MOST_BYTES)[0]) == order_of_use(tree)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, None], ids=["full", "broken", "killed"])
def test_a_shorter_file_that_cannot_be_written_loses_nothing(tmp_path: Path, error: int | None) -> None:
    for at in count():
        path = tmp_path / str(at) / "conversations.tree"
        (path.parent / "damaged").mkdir(parents=True)
        files, workers = FaultyFiles(), Later()
        tree, log = opened(path, files, workers=workers, most_bytes=4 * MOST_BYTES)
        for _ in renamed(tree, 9):
            if workers.is_asked:
                break
        files.fail_next(error, after=at)
        with suppress(Killed, StorageFailed):
            workers.work()
            for name in ("one", "two"):
                tree.name(name, Point(tree.latest(1)[0], 1))
        is_over = files.fail_at is not None and files.operations <= files.fail_at
        files.heal()
        if error is None:
            files.reap()
        else:
            log.close()

        again, log = opened(path, most_bytes=4 * MOST_BYTES)
        log.close()
        assert told(again) == told(tree)
        if is_over:
            break


def test_a_shorter_file_that_is_being_written_when_the_server_stops_is_left_out(path: Path) -> None:
    with ThreadPoolExecutor(1) as workers:
        tree, log = opened(path, workers=workers, most_bytes=4 * MOST_BYTES)
        for _ in renamed(tree, 4):
            pass
        log.close()

    assert not path.with_suffix(".new").exists()
    assert told(opened(path, most_bytes=4 * MOST_BYTES)[0]) == told(tree)


@pytest.mark.parametrize("share", [0.5, 1.0], ids=["torn", "whole"])
@pytest.mark.parametrize("is_cut_at_once", [True, False])
def test_a_change_that_could_not_be_written_is_not_there_at_the_next_start(
    path: Path, share: float, is_cut_at_once: bool
) -> None:
    files = FaultyFiles()
    tree, log = opened(path, files)
    point = tree.grow(tree.root(Head()), [Message("user", "hello")], array("I", [1]))
    files.fail_next(errno.EIO, count=1 if is_cut_at_once else 2, share=share)
    with pytest.raises(StorageFailed):
        tree.name("a long name", point, b"x" * 100)
    if not is_cut_at_once:
        tree.name("short", point)
    log.close()

    assert told(opened(path)[0]) == told(tree)
    assert not [*(path.parent / "damaged").iterdir()]


def test_conversations_that_cannot_be_bounded_stop_the_start_with_one_line(tmp_path: Path) -> None:
    with DirectoryStore.open(str(tmp_path), IDENTITY, ENGINE) as store:
        tree = store.open_points(MOST_BYTES)
        for n in range(8):
            tree.grow(tree.root(Head()), [Message("user", str(n))], array("I", [n]) * 1000)
    disk = FullDisk()
    with DirectoryStore.open(str(tmp_path), IDENTITY, ENGINE, files=disk) as store:
        disk.is_full = True
        with pytest.raises(InvalidSetting, match="No space left"):
            store.open_points(10_000)


def test_what_does_not_continue_from_a_damaged_record_is_kept(path: Path) -> None:
    tree, log = opened(path)
    for number in range(20):
        tree.grow(tree.root(Head()), [Message("user", f"number {number}!")], array("I", [number]))
    log.close()
    content = bytearray(path.read_bytes())
    content[content.index(b"number 7!")] ^= 1
    path.write_bytes(content)

    tree, log = opened(path)

    told_of = {item.text for node in tree.nodes() for item in node.items if isinstance(item, Message)}
    assert told_of == {f"number {number}!" for number in range(20)} - {"number 7!"}
    log.close()


def test_a_file_that_is_set_aside_leaves_those_before_it(path: Path) -> None:
    for number in range(3):
        path.write_bytes(b"%d" % number)
        opened(path)[1].close()

    aside = path.parent / "damaged"
    assert {file.read_bytes() for file in aside.iterdir()} == {b"0", b"1", b"2"}
