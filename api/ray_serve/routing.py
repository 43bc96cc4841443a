"""Serve's router: a request goes to the replica on whose part of the ring its session's route falls, and to no other."""

from __future__ import annotations

import pickle
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from api.affinity import route_of_headers, route_of_message

# Replicas that died since the controller last named those that live are passed over. So many at once are more than will be.
_PASSED_OVER = 8


class SessionRouter(ConsistentHashRouter):
    """Serve's consistent hashing, strict, over the session that a request names in its headers or its message.

    A request that names none may go anywhere.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        super().initialize_state(**kwargs, num_fallback_replicas=_PASSED_OVER)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None and (route := _route_of_request(pending_request)):
            pending_request.metadata.session_id = route
        ranked: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        return ranked[:1]


def _route_of_request(pending: PendingRequest) -> str | None:
    metadata = pending.metadata
    if not pending.args or not (metadata.is_http_request or metadata.is_grpc_request):
        return None
    # From Serve's own proxy, in the form in which it sends them on to a replica.
    request = pickle.loads(pending.args[0])
    if metadata.is_http_request:
        return route_of_headers(request.asgi_scope["headers"])
    return route_of_message(request.user_request_proto) if metadata.call_method != "CreateSession" else None
