"""`api.http:app` that waits for the rest of a request for half a second, and not as long as a test would not."""

from __future__ import annotations

from typing import cast

import api.foreign.hypercorn
from api.bridge import EitherLoop, TrioApplication
from api.hosting import HostedApplication
from api.http import make_app
from api.server import Server

WAITS_S = 0.5

vars(api.foreign.hypercorn)["_HEAD_S"] = WAITS_S


def make_hasty_app(server: Server) -> TrioApplication:
    made = make_app(server)
    made.config["BODY_TIMEOUT"] = WAITS_S
    return cast(TrioApplication, made)


app = EitherLoop(HostedApplication(make_hasty_app))
