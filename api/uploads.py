"""Bodies and frames that arrive at the HTTP door, with a bound on what it holds of them at once."""

from __future__ import annotations

from quart_trio.wrappers.request import TrioBody
from werkzeug.exceptions import RequestEntityTooLarge

from runtime.errors import Saturated


class UploadRoom:
    """The bytes that all bodies and frames together may take, including those that have arrived and wait."""

    def __init__(self, most_bytes: int) -> None:
        self._free_bytes = most_bytes

    def take(self, size: int) -> bool:
        """Takes `size` bytes if so many are left; returns whether it did."""
        if size > self._free_bytes:
            return False
        self._free_bytes -= size
        return True

    def give_back(self, size: int) -> None:
        self._free_bytes += size


def too_much_at_once() -> Saturated:
    return Saturated("too many long bodies are on their way: send fewer at once, or try again")


class Upload(TrioBody):
    """The body of one request. Its bytes are held from their arrival until `let_go` or `pass_over`.

    If it is too long or finds no room, awaiting it raises, and no more of it is held.
    """

    def __init__(self, room: UploadRoom, expected_content_length: int | None, max_content_length: int | None) -> None:
        super().__init__(expected_content_length, max_content_length)
        self._room = room
        self._received_bytes = 0
        self._held_bytes = 0
        self._is_wanted = True

    def append(self, data: bytes) -> None:
        if self._must_raise is not None:
            return
        self._received_bytes += len(data)
        if self._max_content_length is not None and self._received_bytes > self._max_content_length:
            self._refuse(RequestEntityTooLarge())
        elif self._is_wanted and self._room.take(len(data)):
            self._held_bytes += len(data)
            super().append(data)
        elif self._is_wanted:
            self._refuse(too_much_at_once())

    def pass_over(self) -> None:
        """Drops the body: awaiting it then only waits for its end."""
        self._is_wanted = False
        self.let_go()

    def let_go(self) -> None:
        """Gives its room back. Nothing may hold a part of it any more."""
        self.clear()
        self._room.give_back(self._held_bytes)
        self._held_bytes = 0

    def _refuse(self, error: Exception) -> None:
        self.let_go()
        self._must_raise = error
        self.set_complete()
