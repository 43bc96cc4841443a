"""The server as a deployment of Ray Serve: replicas that share their sessions through a store, each one whole runtime.

`serve run` takes `api.ray_serve:deploy` as its application builder. docs/ray.md has the YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.errors import StartError

if TYPE_CHECKING:
    from ray.serve import Application


def deploy(arguments: Mapping[str, Any]) -> Application:
    """The application, of settings by their names; what is not given comes from the environment.

    Raises InvalidSetting, and StartError where Ray Serve is not installed.
    """
    try:
        from api.ray_serve.replica import application
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("ray", "starlette"):
            raise
        raise StartError("Ray Serve is not installed: pip install 'perennial[ray]'") from None
    return application(arguments)
