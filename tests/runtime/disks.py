"""Disks of other sizes than that which the tests' files lie on."""

import shutil
from typing import NamedTuple

import pytest


class Usage(NamedTuple):
    """Of a disk, in bytes."""

    total: int
    used: int
    free: int


def set_disk(patch: pytest.MonkeyPatch, total: int, free: int) -> None:
    """Every disk has so many bytes from here on, and so many of them are free."""
    patch.setattr(shutil, "disk_usage", lambda _: Usage(total, total - free, free))
