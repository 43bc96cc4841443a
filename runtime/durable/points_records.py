"""The format of the file of a tree of conversations: a header, then a record with a checksum for each change of the tree."""

from __future__ import annotations

import json
import logging
import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from runtime.durable.files import Files
from runtime.durable.framing import CHECKSUM_BYTES, Damaged, Unknown, checksum, read_header
from runtime.durable.identity import HistoryIdentity
from runtime.items import Call, Item, Message, Output, Reasoning
from runtime.points import Contents, Node, Point, PointTree, Span
from runtime.script import Head

MAGIC, VERSION = b"PERTREE\n", 1
_RECORD = struct.Struct("<II")  # size of the JSON, and of the data that follows it, in bytes
_MOST_RECORD_BYTES = 256 * 2**20

_KINDS: dict[str, type[Item]] = {"message": Message, "reasoning": Reasoning, "call": Call, "output": Output}
_NAMES = {kind: name for name, kind in _KINDS.items()}

_log = logging.getLogger("perennial.state")


def rooted(node: Node) -> bytes:
    assert node.head is not None
    head = node.head
    return _record({"kind": "root", "id": node.id, "head": [head.tools, head.options, head.instructions]})


def grew(node: Node) -> bytes:
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
    return _record(told, b"".join([node.tokens.tobytes(), *(span.characters.tobytes() for span in node.spans)]))


def dropped(node: Node) -> bytes:
    return _record({"kind": "drop", "id": node.id})


def named(name: str, point: Point, record: bytes) -> bytes:
    return _record({"kind": "name", "name": name, "id": point.node.id, "at": point.offset}, record)


def forgot(name: str) -> bytes:
    return _record({"kind": "forget", "name": name})


def all_of(contents: Contents) -> Iterator[bytes]:
    """Records of a tree with these contents. Read again, they give about the same order of use, and the same order of names."""
    for root in contents.roots:
        yield rooted(root)
    written = set(contents.roots)
    for node in contents.nodes:
        above = [node]
        while above[-1].parent is not None and above[-1] not in written:
            above.append(above[-1].parent.node)
        for each in reversed(above):
            if each not in written:
                written.add(each)
                yield grew(each)
    for name, (point, record) in contents.names.items():
        if point.node not in written:
            # A root leaves the tree with the last that continues from it, and may still have a name.
            written.add(point.node)
            yield rooted(point.node)
        yield named(name, point, record)


def read(
    files: Files, file: int, identity: HistoryIdentity, tree: PointTree, is_token: Callable[[array[int]], bool]
) -> tuple[bool, int]:
    """Fills the tree from a file; returns whether all of it could be read, and where it ends.

    A record that was changed is left out, and so is what continues from it.
    """
    faults: list[object] = []
    nodes: dict[int, Node] = {}
    at = 0
    try:
        header, at, _ = read_header(files, file, MAGIC, VERSION)
        if header.get("identity") != identity.to_json():
            raise Unknown("it was made with another model")
        for record, end in _records(files, file, at):
            at = end
            try:
                _apply(tree, nodes, *_parts(record), is_token)
            except Damaged as error:
                faults.append(error)
            except (KeyError, TypeError, ValueError, IndexError):
                faults.append("a record of it says too little")
    except (Damaged, Unknown) as error:
        faults.append(error)
    if faults:
        _log.error(
            "conversations were set aside in part or from some point on: %s; the file is in damaged/ now", faults[0]
        )
    return not faults, at


def _records(files: Files, file: int, at: int) -> Iterator[tuple[bytes, int]]:
    """Records as they lie in the file, and where each ends. Raises Damaged where no more can be told apart."""
    while head := files.read(file, at, _RECORD.size):
        if len(head) < _RECORD.size:
            raise Damaged("a record of it was torn")
        text_bytes, content_bytes = _RECORD.unpack(head)
        size = text_bytes + content_bytes
        if size > _MOST_RECORD_BYTES:
            raise Damaged("a record of it was changed")
        body = files.read(file, at + _RECORD.size, size + CHECKSUM_BYTES)
        if len(body) < size + CHECKSUM_BYTES:
            raise Damaged("a record of it was changed or torn")
        at += _RECORD.size + size + CHECKSUM_BYTES
        yield head + body, at


def _parts(record: bytes) -> tuple[dict[str, Any], bytes]:
    """What a record tells, and its content. Raises Damaged if it was changed."""
    head, body = record[: _RECORD.size], record[_RECORD.size : -CHECKSUM_BYTES]
    if record[-CHECKSUM_BYTES:] != checksum(head, body):
        raise Damaged("a record of it was changed")
    text_bytes, _ = _RECORD.unpack(head)
    return json.loads(body[:text_bytes]), body[text_bytes:]


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


def _record(told: dict[str, Any], content: bytes = b"") -> bytes:
    text = json.dumps(told, ensure_ascii=True).encode()
    record = _RECORD.pack(len(text), len(content)) + text + content
    return record + checksum(record)
