"""GGUF files, where llama.cpp is installed to read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

PROMPT = list(range(3, 40))


def test_a_gguf_file_gives_the_logits_of_the_weights_that_it_was_made_of(
    small_models: Mapping[str, Path], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from bench.peers.gguf_file import gguf_file

    for file in small_models["qwen3"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0, -1]

    llama = llama_cpp.Llama(
        str(gguf_file(tmp_path, "F32")), n_ctx=64, type_k=0, type_v=0, logits_all=True, verbose=False
    )
    llama.eval(PROMPT)

    found = torch.from_numpy(llama.scores[len(PROMPT) - 1].copy())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
