"""Sessions that outlive the process: `SessionStore` alone touches their files."""

from runtime.durable.identity import HistoryIdentity, SlabIdentity, Terms, fingerprint
from runtime.durable.slab_file import SlabWriter
from runtime.durable.store import Durable, SessionStore

__all__ = [
    "Durable",
    "HistoryIdentity",
    "SessionStore",
    "SlabIdentity",
    "SlabWriter",
    "Terms",
    "fingerprint",
]
