"""A client's connections."""

from __future__ import annotations

from grpclib.client import Channel
from grpclib.protocol import H2Protocol

from api.foreign.grpclib.connection import ChosenProtocol


class ForgetfulChannel(Channel):
    """A client's channel whose connections forget calls soon after they have ended."""

    def _protocol_factory(self) -> H2Protocol:
        factory = super()._protocol_factory()
        return ChosenProtocol(factory.handler, factory.config, factory.h2_config)
