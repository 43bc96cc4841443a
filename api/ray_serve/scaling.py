"""How many replicas there should be, by what they say of themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

LOAD = "perennial_load"
"""What a replica reports: `Server.load`, which is 1 where it has to refuse or to let wait."""

# The rest is for what comes until another replica has loaded its model.
_TARGET_LOAD = 0.7


def replicas_for_load(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """For `autoscaling_config.policy`: as many replicas as bring the load of each to 0.7. Serve keeps to its bounds."""
    reported = (context.aggregated_metrics or {}).get(LOAD, {})
    if not reported:
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(reported.values()) / _TARGET_LOAD)), {}
