"""Settings: declared once, read from the environment and from flags, checked, and all of them used."""

import ast
import dataclasses
import inspect
import pickle
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actors
import api
import runtime
from runtime.errors import InvalidSetting
from runtime.settings import Settings, is_loopback, split_address

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# For every field: a text in the environment and the value that it stands for, which is not the default.
GIVEN: dict[str, tuple[str, object]] = {
    "model": ("org/name", "org/name"),
    "backend": ("torch", "torch"),
    "device": ("cuda", "cuda"),
    "dtype": ("bfloat16", "bfloat16"),
    "kv_dtype": ("int8", "int8"),
    "weights": ("int8", "int8"),
    "sink": ("0", 0),
    "window": ("100", 100),
    "http_overflow": ("evict", "evict"),
    "capacity": ("1", 1),
    "idle_ttl_s": ("0.5", 0.5),
    "max_concurrent": ("9", 9),
    "admission_policy": ("queue", "queue"),
    "queue_max_wait_s": ("3", 3.0),
    "default_max_tokens": ("16", 16),
    "request_timeout_s": ("1.5", 1.5),
    "reader_timeout_s": ("5", 5.0),
    "idle_connection_s": ("60", 60.0),
    "api_keys": ("one, two,", ("one", "two")),
    "allow_unauthenticated": ("yes", True),
    "allowed_hosts": ("perennial.example, ::1", ("perennial.example", "::1")),
    "allowed_origins": ("https://app.example, http://localhost:3000", ("https://app.example", "http://localhost:3000")),
    "grpc_bind": ("[::1]:0", "[::1]:0"),
    "tls_cert": ("cert.pem", "cert.pem"),
    "tls_key": ("key.pem", "key.pem"),
    "model_label": ("mine", "mine"),
    "proposer": ("ngram", "ngram"),
    "proposer_model": ("a/b", "a/b"),
    "block_size": ("31", 31),
    "num_diffusion_steps": ("4", 4),
    "determinism": ("fast", "fast"),
    "state_dir": ("/tmp/state", "/tmp/state"),
    "state_lease_s": ("2.5", 2.5),
    "state_max_bytes": ("1000000", 1_000_000),
    "log_level": ("debug", "debug"),
}
GO_TOGETHER = {"tls_cert": {"tls_key": "key.pem"}, "tls_key": {"tls_cert": "cert.pem"}}


def variable(field: str) -> str:
    return f"PERENNIAL_{field.upper()}"


def test_every_field_is_tried_here() -> None:
    assert set(GIVEN) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_read_from_its_environment_variable(field: str) -> None:
    text, value = GIVEN[field]
    others = {variable(name): text for name, text in GO_TOGETHER.get(field, {}).items()}

    chosen = Settings.from_environment({variable(field): text, **others})

    assert getattr(chosen, field) == value != FIELDS[field].default


@pytest.mark.parametrize("field", FIELDS)
def test_a_flag_comes_before_the_environment(field: str) -> None:
    text, value = GIVEN[field]
    environ = {variable(field): "no such value"}

    chosen = Settings.from_environment(environ, {field: text, **GO_TOGETHER.get(field, {})})

    assert getattr(chosen, field) == value


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_environment({"PATH": "/bin", "PERENNIAL_HOME": "/"}) == Settings()


def test_the_defaults_are_those_of_the_contract() -> None:
    contract = {
        "model": "seedling",
        "backend": "auto",
        "device": "auto",
        "dtype": "auto",
        "kv_dtype": "auto",
        "weights": "auto",
        "sink": 4,
        "window": 4092,
        "http_overflow": "error",
        "capacity": 8,
        "idle_ttl_s": 1800,
        "max_concurrent": 4,
        "admission_policy": "reject",
        "queue_max_wait_s": 0,
        "default_max_tokens": 1024,
        "request_timeout_s": 120,
        "reader_timeout_s": 120,
        "idle_connection_s": 600,
        "api_keys": (),
        "allow_unauthenticated": False,
        "allowed_hosts": ("localhost", "127.0.0.1", "::1"),
        "allowed_origins": (),
        "grpc_bind": "127.0.0.1:50051",
        "tls_cert": "",
        "tls_key": "",
        "model_label": "",
        "proposer": "none",
        "proposer_model": "",
        "block_size": 8,
        "num_diffusion_steps": 2,
        "determinism": "strict",
        "state_dir": "",
        "state_lease_s": 10,
        "state_max_bytes": 0,
        "log_level": "info",
    }

    assert dataclasses.asdict(Settings()) == contract


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_a_flag_is_set_by_any_word_for_yes(text: str) -> None:
    assert Settings.from_environment({variable("allow_unauthenticated"): text}).allow_unauthenticated


@pytest.mark.parametrize("text", ["0", "false", "No", "off"])
def test_a_flag_is_not_set_by_any_word_for_no(text: str) -> None:
    assert not Settings.from_environment({variable("allow_unauthenticated"): text}).allow_unauthenticated


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("model", ""),
        ("backend", "jax"),
        ("device", "tpu"),
        ("dtype", "float8"),
        ("kv_dtype", "int4"),
        ("weights", "int2"),
        ("sink", "-1"),
        ("sink", "four"),
        ("window", "0"),
        ("window", "1.5"),
        ("window", ""),
        ("window", "9" * 5000),
        ("http_overflow", "drop"),
        ("capacity", "0"),
        ("idle_ttl_s", "-1"),
        ("idle_ttl_s", "nan"),
        ("idle_ttl_s", "inf"),
        ("max_concurrent", "0"),
        ("admission_policy", "QUEUE"),
        ("queue_max_wait_s", "soon"),
        ("default_max_tokens", "0"),
        ("request_timeout_s", "0"),
        ("api_keys", "clé"),
        ("allow_unauthenticated", "maybe"),
        ("grpc_bind", "50051"),
        ("grpc_bind", "localhost:http"),
        ("grpc_bind", "localhost:65536"),
        ("grpc_bind", "0.0.0.0:50051"),
        ("reader_timeout_s", "0"),
        ("reader_timeout_s", "never"),
        ("idle_connection_s", "-1"),
        ("tls_cert", "cert.pem"),
        ("tls_key", "key.pem"),
        ("proposer", "oracle"),
        ("block_size", "0"),
        ("block_size", "32"),
        ("num_diffusion_steps", "0"),
        ("determinism", "loose"),
        ("log_level", "loud"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_in_one_line_that_names_the_field(field: str, text: str) -> None:
    with pytest.raises(InvalidSetting, match=field) as caught:
        Settings.from_environment({variable(field): text})

    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window", 1.0),
        ("window", True),
        ("window", "100"),
        ("idle_ttl_s", "100"),
        ("allow_unauthenticated", 1),
        ("api_keys", ["key"]),
        ("api_keys", "key"),
        ("api_keys", (b"key",)),
        ("api_keys", ("key", "")),
        ("model", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=field):
        Settings(**{field: value})


@settings(max_examples=200)
@given(st.sampled_from(sorted(FIELDS)), st.text())
def test_any_text_is_taken_or_refused_in_one_line_that_names_the_field(field: str, text: str) -> None:
    refusal = None
    try:
        Settings.from_environment({variable(field): text})
    except InvalidSetting as error:
        refusal = str(error)

    assert refusal is None or (field in refusal and len(refusal.splitlines()) == 1)


@pytest.mark.parametrize("field", [name for name, f in FIELDS.items() if f.metadata["accepts"].choices])
def test_a_refusal_lists_the_choices(field: str) -> None:
    wrong: Any = {field: "no such choice"}
    with pytest.raises(InvalidSetting) as caught:
        Settings(**wrong)

    assert all(choice in str(caught.value) for choice in FIELDS[field].metadata["accepts"].choices)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_words_that_help(field: str) -> None:
    assert FIELDS[field].metadata["help"]


@pytest.mark.parametrize("keys", [("sécret",), ("secret\u00e9", "other"), "secret", ["secret"]])
def test_a_refusal_of_keys_does_not_show_them(keys: Any) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Settings(api_keys=keys)

    assert "cret" not in str(caught.value)


def test_the_representation_does_not_show_keys() -> None:
    assert "secret" not in repr(Settings(api_keys=("secret",)))


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().window = 1  # type: ignore[misc] # Settings are frozen.


def test_settings_survive_a_way_to_another_process() -> None:
    chosen = Settings(window=10, api_keys=("a",))

    assert pickle.loads(pickle.dumps(chosen)) == chosen


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.168.0.1:1", "example.org:1"])
def test_an_address_open_to_others_needs_a_key(address: str) -> None:
    with pytest.raises(InvalidSetting, match="api_keys"):
        Settings(grpc_bind=address)

    assert Settings(grpc_bind=address, api_keys=("key",)).grpc_bind == address


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:1", "localhost:1", "127.8.9.1:65535", ""])
def test_an_address_of_this_machine_needs_none(address: str) -> None:
    assert Settings(grpc_bind=address).grpc_bind == address


def test_an_address_open_to_others_may_be_allowed_explicitly() -> None:
    assert Settings(grpc_bind="0.0.0.0:1", allow_unauthenticated=True).grpc_bind == "0.0.0.0:1"


@pytest.mark.parametrize(("host", "answer"), [("127.0.0.1", True), ("::1", True), ("10.0.0.1", False), ("a.b", False)])
def test_loopback_hosts_are_told_from_others(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


@settings(max_examples=50)
@given(st.ip_addresses(), st.integers(0, 65535))
def test_an_address_is_split_into_host_and_port(host: object, port: int) -> None:
    written = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"

    assert split_address(written) == (str(host), port)


@pytest.fixture(scope="module")
def names_read() -> set[str]:
    """What product code reads from an object that it calls settings, and what the settings' own methods decide by."""
    files = [file for package in (runtime, actors, api) for file in Path(str(package.__file__)).parent.rglob("*.py")]
    trees = [ast.parse(file.read_text()) for file in files]
    trees += [ast.parse(dedent(inspect.getsource(Settings.check_exposure)).replace("self.", "settings."))]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2].strip("_") == "settings"
    }


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_read_by_product_code(names_read: set[str], field: str) -> None:
    assert field in names_read
