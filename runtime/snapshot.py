"""A session in one file: history, keys and values as safetensors, from which it goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.errors import SnapshotMismatch, SnapshotUnreadable
from runtime.events import Overflow
from runtime.slab import Slab

# Of longer files only the ends and some places between are read for a fingerprint: two models differ everywhere.
_WHOLE_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


@dataclass(frozen=True, slots=True)
class Identity:
    """What a slab's bits depend on. A session on disk goes on only where all of it is the same."""

    model: str
    backend: str
    kernels: str
    weights: str
    dtype: str
    sink: int
    window: int
    ring: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session was created with."""

    eos_token_ids: frozenset[int] = frozenset()
    overflow: Overflow = Overflow.EVICT
    label: str = ""

    def to_json(self) -> str:
        return json.dumps([sorted(self.eos_token_ids), self.overflow.value, self.label])

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError where `text` is no terms."""
        eos_token_ids, overflow, label = json.loads(text)
        return cls(frozenset(eos_token_ids), Overflow(overflow), label)


def fingerprint(directory: Path) -> str:
    """A digest of a model's configuration and weights."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for index in range(_SAMPLES + 1):
                file.seek((size - _SAMPLE_BYTES) * index // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def write_snapshot(path: Path, identity: Identity, terms: Terms, slab: Slab, history: array[int]) -> int:
    """Writes a session whole or not at all, and returns the file's size in bytes.

    The history may be longer than what the slab has read: whoever goes on from the snapshot feeds the rest.
    """
    keys, values = slab.contents()
    tensors = {
        "history": torch.from_numpy(np.array(history, dtype=np.uint32).view(np.int32)),
        "keys": keys.contiguous(),
        "values": values.contiguous(),
    }
    metadata = {"identity": identity.to_json(), "terms": terms.to_json(), "frontier": str(slab.frontier)}
    fresh = path.with_name(f"{path.name}.new")
    try:
        save_file(tensors, fresh, metadata)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path.stat().st_size


def read_snapshot(path: Path, identity: Identity, slab: Slab) -> tuple[Terms, array[int]]:
    """Fills an empty slab from a snapshot, and returns the session's terms and history.

    Raises SnapshotMismatch where it was made with another `identity`, SnapshotUnreadable where the file is missing or
    damaged; the slab is empty then.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata["identity"] != identity.to_json():
                raise SnapshotMismatch(
                    "the snapshot was made with another model, backend, kernels, weights, dtype, sink or window: restore "
                    f"it on a server with these: {metadata['identity']}"
                )
            terms = Terms.from_json(metadata["terms"])
            history = array("I", file.get_tensor("history").numpy().tobytes())
            frontier = int(metadata["frontier"])
            if frontier > len(history):
                raise ValueError("its slab is ahead of its history")
            slab.fill(file.get_tensor("keys"), file.get_tensor("values"), frontier)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise SnapshotUnreadable(f"{path.name} is no snapshot that can be read: {error}") from error
    return terms, history
