"""What goes wrong in the process that reads, which imports this: nothing here brings an engine's libraries."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from api.reading import Terms
from runtime.text import Text


@dataclass(frozen=True)
class Fault:
    """A task with a fault of ours in it, about what a client has said."""

    said: str

    def run(self, text: Text, terms: Terms) -> None:
        raise TypeError(self.said)


class EndsItsProcess(Terms):
    """Terms that end the process to which they are given."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (1,)
