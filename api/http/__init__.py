"""The HTTP door: a module for each family of routes, and `app` for `hypercorn api.http:app`."""

from api.http.app import app, http_door, make_app, routes_of
from api.http.routes import DEPRECATION

__all__ = ["DEPRECATION", "app", "http_door", "make_app", "routes_of"]
