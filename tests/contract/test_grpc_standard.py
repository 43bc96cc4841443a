"""What stock gRPC tools expect of any server: health, reflection, TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.contract.servers import KINDS, ServerProcess, held_model, started
from tests.contract.stubs import PROMPT, Stock, Stubs, refused, stock
from tests.contract.test_grpcio_client import Code

pytestmark = pytest.mark.door

SERVICE = "kakeya.v1.RuntimeService"
Status = health_pb2.HealthCheckResponse.ServingStatus


def test_health_says_serving_of_the_whole_and_of_the_service(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status == Status.SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)
            assert next(watch).status == Status.SERVING
            watch.cancel()
        with refused(Code.NOT_FOUND):
            health.Check(health_pb2.HealthCheckRequest(service="other.Service"), timeout=60)


@pytest.mark.parametrize("kind", KINDS)
def test_health_says_not_serving_until_the_model_is_there(kind: str, stubs: Stubs, tmp_path: Path) -> None:
    with (
        held_model(tmp_path / "model") as (model, release),
        started(kind, is_awaited=False, model=model, state_dir=tmp_path / "state") as server,
        stock(stubs, server.grpc) as client,
    ):
        health = health_pb2_grpc.HealthStub(client.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)

        assert next(watch).status == Status.NOT_SERVING
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == Status.NOT_SERVING
        with refused(Code.UNAVAILABLE):
            client.create()
        release()

        assert next(watch).status == Status.SERVING
        assert client.create(PROMPT)
        watch.cancel()


def test_reflection_lists_the_services_and_tells_all_of_ours(server: ServerProcess, stubs: Stubs) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())

        told = DescriptorPool(database).FindServiceByName(SERVICE)

    ours = stubs.messages.DESCRIPTOR.services_by_name["RuntimeService"]
    assert told.file.serialized_pb == ours.file.serialized_pb
    assert [method.name for method in told.methods] == [method.name for method in ours.methods]


def test_with_a_certificate_the_door_speaks_tls_and_nothing_else(stubs: Stubs, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with started("perennial", tls_cert=certificate, tls_key=key, api_keys="secret") as server:
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(server.grpc, trusted) as channel:
            client = Stock(stubs, channel, "secret")
            assert client.generated(client.create(PROMPT), 3)
            with refused(Code.UNAUTHENTICATED):
                Stock(stubs, channel).create()
        with grpc.secure_channel(server.grpc, grpc.ssl_channel_credentials()) as channel, refused(Code.UNAVAILABLE):
            Stock(stubs, channel, "secret").create()
        with stock(stubs, server.grpc, "secret") as plain_text, refused(Code.UNAVAILABLE):
            plain_text.create()
