"""Errors: what each one tells a client."""

import inspect

import grpc
import pytest

from runtime import errors
from runtime.errors import InvalidRequest, InvariantViolation, PerennialError, RequestError, StartError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PerennialError)]
# Section 3 and 4 of the contract.
STATUSES = {
    "InvalidRequest": ("INVALID_ARGUMENT", 422),
    "MalformedRequest": ("INVALID_ARGUMENT", 400),
    "Unauthenticated": ("UNAUTHENTICATED", 401),
    "SessionNotFound": ("NOT_FOUND", 404),
    "ModelNotFound": ("NOT_FOUND", 404),
    "HistoryMismatch": ("ABORTED", 409),
    "SlabOverflow": ("OUT_OF_RANGE", 400),
    "PayloadTooLarge": ("RESOURCE_EXHAUSTED", 413),
    "CapacityExhausted": ("RESOURCE_EXHAUSTED", 429),
    "Saturated": ("RESOURCE_EXHAUSTED", 429),
    "NotServing": ("UNAVAILABLE", 503),
    "InvariantViolation": ("FAILED_PRECONDITION", 500),
    "EngineFailed": ("UNAVAILABLE", 500),
}


def made(kind: type[PerennialError]) -> PerennialError:
    return kind("words", "inv1") if issubclass(kind, InvariantViolation) else kind("words")


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_a_status_that_grpc_and_http_know(kind: type[PerennialError]) -> None:
    assert kind.grpc in grpc.StatusCode.__members__
    assert 400 <= kind.http < 600


@pytest.mark.parametrize("name", STATUSES)
def test_an_error_has_the_statuses_of_the_contract(name: str) -> None:
    kind = getattr(errors, name)

    assert (kind.grpc, kind.http) == STATUSES[name]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_says_its_words_and_nothing_else(kind: type[PerennialError]) -> None:
    assert str(made(kind)) == "words"


@pytest.mark.parametrize("kind", [kind for kind in ALL if issubclass(kind, RequestError)])
def test_no_answer_to_a_request_stops_the_start(kind: type[PerennialError]) -> None:
    assert not issubclass(kind, StartError)


def test_an_invalid_request_names_the_field_to_blame() -> None:
    assert (InvalidRequest("words", "seed").param, InvalidRequest("words").param) == ("seed", None)
