"""The tree of conversations on disk: one file with a record for each change.

Each record has a checksum. Everything after a torn or damaged record is ignored; the file is then set aside, and a new one
begins with what could be read. A file that is mostly outdated is rewritten when it is opened.
"""

from __future__ import annotations

import json
import logging
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.durable.files import Files, storage_errors
from runtime.durable.framing import CHECKSUM_BYTES, Damaged, Unknown, checksum, read_header, write_header
from runtime.durable.identity import HistoryIdentity
from runtime.items import Call, Item, Message, Output, Reasoning
from runtime.points import Node, Point, PointTree, Span
from runtime.script import Head

MAGIC, VERSION = b"PERTREE\n", 1
_RECORD = struct.Struct("<II")  # size of the JSON, and of the data that follows it, in bytes
_MOST_RECORD_BYTES = 256 * 2**20
# A file smaller than this is never rewritten, however much of it is outdated.
_SMALL_BYTES = 2**20

_KINDS: dict[str, type[Item]] = {"message": Message, "reasoning": Reasoning, "call": Call, "output": Output}
_NAMES = {kind: name for name, kind in _KINDS.items()}

_log = logging.getLogger("perennial.state")


class PointLog:
    """Writes every change of a tree to the file. Its methods raise StorageFailed; then nothing has changed on disk."""

    def __init__(self, files: Files, file: int, end: int) -> None:
        self._files = files
        self._file = file
        self._end = end

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._end

    def rooted(self, node: Node) -> None:
        assert node.head is not None
        head = node.head
        self._write({"kind": "root", "id": node.id, "head": [head.tools, head.options, head.instructions]})

    def grew(self, node: Node) -> None:
        assert node.parent is not None
        told = {
            "kind": "node",
            "id": node.id,
            "parent": node.parent.node.id,
            "at": node.parent.offset,
            "items": [_as_json(item) for item in node.items],
            "tokens": len(node.tokens),
            "spans": [[span.begin, span.end, len(span.characters)] for span in node.spans],
        }
        self._write(told, b"".join([node.tokens.tobytes(), *(span.characters.tobytes() for span in node.spans)]))

    def dropped(self, node: Node) -> None:
        self._write({"kind": "drop", "id": node.id})

    def named(self, name: str, point: Point, record: bytes) -> None:
        self._write({"kind": "name", "name": name, "id": point.node.id, "at": point.offset}, record)

    def forgot(self, name: str) -> None:
        self._write({"kind": "forget", "name": name})

    def close(self) -> None:
        with suppress(OSError):
            self._files.close(self._file)

    def _write(self, told: dict[str, Any], content: bytes = b"") -> None:
        text = json.dumps(told, ensure_ascii=True).encode()
        record = _RECORD.pack(len(text), len(content)) + text + content
        record += checksum(record)
        with storage_errors("the conversation does not go on"):
            self._files.write(self._file, self._end, record)
        self._end += len(record)


def open_points(
    files: Files,
    path: Path,
    aside: Path,
    identity: HistoryIdentity,
    most_bytes: int,
    is_token: Callable[[array[int]], bool],
) -> tuple[PointTree, PointLog]:
    """Opens the file, which is made if missing; returns its tree, whose changes are written there. Raises OSError."""
    tree, is_whole, size = PointTree(), True, 0
    if files.size(path):
        file = files.open(path)
        try:
            is_whole, size = _read(files, file, identity, tree, is_token)
        finally:
            files.close(file)
        if not is_whole:
            files.replace(path, aside / path.name)
    is_outdated = size > max(_SMALL_BYTES, 2 * tree.size_bytes)
    if size and is_whole and not is_outdated:
        log = PointLog(files, files.open(path), size)
        tree.go_on_in(log)
        tree.bound(most_bytes)
        return tree, log
    fresh = path.with_suffix(".new")
    file = files.create(fresh)
    try:
        begin, _ = write_header(files, file, MAGIC, VERSION, {"identity": identity.to_json()})
        log = PointLog(files, file, begin)
        tree.write_to(log)
        files.replace(fresh, path)
        tree.bound(most_bytes)
    except BaseException:
        files.close(file)
        raise
    return tree, log


def _read(
    files: Files, file: int, identity: HistoryIdentity, tree: PointTree, is_token: Callable[[array[int]], bool]
) -> tuple[bool, int]:
    """Fills the tree from a file; returns whether all of it could be read, and the offset where the readable part ends."""
    try:
        header, at, _ = read_header(files, file, MAGIC, VERSION)
        if header.get("identity") != identity.to_json():
            raise Unknown("it was made with another model")
        nodes: dict[int, Node] = {}
        for told, content, end in _records(files, file, at):
            _apply(tree, nodes, told, content, is_token)
            at = end
    except (Damaged, Unknown, KeyError, TypeError, ValueError, IndexError) as error:
        reason = error if isinstance(error, Damaged | Unknown) else "a record of it says too little"
        _log.error("conversations were set aside from some point on: %s; the file is in damaged/ now", reason)
        return False, 0
    return True, at


def _records(files: Files, file: int, at: int) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    while head := files.read(file, at, _RECORD.size):
        if len(head) < _RECORD.size:
            raise Damaged("a record of it was torn")
        text_bytes, content_bytes = _RECORD.unpack(head)
        size = text_bytes + content_bytes
        if size > _MOST_RECORD_BYTES:
            raise Damaged("a record of it was changed")
        body = files.read(file, at + _RECORD.size, size + CHECKSUM_BYTES)
        if len(body) < size + CHECKSUM_BYTES or body[size:] != checksum(head, body[:size]):
            raise Damaged("a record of it was changed or torn")
        at += _RECORD.size + size + CHECKSUM_BYTES
        yield json.loads(body[:text_bytes]), body[text_bytes:size], at


def _apply(
    tree: PointTree,
    nodes: dict[int, Node],
    told: dict[str, Any],
    content: bytes,
    is_token: Callable[[array[int]], bool],
) -> None:
    match told["kind"]:
        case "root":
            tools, options, instructions = told["head"]
            head = Head(tuple(tools), tuple((name, value) for name, value in options), instructions)
            nodes[told["id"]] = tree.root(head, told["id"]).node
        case "node":
            numbers = array("I", content)
            tokens, at = numbers[: told["tokens"]], told["tokens"]
            if not is_token(tokens):
                raise Damaged("it holds tokens that the model does not have")
            spans = []
            for begin, end, count in told["spans"]:
                spans.append(Span(begin, end, numbers[at : at + count]))
                at += count
            items = [_KINDS[kind](*fields) for kind, *fields in told["items"]]
            parent = Point(nodes[told["parent"]], told["at"])
            nodes[told["id"]] = tree.grow(parent, items, tokens, spans, told["id"]).node
        case "drop":
            tree.drop(nodes.pop(told["id"]))
        case "name":
            tree.name(told["name"], Point(nodes[told["id"]], told["at"]), content)
        case "forget":
            tree.forget(told["name"])


def _as_json(item: Item) -> list[str]:
    match item:
        case Message(role, text, name):
            fields = [role, text, name]
        case Reasoning(text):
            fields = [text]
        case Call(name, arguments, call_id):
            fields = [name, arguments, call_id]
        case Output(text, call_id):
            fields = [text, call_id]
    return [_NAMES[type(item)], *fields]
