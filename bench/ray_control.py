"""A local cluster of Ray's for as long as its standard input is open: a line in asks for the state of the replicas.

Run as a process of its own, for Ray is neither trio's nor a dependency: `python -m bench.ray_control`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import ray
from ray import serve

# Logical ones: replicas share the machine's as they come.
_CPUS = 16
_OBJECT_STORE_BYTES = 100 * 2**20


def states() -> dict[str, int]:
    """Replicas by their state, and applications that are being brought about."""
    counts: Counter[str] = Counter()
    status: Any = serve.status()
    for application in status.applications.values():
        if application.status != "RUNNING":
            counts[application.status] += 1
        for deployment in application.deployments.values():
            counts.update(deployment.replica_states)
    return dict(counts)


def main() -> None:
    """Says the address of the cluster first, then answers each line with a line."""
    ray.init(
        num_cpus=_CPUS,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=True,
        _node_ip_address="127.0.0.1",
    )
    print(json.dumps(ray.get_runtime_context().gcs_address), flush=True)
    for _ in sys.stdin:
        print(json.dumps(states()), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
