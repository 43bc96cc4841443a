"""The OpenVINO engine: when it is taken, what it refuses, and what its weights come to. The rest is in every engine's suite."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from runtime.engine import findings, load_engine, openvino_engine
from runtime.engine.kept_parts import find_parts
from runtime.engine.machine import Level
from runtime.engine.openvino_fit import fits_cpu
from runtime.engine.parts import Making, Parts, RowGraph
from runtime.engine.torch_slab import SlabStore, as_torch
from runtime.errors import InvalidSetting, ModelUnavailable, NotExact
from runtime.settings import Settings
from runtime.slab import SlabPool
from tests.conftest import SMALL, save_random_model

pytestmark = pytest.mark.skipif(not fits_cpu(), reason="OpenVINO's kernels were not tried on such a CPU")


def test_models_run_on_openvino_and_keep_their_bits_where_they_are_small(large_model: Path, seedling: Path) -> None:
    large, small = (load_engine(Settings(device="cpu", window=64), one).facts for one in (large_model, seedling))

    assert (large.backend, large.is_bit_exact) == ("openvino", True)
    assert (small.backend, small.weights, small.is_bit_exact) == ("openvino", "none", True)


def test_a_type_that_was_asked_for_is_torchs(large_model: Path) -> None:
    assert load_engine(Settings(device="cpu", window=64, dtype="float32"), large_model).facts.backend == "torch"


def test_where_it_is_not_exact_torch_runs_the_model_and_the_log_says_why(
    large_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "perennial" / "findings.json"
    for weights in ("none", "int8"):
        load_engine(Settings(device="cpu", window=64, backend="openvino", weights=weights), large_model)
    file.write_text(file.read_text().replace("true", "false"))

    with caplog.at_level(logging.WARNING, logger="perennial.engine"):
        facts = load_engine(Settings(device="cpu", window=64), large_model).facts

    assert (facts.backend, facts.is_bit_exact) == ("torch", True)
    assert any("torch runs the model" in record.getMessage() for record in caplog.records)


def test_a_form_that_is_not_exact_has_left_memory_when_the_next_is_read(
    large_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[weakref.ref[RowGraph]] = []
    in_memory: list[int] = []

    def find(directory: Path, making: Making) -> Parts:
        in_memory.append(sum(one() is not None for one in heads))
        parts = find_parts(directory, making)
        heads.append(weakref.ref(parts.graphs.head))
        return parts

    # Such a CPU has two forms to choose from.
    monkeypatch.setattr(openvino_engine, "level", lambda: Level.AVX512_BF16)
    monkeypatch.setattr(findings, "find_or_probe", lambda subject, probe: False)
    monkeypatch.setattr(openvino_engine, "find_parts", find)

    with pytest.raises(NotExact):
        load_engine(Settings(device="cpu", window=64, backend="openvino"), large_model)
    assert in_memory == [0, 0]


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"head_dim": 24}], ids=str)
def test_layers_that_it_has_no_parts_for_are_refused_in_a_line_and_left_to_torch(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = save_random_model(LlamaConfig(**SMALL | changes), tmp_path)

    with pytest.raises(ModelUnavailable, match="set backend to torch") as caught:
        load_engine(Settings(device="cpu", window=64, backend="openvino"), other)

    assert "\n" not in str(caught.value)
    assert load_engine(Settings(device="cpu", window=64), other).facts.backend == "torch"


@pytest.mark.parametrize(
    ("kv_dtype", "token_bytes"),
    [("auto", 2 * 1024), ("float32", 4 * 1024), ("float16", 2 * 1024), ("int8", 1024 + 8 * 4)],
)
def test_slabs_hold_the_type_that_was_asked_for(large_model: Path, kv_dtype: str, token_bytes: int) -> None:
    settings = Settings(device="cpu", window=64, backend="openvino", weights="int8", kv_dtype=kv_dtype)
    facts = load_engine(settings, large_model).facts

    assert facts.is_bit_exact
    assert facts.slab.dtype == ("bfloat16" if kv_dtype == "auto" else kv_dtype)
    assert facts.slab.token_bytes == token_bytes


def test_torch_refuses_slabs_of_another_type_than_it_computes_in(seedling: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"kv_dtype=int8 .* set kv_dtype to auto, or backend to openvino"):
        load_engine(Settings(device="cpu", backend="torch", kv_dtype="int8"), seedling)


def test_another_device_than_a_cpu_is_refused(seedling: Path) -> None:
    with pytest.raises(InvalidSetting, match="set backend to torch for device=cuda"):
        load_engine(Settings(device="cuda", backend="openvino"), seedling)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["int8", "int4"]), st.floats(1e-2, 100))
def test_a_weight_is_off_by_no_more_than_half_a_step_of_its_group(seed: int, weights: str, size: float) -> None:
    from runtime.engine.openvino_fit import GROUP
    from runtime.engine.stored import quantise

    # Of smaller weights the scale has fewer digits in half precision.
    weight = size * torch.randn(4, 2 * GROUP, generator=torch.Generator().manual_seed(seed))
    steps, scales = quantise(weight, weights)

    off = (steps * scales.float() - weight.unflatten(1, (-1, GROUP))).abs()
    # With 4 bits one side reaches a step less far than the other, and the largest value of that side may lie there.
    most = 0.501 if weights == "int8" else 1.01
    assert torch.all(off <= most * scales.float().abs() + 1e-7)


def test_slabs_of_pools_lie_in_one_store_as_long_as_it_has_enough(seedling: Path) -> None:
    engine = load_engine(Settings(backend="openvino", device="cpu", window=60, capacity=2, max_concurrent=1), seedling)

    def store_of(pool: SlabPool) -> SlabStore:
        slab = pool.acquire()
        pool.release(slab)
        return as_torch(slab).store

    sessions, completions, more = (engine.new_pool(count) for count in (2, 1, 1))
    store = store_of(sessions)
    assert store_of(completions) is store
    assert store_of(more) is not store

    del sessions, completions
    assert store_of(engine.new_pool(3)) is store


def test_nothing_of_openvino_reports_home() -> None:
    code = "import sys, runtime.engine.openvino_engine; print('openvino_telemetry' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# What allocators round up; a task of each loop that stayed would be half as much again.
_GROWS_AT_MOST = 4 * 2**20
_STEPS = """
import sys
from pathlib import Path

import psutil

from runtime.engine import load_engine
from runtime.rows import Row, RowBatch
from runtime.settings import Settings

engine = load_engine(Settings(device="cpu", window=60, sink=4, backend="openvino"), Path(sys.argv[1]))
slab = engine.new_pool(1).acquire()


def run(first: int, count: int) -> int:
    for position in range(first, first + count):
        engine.logits(RowBatch((Row(slab, position, 7),)))
    return psutil.Process().memory_info().rss


before = run(0, 500)
print(run(500, 3000) - before)
"""


def test_memory_stays_where_it_is_however_many_steps_are_made(seedling: Path) -> None:
    # How many arenas malloc opens depends on what threads happen to meet.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _STEPS, seedling], env=environment, capture_output=True, text=True, check=True
    )

    assert int(run.stdout) < _GROWS_AT_MOST
