"""Digests of logits and tokens, by class of machine: `python -m tests.runtime.engine.golden` adds those of this one.

Machines of one kernel class promise each other's bits; a test compares, where this machine's class is in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from runtime.engine.machine import Level, hardware_level, kernel_class
from runtime.events import Sampling
from runtime.models import SEEDLING, find_model
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from tests.runtime.engine.feeding import GREEDY, feed, load, random_tokens, threads

FILE = Path(__file__).with_name("golden.json")
THREADS = 2
AVX2_ALONE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
FORMS = (("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float32", "int4"))
MODELS = (SEEDLING, "wide")
SAMPLED = Draw(Sampling(temperature=0.9, top_p=0.9, seed=7))

# Sums long enough for kernels to split them.
_WIDE = Qwen3Config(
    vocab_size=512,
    hidden_size=2048,
    intermediate_size=3072,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)
_HISTORY, _GENERATED = 200, 16


def directory_of(model: str, home: Path) -> Path:
    """The bundled model, or one made under `home` with weights that are the same bits on every machine."""
    if model == SEEDLING:
        return find_model(SEEDLING)
    random = np.random.default_rng(0)
    wide = AutoModelForCausalLM.from_config(_WIDE, dtype=torch.float32)
    with torch.no_grad():
        for weight in wide.parameters():
            # Whole numbers over a power of two: no library's logarithm or cosine is in them.
            steps = torch.from_numpy(random.integers(-128, 128, weight.shape).astype(np.float32))
            weight.copy_(steps / 2048 if weight.dim() > 1 else 1 + steps / 1024)
    wide.to(torch.bfloat16).save_pretrained(home)
    return home


def digests(directory: Path, dtype: str, weights: str) -> dict[str, str]:
    """Of the logits of a history past its window, and of what is generated after it, greedy and sampled."""
    engine = load(directory, dtype, window=64, weights=weights)
    tokens = random_tokens(_HISTORY, engine.facts.vocabulary, seed=11)
    slab = engine.new_pool(1).acquire()
    with threads(THREADS):
        logits = feed(engine, slab, tokens, repeat(50))
        generated = list(tokens)
        for draw in (*repeat(GREEDY, _GENERATED), *repeat(SAMPLED, _GENERATED)):
            row = Row(slab, len(generated) - 1, generated[-1], draw)
            generated.append(engine.forward(RowBatch((row,)))[0].token_id)
    return {
        "logits": _digest(logits.numpy().tobytes()),
        "tokens": _digest(np.array(generated[_HISTORY:], np.uint32).tobytes()),
    }


def known() -> dict[str, dict[str, dict[str, str]]]:
    """Digests by kernel class and version of torch, then by model and form."""
    content: dict[str, dict[str, dict[str, str]]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return content


def here() -> str:
    """The key of this machine and this torch."""
    with threads(THREADS):
        return f"{kernel_class()}, torch {torch.__version__}"


def name_of(model: str, dtype: str, weights: str) -> str:
    return f"{model} {dtype} {weights}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def main() -> None:
    """Adds this machine's digests to the file, and those that it gives when it is limited to AVX2."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        for model in MODELS:
            directory = directory_of(model, Path(home))
            for form in FORMS:
                found[name_of(model, *form)] = digests(directory, *form)
    FILE.write_text(json.dumps(known() | {here(): found}, indent=1, sort_keys=True) + "\n")
    print(here())
    if hardware_level() > Level.AVX2 and "ATEN_CPU_CAPABILITY" not in os.environ:
        subprocess.run([sys.executable, "-m", __spec__.name], env=os.environ | AVX2_ALONE, check=True)


if __name__ == "__main__":
    main()
