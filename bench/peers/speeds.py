"""What a peer is asked, and how it answers: one line of JSON, the figures by what is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial

from bench.figures import Figure, figure, repeats

BUDGET_S = 8
PREFILL = "prefill"
LOAD, MEMORY = "load", "memory of a load and a first forward"
FIRST_LOAD, ON_DISK = "the first load, which keeps graphs", "kept on disk"
PERPLEXITY = "perplexity"
PREFILL_TOKENS = 512
PROMPT_TOKENS, GENERATED_TOKENS = 8, 8


def decoding(streams: int) -> str:
    """The name of a figure of decode."""
    return "decode, 1 stream" if streams == 1 else f"decode, {streams} streams"


def prompt(stream: int, length: int = PROMPT_TOKENS) -> list[int]:
    """Tokens that differ from stream to stream."""
    return [3 + (stream + 7 * index) % 1000 for index in range(length)]


def measure(
    prefill: Callable[[], float], decode: Callable[[int], float], streams: Sequence[int], least: int = 3
) -> dict[str, Figure]:
    """Tokens a second, of `prefill()` and of `decode(streams)`, each a function that does it once and says how fast."""
    kinds: dict[str, Callable[[], float]] = {PREFILL: prefill}
    for count in streams:
        kinds[decoding(count)] = partial(decode, count)
    # The first forward of a process pays for much that later ones do not.
    decode(streams[0])
    return {name: figure("tokens/s", [once() for _ in repeats(BUDGET_S, least)]) for name, once in kinds.items()}


def resident_mib() -> float:
    """What this process has in memory, pages of mapped files included."""
    # Most that is measured here needs nothing but what peers bring along.
    import psutil

    return float(psutil.Process().memory_info().rss / 2**20)


def answer(figures: dict[str, Figure]) -> None:
    """Says it to who asked."""
    print(json.dumps({name: dataclasses.asdict(one) for name, one in figures.items()}))
