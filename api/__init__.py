"""The doors: gRPC, HTTP and the terminal. Nothing here knows tensors."""

from api.doors import Addresses, serve

__all__ = ["Addresses", "serve"]
