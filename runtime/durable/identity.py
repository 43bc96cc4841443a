"""What must match for a stored session to continue here: for its history the model, for its slab all that its bits depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from runtime.errors import ModelUnavailable
from runtime.events import Overflow

# Of longer files a fingerprint reads only the ends and some places between: two models differ everywhere.
_WHOLE_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


@dataclass(frozen=True, slots=True)
class HistoryIdentity:
    """The model whose tokens a history holds. A history can be used by another engine, but not by another model."""

    model: str
    vocabulary: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True)
class SlabIdentity:
    """All that a slab's bits depend on besides its tokens. `version` changes when our engines' arithmetic does."""

    model: str
    backend: str
    kernels: str
    weights: str
    dtype: str
    kv_dtype: str
    sink: int
    window: int
    slots: int
    version: int = field(default=3)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session was created with. One that `is_lent` is of conversations, which lend it to their turns."""

    eos_token_ids: frozenset[int] = frozenset()
    overflow: Overflow = Overflow.EVICT
    label: str = ""
    is_lent: bool = False

    def to_json(self) -> str:
        lent = [True] if self.is_lent else []
        return json.dumps([sorted(self.eos_token_ids), self.overflow.value, self.label, *lent])

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError if `text` is not the JSON of terms."""
        eos_token_ids, overflow, label, *lent = json.loads(text)
        return cls(frozenset(eos_token_ids), Overflow(overflow), label, lent == [True])


def fingerprint(directory: Path) -> str:
    """A digest of a model's configuration and weights, in a directory or a GGUF file. Raises ModelUnavailable."""
    digest = hashlib.blake2b(digest_size=16)
    parts = [directory] if directory.is_file() else [directory / "config.json", *directory.glob("*.safetensors")]
    for path in sorted(parts):
        try:
            _take(path, digest)
        except OSError as error:
            raise ModelUnavailable(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _take(path: Path, digest: hashlib.blake2b) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}:".encode())
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
            return
        for index in range(_SAMPLES + 1):
            file.seek((size - _SAMPLE_BYTES) * index // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
