"""Sessions that outlive the process. Only a `SessionStore` touches their files, or their objects in a bucket."""

from __future__ import annotations

from contextlib import AbstractContextManager

from runtime.durable.directory import DirectoryStore
from runtime.durable.identity import HistoryIdentity, SlabIdentity, Terms, fingerprint
from runtime.durable.objects import SCHEMES
from runtime.durable.shared import LEASE_S, SharedStore
from runtime.durable.slab_file import SlabWriter
from runtime.durable.store import Durable, Kept, SessionStore
from runtime.errors import InvalidSetting

__all__ = [
    "DirectoryStore",
    "Durable",
    "HistoryIdentity",
    "Kept",
    "SessionStore",
    "SharedStore",
    "SlabIdentity",
    "SlabWriter",
    "Terms",
    "fingerprint",
    "open_store",
]


def open_store(
    place: str,
    history_identity: HistoryIdentity,
    slab_identity: SlabIdentity,
    *,
    most_bytes: int = 0,
    lease_s: float = LEASE_S,
) -> AbstractContextManager[SessionStore]:
    """Opens the store in a directory or at a URL while the block runs. Raises InvalidSetting."""
    scheme, between, _ = place.partition("://")
    if not between:
        return DirectoryStore.open(place, history_identity, slab_identity, most_bytes=most_bytes)
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise InvalidSetting(f"state_dir={place} is neither a directory nor at one of {known}")
    return SharedStore.open(place, history_identity, slab_identity, most_bytes=most_bytes, lease_s=lease_s)
