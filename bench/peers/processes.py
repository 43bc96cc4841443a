"""Peers as processes of the interpreter that has them: asked what they have, measured one at a time."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import trio

import bench
from bench.figures import Figure

LONGEST_S = 300
PACKAGES = ("transformers", "llama-cpp-python", "mlx-lm")
_ASK = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""
# Where peers find the modules here.
_ROOT = Path(bench.__file__).parents[1]


class PeerFailed(Exception):
    """What a peer said last before it ended otherwise than it should."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer with one kind of weights, as `module` measures it with `arguments`."""

    label: str
    package: str
    module: str
    arguments: tuple[str, ...]


def speeds(directory: str, threads: int, dtype: str) -> list[Peer]:
    """Every peer that is measured for speed; `dtype` is what an engine in torch computes in here."""
    by_torch = Peer(f"transformers {dtype}", "transformers", "transformers_generate", (directory, str(threads), dtype))
    # Where torch computes in float32, so should somebody else.
    kinds = (*(["F32"] if dtype == "float32" else []), "BF16", "Q8_0", "Q4_K_M")
    by_llama = [
        Peer(f"llama.cpp {kind}", "llama-cpp-python", "llama_cpp_decode", (directory, str(threads), kind))
        for kind in kinds
    ]
    return [by_torch, *by_llama, Peer("mlx-lm bfloat16", "mlx-lm", "mlx_generate", (directory,))]


def qualities(directory: str, threads: int, tokens: str) -> list[Peer]:
    """Every peer that is asked for the perplexity of the tokens in that file."""
    return [
        Peer(f"llama.cpp {kind}", "llama-cpp-python", "llama_cpp_quality", (directory, str(threads), kind, tokens))
        for kind in ("BF16", "Q8_0", "Q4_0")
    ]


def environment() -> dict[str, str]:
    """A peer's. Its threads wait as ours do, without spinning: spinning ones do next to nothing beside any other program."""
    return os.environ | {"PYTHONPATH": str(_ROOT)}


async def installed(interpreter: str) -> dict[str, str]:
    """Versions of the peers that this interpreter has."""
    found: dict[str, str] = json.loads(await _last_line(interpreter, "-c", _ASK, *PACKAGES))
    return found


async def measured(interpreter: str, peer: Peer) -> dict[str, Figure]:
    """Figures by what they are of. Raises PeerFailed."""
    with trio.move_on_after(LONGEST_S):
        said = await _last_line(interpreter, "-m", f"bench.peers.{peer.module}", *peer.arguments)
        return {name: Figure(**one) for name, one in json.loads(said).items()}
    raise PeerFailed(f"not done within {LONGEST_S} s")


async def made_gguf(interpreter: str, directory: str, weights: str) -> str:
    """The path of a GGUF file of the model in `directory`. Raises PeerFailed."""
    return await _last_line(interpreter, "-m", "bench.peers.gguf_file", directory, weights)


async def _last_line(interpreter: str, *arguments: str) -> str:
    done = await trio.run_process(
        [interpreter, *arguments], env=environment(), capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode:
        raise PeerFailed(last_words(done.stderr))
    return last_words(done.stdout)


def last_words(said: bytes) -> str:
    """The last line of what a process wrote."""
    return next(reversed(said.decode(errors="replace").strip().splitlines()), "it said nothing")
