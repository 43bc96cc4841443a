"""The record of a session: a file with every token of its history.

Behind the header lie two places for the *tip*, written in turn, then the tokens in pieces. A piece says where in the history it
begins, so that it may take earlier ones back, and carries a checksum over itself and the piece before it. The tip says how far
the pieces go that somebody was told of. So a piece that was torn by a fault or a kill is told from one that was damaged, and a
file that was cut short from one that was never longer.

A write ends in the operating system's cache, some ten microseconds away, and so survives the end of this process by any
signal; a power cut may take the last ones.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.durable.files import Files
from runtime.durable.framing import CHECKSUM_BYTES, Damaged, Unknown, checksum, read_header, write_header
from runtime.durable.identity import HistoryIdentity, Terms

MAGIC, VERSION = b"PERHIST\n", 1
_TIP = struct.Struct(
    "<QQQQd"
)  # number of the write, end of the pieces in bytes, length of the history, order of use, time of use
_TIP_BYTES = _TIP.size + 2 * CHECKSUM_BYTES  # checksum of the last piece, checksum of the tip
_PIECE = struct.Struct("<QI")  # position in the history where it begins, count of its tokens
_TOKEN_BYTES = 4
# Beyond the tip there is at most one append, and the remains of one that a fault interrupted.
_MOST_UNTOLD_BYTES = 4 * 2**20
# Generation writes one piece a token; more pieces than this are joined when the session is next opened.
_MOST_PIECES = 4096


@dataclass(frozen=True, slots=True)
class Tip:
    """Where a journal ends, in bytes and tokens; the checksum of its last piece, and when the session was used."""

    write: int
    end: int
    length: int
    use: int
    used_at: float
    seal: bytes

    def to_bytes(self) -> bytes:
        content = _TIP.pack(self.write, self.end, self.length, self.use, self.used_at) + self.seal
        return content + checksum(content)


@dataclass(frozen=True, slots=True)
class Head:
    """What the beginning of a journal's file says, before its pieces are read."""

    terms: Terms
    tip: Tip


class Journal:
    """One session's record, open for writing. Tokens are recorded before anybody is told of them.

    Methods that write raise OSError; then nothing has changed that a reader would see, unless undoing the write fails too.
    """

    def __init__(self, files: Files, path: Path, file: int, terms: Terms, tips_at: int, tip: Tip) -> None:
        self.path = path
        self.terms = terms
        self._files = files
        self._file = file
        self._tips_at = tips_at
        self._tip = tip
        self._owed: int | None = None

    @classmethod
    def create(
        cls,
        files: Files,
        path: Path,
        identity: HistoryIdentity,
        terms: Terms,
        history: array[int],
        use: int,
        used_at: float,
    ) -> Journal:
        """Creates a journal with this history. If it fails, no file is left."""
        fresh = path.with_suffix(".new")
        file = files.create(fresh)
        try:
            header = {"id": path.stem, "identity": identity.to_json(), "terms": terms.to_json()}
            tips_at, seal = write_header(files, file, MAGIC, VERSION, header)
            begin = tips_at + 2 * _TIP_BYTES
            journal = cls(files, path, file, terms, tips_at, Tip(0, begin, 0, use, used_at, seal))
            journal.record(0, history)
            if not history:
                journal._write_tip(journal._tip)
            files.replace(fresh, path)
        except BaseException:
            _give_up(files, file, fresh)
            raise
        return journal

    @classmethod
    def peek(cls, files: Files, path: Path, identity: HistoryIdentity) -> Head:
        """Reads the beginning of a file, without its pieces. Raises OSError, Damaged or Unknown."""
        file = files.open(path)
        try:
            terms, _, _, tip = _begin(files, file, path, identity)
            return Head(terms, tip)
        finally:
            files.close(file)

    @classmethod
    def open(
        cls, files: Files, path: Path, identity: HistoryIdentity, is_token: Callable[[array[int]], bool]
    ) -> tuple[Journal, array[int]]:
        """Opens the journal in a file; returns it and its history. Raises OSError, Damaged or Unknown."""
        file = files.open(path)
        try:
            terms, tips_at, seal, tip = _begin(files, file, path, identity)
            history, tip, pieces = _read_pieces(files, file, tips_at + 2 * _TIP_BYTES, seal, tip)
            if not is_token(history):
                raise Damaged("it holds tokens that the model does not have")
            journal = cls(files, path, file, terms, tips_at, tip)
        except BaseException:
            files.close(file)
            raise
        if pieces <= _MOST_PIECES:
            return journal, history
        # If there is no room to write a shorter file, keep the long one.
        with suppress(OSError):
            shorter = cls.create(files, path, identity, terms, history, tip.use, tip.used_at)
            journal.close()
            return shorter, history
        return journal, history

    @property
    def tip(self) -> Tip:
        return self._tip

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._tip.end

    def record(self, start: int, token_ids: array[int]) -> None:
        """Records these tokens from position `start` on, in place of any that were recorded there."""
        if token_ids or start != self._tip.length:
            self._write_piece(start, token_ids)

    def take_back(self, length: int) -> None:
        """Forgets the tokens from `length` on. If that cannot be written now, it is written with the next change."""
        self._owed = length
        with suppress(OSError):
            self.settle()

    def settle(self) -> None:
        """Writes changes that could not be written before."""
        if self._owed is not None:
            self._write_piece(self._owed, array("I"))

    def mark_used(self, use: int, used_at: float) -> None:
        """Records that the session was used at this time, as the `use`-th of all uses."""
        self._write_tip(replace(self._tip, use=use, used_at=used_at))

    def close(self) -> None:
        with suppress(OSError):
            self.settle()
        with suppress(OSError):
            self._files.close(self._file)

    def _write_piece(self, start: int, token_ids: array[int]) -> None:
        content = _PIECE.pack(start, len(token_ids)) + token_ids.tobytes()
        seal = checksum(self._tip.seal, content)
        at = self._tip.end
        tip = replace(self._tip, end=at + len(content) + CHECKSUM_BYTES, length=start + len(token_ids), seal=seal)
        try:
            self._files.write(self._file, at, content + seal)
            self._write_tip(tip)
        except OSError:
            self._undo()
            raise
        self._owed = None

    def _undo(self) -> None:
        """After a failed write: makes sure that a reader does not find the piece or tip that was being written."""
        if self._owed is None:
            self._owed = self._tip.length
        with suppress(OSError):
            self._write_tip(self._tip)
            # A reader would accept a whole piece beyond the tip.
            self._files.write(self._file, self._tip.end, bytes(_PIECE.size + CHECKSUM_BYTES))

    def _write_tip(self, tip: Tip) -> None:
        tip = replace(tip, write=self._tip.write + 1)
        self._files.write(self._file, self._tips_at + tip.write % 2 * _TIP_BYTES, tip.to_bytes())
        self._tip = tip


def _begin(files: Files, file: int, path: Path, identity: HistoryIdentity) -> tuple[Terms, int, bytes, Tip]:
    """Reads the beginning: terms, offset of the tips, the header's checksum, and the newer tip."""
    header, tips_at, seal = read_header(files, file, MAGIC, VERSION)
    try:
        name, made_for, terms = header["id"], header["identity"], Terms.from_json(header["terms"])
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged("its header says too little") from error
    if name != path.stem:
        raise Damaged("it is another session's")
    if made_for != identity.to_json():
        raise Unknown("it was made with another model")
    places = (files.read(file, tips_at + place * _TIP_BYTES, _TIP_BYTES) for place in (0, 1))
    tips = [tip for tip in map(_tip_of, places) if tip]
    if not tips:
        raise Damaged("how far it goes cannot be read")
    return terms, tips_at, seal, max(tips, key=lambda tip: tip.write)


def _tip_of(content: bytes) -> Tip | None:
    body, own = content[: _TIP.size + CHECKSUM_BYTES], content[_TIP.size + CHECKSUM_BYTES :]
    if len(content) < _TIP_BYTES or own != checksum(body):
        return None
    write, end, length, use, used_at = _TIP.unpack(body[: _TIP.size])
    return Tip(write, end, length, use, used_at, body[_TIP.size :])


def _read_pieces(files: Files, file: int, begin: int, seal: bytes, tip: Tip) -> tuple[array[int], Tip, int]:
    """Reads the pieces; returns the history, the tip as it should be, and the number of pieces."""
    told = tip.end - begin
    content = files.read(file, begin, told + _MOST_UNTOLD_BYTES)
    history = array("I")
    at = pieces = 0
    is_as_told = (told, tip.length, tip.seal) == (0, 0, seal)
    while (piece := _piece_at(content, at, seal, len(history))) is not None:
        start, tokens, seal, at = piece
        del history[start:]
        history.frombytes(tokens)
        pieces += 1
        is_as_told = is_as_told or (at, len(history), seal) == (told, tip.length, tip.seal)
    # A torn piece beyond the tip was never reported to anybody.
    if not is_as_told:
        raise Damaged("a piece of it was changed or is missing")
    return history, replace(tip, end=begin + at, length=len(history), seal=seal), pieces


def _piece_at(content: bytes, at: int, before: bytes, length: int) -> tuple[int, bytes, bytes, int] | None:
    """The piece at offset `at`, if it is whole: its position in the history, tokens, checksum, and the offset of its end."""
    if at + _PIECE.size + CHECKSUM_BYTES > len(content):
        return None
    start, count = _PIECE.unpack_from(content, at)
    end = at + _PIECE.size + count * _TOKEN_BYTES
    seal = content[end : end + CHECKSUM_BYTES]
    if start > length or seal != checksum(before, content[at:end]):
        return None
    return start, content[at + _PIECE.size : end], seal, end + CHECKSUM_BYTES


def _give_up(files: Files, file: int, path: Path) -> None:
    with suppress(OSError):
        files.close(file)
    with suppress(OSError):
        files.remove(path)
