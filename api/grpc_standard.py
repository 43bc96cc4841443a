"""The services that stock gRPC tools expect: `grpc.health.v1` and server reflection."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from grpclib._typing import IServable
from grpclib.health.check import ServiceStatus
from grpclib.health.service import OVERALL, Health
from grpclib.health.v1 import health_pb2

from api.server import Phase, Server


class HealthOf:
    """The health of a server: SERVING in its serving phase, and NOT_SERVING in any other."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.status = ServiceStatus()
        self.status.set(server.phase is Phase.SERVING)

    async def follow(self) -> None:
        """Tells watchers of every change of phase, until cancelled."""
        while True:
            self.status.set(await self._server.next_phase() is Phase.SERVING)


def with_standard_services(service: IServable, health: HealthOf) -> list[IServable]:
    """`service`, its health, and reflection over both."""
    # It makes messages of names that grpcio's own reflection makes too, which a host of ours may have loaded: where we do
    # not serve this door, neither is in the other's way.
    from grpclib.reflection.service import ServerReflection

    checks = Health({service: [health.status], OVERALL: [health.status]})
    return ServerReflection.extend([service, checks], pool=descriptors())


@cache
def descriptors() -> DescriptorPool:
    """The file descriptors of our service and of the health service."""
    pool = DescriptorPool()
    ours = FileDescriptorSet.FromString(files("proto.kakeya.v1").joinpath("runtime.binpb").read_bytes())
    for file in ours.file:
        pool.AddSerializedFile(file.SerializeToString())
    pool.AddSerializedFile(health_pb2.DESCRIPTOR.serialized_pb)
    return pool
