"""Ends a stream of text at the first stop string, without ever sending a part of one."""

from __future__ import annotations

from runtime.text import overlap


class StopStrings:
    """Holds back the end of the text for as long as it may be the beginning of a stop string."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self._stopped_by: str | None = None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has occurred, or None."""
        return self._stopped_by

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string has occurred; text after it is dropped."""
        return self._stopped_by is not None

    def feed(self, text: str) -> str:
        """Takes `text`; returns what may be sent now."""
        self._held += text
        # Compared by their ends: the first stop string to be complete stops the text, however the text is cut into pieces.
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self._stopped_by = min(found)
            sent, self._held = self._held[:at], ""
            return sent
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent

    def end(self) -> str:
        """Ends the text; returns what was held back."""
        rest, self._held = self._held, ""
        return rest
