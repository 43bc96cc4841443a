"""What stock gRPC tools expect of any server: health, reflection, TLS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.contract.servers import ServerProcess, certificate_in, started
from tests.contract.stubs import PROMPT, Stock, Stubs, refused, stock

pytestmark = pytest.mark.door

Code = grpc.StatusCode
SERVICE = "kakeya.v1.RuntimeService"


@pytest.fixture(scope="module")
def told(server: ServerProcess) -> dict[str, Any]:
    """What grpcio's own clients were told."""
    program = Path(__file__).with_name("standard_client.py")
    run = subprocess.run([sys.executable, program, server.grpc], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_health_says_serving_of_the_whole_and_of_the_service(told: dict[str, Any]) -> None:
    assert told["checked"] == {"": "SERVING", SERVICE: "SERVING", "nothing.Service": "NOT_FOUND"}
    assert told["watched"] == {"": "SERVING", SERVICE: "SERVING"}


def test_reflection_lists_the_services_and_tells_all_of_ours(told: dict[str, Any], stubs: Stubs) -> None:
    ours = stubs.messages.DESCRIPTOR
    assert {SERVICE, "grpc.health.v1.Health"} <= set(told["services"])
    assert told["methods"] == [method.name for method in ours.services_by_name["RuntimeService"].methods]
    assert told["fields"] == {
        name: {field.name: field.number for field in message.fields}
        for name, message in ours.message_types_by_name.items()
    }


def test_with_a_certificate_the_door_speaks_tls_and_nothing_else(stubs: Stubs, tmp_path: Path) -> None:
    certificate, key = certificate_in(tmp_path)
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
        assert "Traceback" not in "".join(server.said)
