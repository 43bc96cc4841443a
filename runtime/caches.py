"""The folder for results that take long to compute, kept for later starts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Our folder in this user's cache, which may not exist yet; None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if home.startswith("~") else Path(home) / "perennial"
