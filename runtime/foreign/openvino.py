"""Imports OpenVINO without its usage reports.

Where openvino-telemetry is installed, and OpenVINO brings it along, `import openvino` tells its maker so: its converter is
imported too, which says hello (openvino/tools/ovc/__init__.py). Without the package it falls back on a stub of its own.
"""

from __future__ import annotations

import sys
from typing import Any, cast

_TELEMETRY = "openvino_telemetry"

_modules = cast(dict[str, Any], sys.modules)
_before = _modules.get(_TELEMETRY)
# For Python, a module that is None is not installed.
_modules[_TELEMETRY] = None
try:
    import openvino as ov
    from openvino import opset15 as ops
finally:
    if _before is None:
        del _modules[_TELEMETRY]
    else:
        _modules[_TELEMETRY] = _before

__all__ = ["ops", "ov"]
