"""What grpcio's own health and reflection clients are told: a program, for neither can be imported beside grpclib's.

python tests/contract/standard_client.py HOST:PORT
"""

from __future__ import annotations

import json
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "kakeya.v1.RuntimeService"
_LONGEST_CALL_S = 240


def main(address: str) -> dict[str, object]:
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        database = ProtoReflectionDescriptorDatabase(channel)
        told = DescriptorPool(database).FindServiceByName(SERVICE)
        return {
            "checked": {service: checked(health, service) for service in ("", SERVICE, "nothing.Service")},
            "watched": {service: watched(health, service) for service in ("", SERVICE)},
            "services": sorted(database.get_services()),
            "methods": [method.name for method in told.methods],
            "fields": {
                name: {field.name: field.number for field in message.fields}
                for name, message in told.file.message_types_by_name.items()
            },
        }


def checked(health: health_pb2_grpc.HealthStub, service: str) -> str:
    try:
        return named(health.Check(health_pb2.HealthCheckRequest(service=service), timeout=_LONGEST_CALL_S))
    except grpc.RpcError as error:
        return str(error.code().name)


def watched(health: health_pb2_grpc.HealthStub, service: str) -> str:
    watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=_LONGEST_CALL_S)
    try:
        return named(next(watch))
    finally:
        watch.cancel()


def named(response: health_pb2.HealthCheckResponse) -> str:
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


if __name__ == "__main__":
    json.dump(main(sys.argv[1]), sys.stdout)
