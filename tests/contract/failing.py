"""`api.http:app` with one route more, which fails: no request of a client makes a server that is whole answer 500."""

from __future__ import annotations

from typing import cast

from quart import Response

from api.bridge import EitherLoop, TrioApplication
from api.hosting import HostedApplication
from api.http import make_app
from api.server import Server


def make_failing_app(server: Server) -> TrioApplication:
    made = make_app(server)

    @made.get("/fails")
    async def fails() -> Response:
        raise ZeroDivisionError

    return cast(TrioApplication, made)


app = EitherLoop(HostedApplication(make_failing_app))
