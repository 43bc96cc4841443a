"""Bearer keys, for both doors."""

from __future__ import annotations

import hmac

from runtime.errors import Unauthenticated
from runtime.settings import Settings


def needs_key(path: str) -> bool:
    """Whether requests for this path need a key, where keys are set."""
    return path.startswith("/v1/")


def check_key(settings: Settings, authorization: str | None, api_key: str | None = None) -> None:
    """Raises Unauthenticated unless `authorization` is `Bearer KEY` or `api_key` is a key. Returns at once if no keys are set."""
    if not settings.api_keys:
        return
    scheme, _, given = (authorization or f"Bearer {api_key or ''}").partition(" ")
    # Every key is compared, in constant time, so that the time taken reveals neither a prefix nor a place in the list.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in settings.api_keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Unauthenticated("no valid key: send `authorization: Bearer KEY`")
