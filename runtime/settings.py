"""Every setting of the server, declared once: type, default, check and help. Flags and environment derive from it."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_origin, get_type_hints

from runtime.errors import InvalidSetting

ENVIRONMENT_PREFIX = "PERENNIAL_"
DEFAULT_HTTP_BIND = "127.0.0.1:8000"
"""No setting: with `hypercorn api.http:app` the address is Hypercorn's."""
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Accepts:
    """What a setting accepts: in words, and as a check."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Accepts:
    return Accepts(" | ".join(choices), choices.__contains__, choices)


def at_least(minimum: float) -> Accepts:
    return Accepts(f"{minimum} or more", lambda value: minimum <= value < float("inf"))


def between(low: int, high: int) -> Accepts:
    return Accepts(f"{low} to {high}", lambda value: low <= value <= high)


UNIX = "unix:"
"""What stands before the path of a socket in the file system, in place of a host and a port."""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, with IPv6 in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) <= 65535):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(value: str) -> bool:
    try:
        split_address(value)
    except ValueError:
        return False
    return True


def _is_host(value: object) -> bool:
    return isinstance(value, str) and (":" not in value or value.count(":") > 1) and bool(value) and "/" not in value


def _is_origin(value: object) -> bool:
    if not isinstance(value, str):
        return False
    scheme, between, host = value.partition("://")
    return value == "*" or bool(scheme and between and host and "/" not in host)


ANYTHING = Accepts("any text", lambda _: True)
NOT_EMPTY = Accepts("any text but the empty one", bool)
ADDRESS = Accepts("HOST:PORT, or empty", lambda value: not value or _is_address(value))
KEYS = Accepts(
    "keys separated by commas", lambda keys: all(isinstance(key, str) and key and key.isascii() for key in keys)
)
HOSTS = Accepts(
    "names or addresses without ports, separated by commas; * = any", lambda hosts: all(map(_is_host, hosts))
)
ORIGINS = Accepts("SCHEME://HOST[:PORT], separated by commas; * = any", lambda origins: all(map(_is_origin, origins)))
FLAG = Accepts("true or false", lambda _: True)


def _setting(default: Any, words: str, accepts: Accepts) -> Any:
    # Keys must not appear in logs, so they are not part of the representation.
    return dataclasses.field(default=default, metadata={"help": words, "accepts": accepts}, repr=accepts is not KEYS)


@dataclass(frozen=True, slots=True)
class Settings:
    """A checked, frozen set of settings. Raises InvalidSetting on the first value that makes no sense."""

    model: str = _setting("seedling", "seedling, smollm2, a directory, a GGUF file, or a Hugging Face id", NOT_EMPTY)
    backend: str = _setting("auto", "engine that runs the model", one_of("auto", "torch", "mlx", "openvino"))
    device: str = _setting("auto", "torch device", one_of("auto", "cpu", "cuda", "mps"))
    dtype: str = _setting("auto", "type of weights", one_of("auto", "bfloat16", "float16", "float32"))
    kv_dtype: str = _setting(
        "auto",
        "type of keys and values in slabs; auto: the engine's own, others on openvino alone",
        one_of("auto", "float32", "bfloat16", "float16", "int8"),
    )
    weights: str = _setting(
        "auto",
        "bits a weight; auto: on a CPU the most that are exact and read at the memory's speed",
        one_of("auto", "none", "int8", "int4"),
    )
    sink: int = _setting(4, "tokens kept for ever at the head of a history", between(0, 2**20))
    window: int = _setting(4092, "most recent tokens kept; cut down to the model's own maximum", between(1, 2**31))
    http_overflow: str = _setting(
        "error", "a prompt longer than sink + window on the HTTP door", one_of("error", "evict")
    )
    capacity: int = _setting(8, "long-lived (gRPC, embedded) sessions held at once", between(1, 2**20))
    idle_ttl_s: float = _setting(1800.0, "a session idle longer is evicted; 0 = never", at_least(0))
    max_concurrent: int = _setting(4, "HTTP completions in flight at once", between(1, 2**20))
    admission_policy: str = _setting("reject", "what a completion beyond that meets", one_of("reject", "queue"))
    queue_max_wait_s: float = _setting(0.0, "under queue: longest wait, then 429; 0 = for ever", at_least(0))
    default_max_tokens: int = _setting(1024, "length of a completion that names none", between(1, 2**31))
    request_timeout_s: float = _setting(120.0, "longest time for one HTTP completion", at_least(0.001))
    reader_timeout_s: float = _setting(
        120.0, "a client that does not read its stream so long counts as gone", at_least(0.001)
    )
    idle_connection_s: float = _setting(600.0, "a connection without a call so long is closed", at_least(0.001))
    api_keys: tuple[str, ...] = _setting((), "bearer keys, comma-separated; empty = no authentication", KEYS)
    allow_unauthenticated: bool = _setting(False, "serve off loopback without keys", FLAG)
    allowed_hosts: tuple[str, ...] = _setting(
        ("localhost", "127.0.0.1", "::1"), "without keys: names by which HTTP may be called, comma-separated", HOSTS
    )
    allowed_origins: tuple[str, ...] = _setting(
        (), "origins of pages that browsers may call HTTP from (CORS), comma-separated", ORIGINS
    )
    grpc_bind: str = _setting("127.0.0.1:50051", "gRPC address; empty = none, port 0 picks one", ADDRESS)
    tls_cert: str = _setting("", "PEM file of the gRPC door's certificate chain", ANYTHING)
    tls_key: str = _setting("", "PEM file of the gRPC door's private key", ANYTHING)
    model_label: str = _setting("", "name that the HTTP door reports; empty = the model's name", ANYTHING)
    proposer: str = _setting("none", "speculative proposer", one_of("none", "ngram", "draft", "diffusion"))
    proposer_model: str = _setting("", "model of the draft or diffusion proposer", ANYTHING)
    block_size: int = _setting(8, "tokens in a proposal; no effect without a proposer", between(1, 31))
    num_diffusion_steps: int = _setting(
        2, "steps for a proposal; no effect unless proposer=diffusion", between(1, 1024)
    )
    determinism: str = _setting(
        "strict", "strict: bit-exact; fast: larger kernels for prefill", one_of("strict", "fast")
    )
    state_dir: str = _setting(
        "",
        "directory of durable sessions, or a URL that servers share: s3, gs, az, file, memory; empty = memory only",
        ANYTHING,
    )
    state_lease_s: float = _setting(
        10.0,
        "with a URL: a session to which its server has written nothing for so long may be taken by another",
        at_least(0),
    )
    state_max_bytes: int = _setting(
        0,
        "most bytes in state_dir for which older slabs, sleeping sessions and snapshots make room; 0 = no bound",
        between(0, 2**62),
    )
    log_level: str = _setting("info", "least severe log line on stderr", one_of("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        kinds = get_type_hints(Settings)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = kinds[field.name]
            expected = get_origin(kind) or kind
            numeric = expected is float and type(value) is int
            accepts: Accepts = field.metadata["accepts"]
            if not (type(value) is expected or numeric) or not accepts.holds(value):
                raise _refusal(field, value)
        if bool(self.tls_cert) != bool(self.tls_key):
            raise InvalidSetting("tls_cert and tls_key go together: set both or neither")
        if self.grpc_bind:
            self.check_exposure(self.grpc_bind, "grpc_bind")

    def check_exposure(self, address: str, name: str) -> None:
        """Raises InvalidSetting if other machines can reach `address` and no key protects it.

        A socket in the file system is protected by the permissions of its file.
        """
        if address.removeprefix(UNIX) != address != UNIX:
            return
        try:
            host, _ = split_address(address)
        except ValueError as error:
            raise InvalidSetting(f"{name} must be HOST:PORT, got {address!r}") from error
        if not (is_loopback(host) or self.api_keys or self.allow_unauthenticated):
            raise InvalidSetting(
                f"{name}={address!r} is open to other machines and no key protects it: "
                f"set api_keys ({ENVIRONMENT_PREFIX}API_KEYS) or allow_unauthenticated"
            )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], flags: Mapping[str, str] | None = None) -> Settings:
        """Settings from `PERENNIAL_<FIELD>` variables, with `flags` (by field name) before them."""
        chosen: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = (flags or {}).get(field.name, environ.get(ENVIRONMENT_PREFIX + field.name.upper()))
            if text is not None:
                chosen[field.name] = _read(field, text.strip())
        return cls(**chosen)


def _read(field: dataclasses.Field[Any], text: str) -> Any:
    kind = get_type_hints(Settings)[field.name]
    if kind is str:
        return text
    if get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        raise _refusal(field, text)
    try:
        return kind(text)
    except ValueError as error:
        raise _refusal(field, text) from error


def _refusal(field: dataclasses.Field[Any], value: object) -> InvalidSetting:
    words = field.metadata["accepts"].words
    shown = repr(value) if field.repr else "something else"
    return InvalidSetting(f"{field.name} must be {words}; got {shown} ({ENVIRONMENT_PREFIX}{field.name.upper()})")
