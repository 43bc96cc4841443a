"""The doors: gRPC, HTTP and the terminal. Nothing here knows tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from api.doors import Addresses, serve

__all__ = ["Addresses", "serve"]


def __getattr__(name: str) -> Any:
    # The process that reads requests imports this package too, and an engine's libraries would add seconds to its start.
    if name in __all__:
        from api import doors

        return getattr(doors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
