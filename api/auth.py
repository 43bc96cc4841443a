"""Bearer keys, for both doors."""

from __future__ import annotations

import hmac

from runtime.errors import Unauthenticated
from runtime.settings import Settings


def needs_key(path: str) -> bool:
    """Whether HTTP asks for a key there."""
    return path.startswith("/v1/")


def check_key(settings: Settings, authorization: str | None, api_key: str | None = None) -> None:
    """Raises Unauthenticated unless `authorization` is `Bearer KEY`, or else `api_key` is one of the keys, or there are none."""
    if not settings.api_keys:
        return
    scheme, _, given = (authorization or f"Bearer {api_key or ''}").partition(" ")
    # Every key is compared, in constant time, so that neither a prefix nor a place in the list can be guessed from it.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in settings.api_keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Unauthenticated("no valid key: send `authorization: Bearer KEY`")
