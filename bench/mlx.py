"""The MLX engine beside mlx-lm itself: one stream, by turns, in one process and one type."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from actors import open_runtime
from actors.executor import EngineThread
from bench.figures import figure, repeats
from bench.peers.speeds import GENERATED_TOKENS, prompt
from bench.scenario import Result, Setup
from bench.speed import WINDOW, decode
from runtime.models import find_model

BUDGET_S = 90


class MlxLm:
    """mlx-lm's own model and its own generation. It stays on the thread that made it."""

    def __init__(self, directory: str, dtype: str) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load

        self._model: Any = load(directory)[0]
        self._model.set_dtype(getattr(mx, dtype))

    def decode(self) -> float:
        """Tokens a second."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        tokens = generate_step(mx.array(prompt(0)), self._model, max_tokens=GENERATED_TOKENS + 1)
        next(tokens)
        began = time.perf_counter()
        count = sum(1 for _ in tokens)
        return count / (time.perf_counter() - began)


async def run(setup: Setup) -> Result:
    result = Result(WINDOW)
    if find_spec("mlx_lm") is None:
        result.remarks.append("mlx-lm is not installed here")
        return result
    # On a CPU the probe would take minutes for a large head, only to find the sizes that fast has.
    settings = replace(setup.settings, backend="mlx", determinism="fast", capacity=1, max_concurrent=1, window=WINDOW)
    ours: list[float] = []
    theirs: list[float] = []
    with ThreadPoolExecutor(max_workers=1) as pool:
        thread = EngineThread(pool)
        async with open_runtime(settings) as runtime:
            other = await thread.run(MlxLm, str(find_model(settings.model)), runtime.facts.dtype)
            await decode(runtime, 1)
            await thread.run(other.decode)
            for _ in repeats(BUDGET_S):
                ours.append(await decode(runtime, 1))
                theirs.append(await thread.run(other.decode))
            result.remarks.append(f"in {runtime.facts.dtype}, on MLX's {runtime.facts.device}")
    result.peers["mlx-lm"] = version("mlx-lm")
    result.figures = {
        "perennial on MLX: decode, 1 stream": figure("tokens/s", ours),
        "mlx-lm: decode, 1 stream": figure("tokens/s", theirs),
        "1 stream over mlx-lm's, by turns": figure("x", [one / other for one, other in zip(ours, theirs, strict=True)]),
    }
    return result
