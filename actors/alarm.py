"""An alarm clock for one task."""

from __future__ import annotations

import math

import trio


class Alarm:
    """Wakes the task that waits for it, at a time that others set."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()

    @property
    def is_set(self) -> bool:
        return self._scope.deadline < math.inf

    def set(self, seconds: float) -> None:
        """Makes the alarm go off after `seconds`."""
        self._scope.deadline = trio.current_time() + seconds

    def clear(self) -> None:
        """Cancels the alarm."""
        self._scope.deadline = math.inf

    def go_off(self) -> None:
        self._scope.cancel()

    async def wait(self) -> None:
        """Returns when the alarm goes off; by then it is no longer set. One task at a time may wait."""
        with self._scope:
            await trio.sleep_forever()
        self._scope = trio.CancelScope()
