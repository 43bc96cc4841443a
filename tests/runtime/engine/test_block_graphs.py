"""Products with the blocks of a GGUF file as they lie in it, and an engine that is made of them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from gguf import GGML_QUANT_SIZES, dequantize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import Qwen3Config

from runtime.engine import load_engine
from runtime.engine.block_graphs import InBlocks, knows_blocks
from runtime.engine.block_kernel import (
    STEP,
    gate_row,
    multiply_blocks,
    norm_row,
    round_row,
    run_layers,
    run_program,
)
from runtime.engine.block_lanes import KINDS, SMALL_GROUP, side_by_side
from runtime.engine.block_program import memory_for_rounded
from runtime.engine.machine import Level, hardware_level
from runtime.engine.openvino_fit import fits_cpu
from runtime.engine.parts import InMemory
from runtime.engine.row_attention import RowAttention
from runtime.engine.row_kernel import attend_rows, write_rows
from runtime.engine.torch_slab import as_torch, torch_pool
from runtime.rows import Row, RowBatch
from runtime.settings import Settings
from runtime.slab_spec import SlabSpec
from tests.conftest import save_random_model
from tests.gguf_files import HALVES, Kind, blocks_alone, drawn_blocks, every_kind, write_gguf
from tests.runtime.engine.feeding import GREEDY, feed, load, random_tokens, threads, without_products_of_bytes
from tests.runtime.engine.test_gguf_engine import FITS, WIDE, transformers_logits

pytestmark = pytest.mark.skipif(hardware_level() < Level.AVX2, reason="the kernels are of instructions of AVX2")

OUTPUTS, INPUTS = 24, 512
rows_of = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).standard_normal((20, INPUTS)).astype(np.float32)
)
each_kind = pytest.mark.parametrize("kind", sorted(KINDS), ids=lambda kind: str(kind.name))


def rounded(rows: NDArray[np.float32], group: int) -> tuple[Any, ...]:
    made = memory_for_rounded(rows.size)
    for row in range(len(rows)):
        round_row(rows.reshape(-1), row * INPUTS, group, INPUTS, made, row)
    return made


def products(kind: Kind, blocks: NDArray[np.uint8], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    step = np.zeros(1, STEP)
    for name, value in {"kind": int(kind), "row_bytes": blocks.shape[1], "width": INPUTS, "outputs": OUTPUTS}.items():
        step[name] = value
    out = np.full((len(rows), OUTPUTS), np.nan, np.float32)
    made = rounded(rows, GGML_QUANT_SIZES[kind][0])
    for begin, end in ((0, 16), (16, OUTPUTS)):
        multiply_blocks(step[0], side_by_side(kind, blocks), made, len(rows), out.reshape(-1), begin, end)
    return out


def whole(made: tuple[Any, ...], group: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What rows were rounded to, and how far steps lie apart."""
    steps, scales, _, factors, _ = made
    rows = steps.astype(np.float64).reshape(-1, INPUTS // group, group)
    if group == SMALL_GROUP:
        assert np.array_equal(factors >> 16, factors & 0xFFFF)
        apart = scales[: len(rows), None].astype(np.float64) * (factors & 0xFFFF).reshape(len(rows), -1)
    else:
        apart = scales[: rows.shape[0] * rows.shape[1]].astype(np.float64).reshape(len(rows), -1)
    apart = apart[:, :, None].repeat(group, 2)
    return (rows * apart).reshape(-1, INPUTS), apart.reshape(-1, INPUTS)


@given(rows=rows_of, group=st.sampled_from([32, 256]), spread=st.integers(0, 12))
def test_rows_are_rounded_to_the_nearest_of_255_steps(rows: NDArray[np.float32], group: int, spread: int) -> None:
    rows = rows * np.exp2(-np.arange(INPUTS, dtype=np.float32) // 32 % (spread + 1))
    near, apart = whole(rounded(rows, group), group)

    assert np.all(np.abs(near - rows) <= apart * 0.50001)
    largest = np.abs(rows.reshape(len(rows), -1, group)).max(2).repeat(group, 1)
    # Of a group whose numbers are small beside the row's largest, steps lie up to 1 / 4095 of the row's further apart.
    most = largest if group > SMALL_GROUP else largest + np.abs(rows).max(1, keepdims=True) / 4095
    assert np.all(apart * 127 <= most * 1.00001)


@each_kind
@given(rows=rows_of, seed=st.integers(0, 1000))
def test_products_are_those_of_the_dequantised_weights_with_the_rounded_rows(
    kind: Kind, rows: NDArray[np.float32], seed: int
) -> None:
    blocks = drawn_blocks(kind, OUTPUTS, INPUTS, seed)
    group = GGML_QUANT_SIZES[kind][0]
    near, _ = whole(rounded(rows, group), group)
    weights = dequantize(blocks, kind).astype(np.float64)

    found = products(kind, blocks, rows)

    # What a sum's parts could be off by, each rounded once in float32.
    most = (np.abs(near) @ np.abs(weights).T) * 2.0**-20
    assert np.all(np.abs(found - near @ weights.T) <= most)


@each_kind
@given(rows=rows_of, count=st.integers(1, 20))
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(kind: Kind, rows: NDArray[np.float32], count: int) -> None:
    blocks = drawn_blocks(kind, OUTPUTS, INPUTS)

    all_rows = products(kind, blocks, rows)

    assert np.array_equal(products(kind, blocks, rows[:count]), all_rows[:count])
    assert np.array_equal(products(kind, blocks, rows[-count:]), all_rows[-count:])


@each_kind
def test_a_row_of_zeros_and_one_of_tiny_numbers_have_products_that_are_numbers(kind: Kind) -> None:
    rows = np.zeros((3, INPUTS), np.float32)
    rows[1:] = [[1e-42], [1e-38]]

    assert np.isfinite(products(kind, drawn_blocks(kind, OUTPUTS, INPUTS), rows)).all()


@each_kind
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_stays_none(kind: Kind, wrong: float) -> None:
    rows = np.ones((2, INPUTS), np.float32)
    rows[0, 100] = wrong

    found = products(kind, drawn_blocks(kind, OUTPUTS, INPUTS), rows)

    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


@each_kind
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_fit_into_the_bits_that_they_are_added_up_in(kind: Kind, byte: int, sign: int) -> None:
    values, size = GGML_QUANT_SIZES[kind]
    each = np.full((OUTPUTS * INPUTS // values, size), byte, np.uint8)
    for at in HALVES[kind]:
        each[:, at : at + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    blocks = each.reshape(OUTPUTS, -1)
    weights = dequantize(blocks, kind).astype(np.float64)
    rows = np.full((5, INPUTS), sign, np.float32)

    found = products(kind, blocks, rows)

    assert np.allclose(found, sign * weights.sum(axis=1), rtol=1e-5, atol=np.abs(weights).sum(axis=1).max() * 1e-6)


def digest() -> str:
    """Of products of every kind, with rows of ordinary and of very different numbers, and of norms and gates."""
    # No library's logarithm is in them.
    numbers = np.random.default_rng(1).integers(-512, 512, (7, INPUTS)) << np.arange(INPUTS) // 32 % 9
    rows = numbers.astype(np.float32) / np.float32(128)
    found = hashlib.sha256()
    for kind in sorted(KINDS):
        found.update(products(kind, drawn_blocks(kind, OUTPUTS, INPUTS), rows).tobytes())
    space, constants = rows.reshape(-1).copy(), np.linspace(0.5, 2, INPUTS, dtype=np.float32)
    norm_row(space, 0, constants, 0, np.float32(1e-5), INPUTS, INPUTS, 1)
    gate_row(space, 3 * INPUTS, 2 * INPUTS, INPUTS)
    found.update(space.tobytes())
    return found.hexdigest()[:32]


def test_every_cpu_gives_the_same_bits() -> None:
    """Where these become others, `InBlocks.library` has to say so: sessions that were saved have the earlier ones."""
    assert (InBlocks.library, digest()) == ("rows by blocks 1", "d58219373dce8ac4dae08f33a29358cc")


def test_norms_and_gates_are_those_of_torch() -> None:
    rows = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(0)) * 8
    weight = torch.rand(INPUTS // 2)
    space = torch.cat([rows.flatten(), torch.empty(rows.numel())]).numpy()
    normed_at = rows.numel()

    for row in range(5):
        norm_row(space, row * INPUTS, weight.numpy(), 0, np.float32(1e-6), normed_at + row * INPUTS, INPUTS, 2)
        gate_row(space, row * INPUTS + INPUTS // 2, row * INPUTS, INPUTS // 2)

    gate, up = rows.chunk(2, dim=1)
    made = torch.from_numpy(space).view(2, 5, INPUTS)
    expected = torch.nn.functional.rms_norm(rows.unflatten(1, (2, -1)), (INPUTS // 2,), weight, 1e-6).flatten(1)
    torch.testing.assert_close(made[1], expected)
    torch.testing.assert_close(made[0, :, : INPUTS // 2], torch.nn.functional.silu(gate) * up)


@pytest.fixture(scope="module")
def of_blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A file in which each product meets another kind of blocks, and what its weights are."""
    directory = save_random_model(WIDE, tmp_path_factory.mktemp("blocks"))
    return directory, write_gguf(directory, directory / "model.gguf", blocks_alone)


@pytest.mark.skipif(not fits_cpu(), reason="the engine was not tried on such a CPU")
def test_an_engine_of_blocks_is_exact_near_the_weights_and_says_what_it_holds(
    of_blocks: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, weights = of_blocks
    without_products_of_bytes(monkeypatch)
    tokens = random_tokens(FITS, 2048)
    expected = transformers_logits(directory, weights, tokens)
    engine = load(directory / "model.gguf", backend="openvino", weights="auto")

    logits = feed(engine, engine.new_pool(1).acquire(), tokens)

    # Rows of Q4_K, Q5_K and Q6_K are rounded in groups of 256, as llama.cpp rounds them.
    assert (logits - expected).square().mean().sqrt() < 0.05 * expected.std()
    facts = engine.facts
    assert (facts.backend, facts.weights, facts.is_bit_exact) == ("openvino", "kept", True)
    assert any("kernels of ours, rows in 8 bits" in str(claim) for claim in facts.claims)
    assert len(facts.tensors) == len(KINDS)
    for line in facts.tensors:
        sizes = re.search(r"(\S+) MiB for (\S+) in the file, no value rounded$", line)
        assert sizes is not None, line
        assert sizes[1] == sizes[2]


@pytest.fixture(scope="module")
def of_four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Qwen3Config(**WIDE.to_diff_dict() | {"num_hidden_layers": 4, "layer_types": None})
    directory = save_random_model(config, tmp_path_factory.mktemp("layers"))
    write_gguf(directory, directory / "model.gguf", blocks_alone)
    return directory / "model.gguf"


@pytest.mark.skipif(not fits_cpu(), reason="the engine was not tried on such a CPU")
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_a_call_for_all_layers_gives_the_bits_of_one_graph_after_the_other(
    of_four_layers: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    """Past the window and its sinks, on one thread and on three; rows of two stores go through graph by graph."""
    without_products_of_bytes(monkeypatch)
    settings = Settings(model=str(of_four_layers), window=60, device="cpu", kv_dtype=kv_dtype, determinism="fast")

    def on_threads(count: int) -> Any:
        with threads(count), monkeypatch.context() as patch:
            patch.setattr(psutil, "cpu_count", lambda logical: count)
            engine = load_engine(settings, of_four_layers)
            assert torch.get_num_threads() == count
        return engine

    alone, engine = on_threads(1), on_threads(3)
    tokens = [random_tokens(200, engine.facts.vocabulary, seed) for seed in range(2)]
    expected = [feed(alone, alone.new_pool(1).acquire(), one, repeat(20)) for one in tokens]
    in_one_store = [*(engine.new_pool(1).acquire() for _ in range(2))]
    in_two = [engine.new_pool(1).acquire(), torch_pool(engine.facts.slab, 1).acquire()]

    for slabs in (in_one_store, in_two):
        assert (as_torch(slabs[0]).store is as_torch(slabs[1]).store) == (slabs is in_one_store)
        found = []
        for start in range(0, 200, 20):
            rows = [
                Row(slab, at, one[at], GREEDY)
                for slab, one in zip(slabs, tokens, strict=True)
                for at in range(start, start + 20)
            ]
            found.append(engine.logits(RowBatch(tuple(rows))))
        for number, one in enumerate(expected):
            assert torch.equal(torch.cat([logits.chunk(2)[number] for logits in found]), one)


def compiled_by_a_forward(file: str) -> bool:
    """Whether a forward has more to compile than was prepared."""
    kernels: list[Any] = [run_layers, run_program, attend_rows, write_rows]
    spec = SlabSpec(layers=4, kv_heads=2, head_dim=64, sink=4, window=60, row_tile=128, dtype="bfloat16")
    making = InBlocks(1)
    making.prepare(spec)
    prepared = [len(kernel.signatures) for kernel in kernels]
    parts = making.parts(Path(file), InMemory())
    attention = RowAttention(spec, 4, parts.rotary)
    slab = torch_pool(spec, 1).acquire()
    plan = attention.plan(RowBatch((Row(slab, 0, 5, GREEDY),)))
    embedded = parts.embedding.rows([5])
    angles = parts.rotary(embedded, torch.tensor([0]))
    hidden, query, key, value = parts.graphs.project(embedded, angles, attention, plan, 4)
    parts.graphs.last(attention(3, query, key, value, plan), hidden)
    assert slab.frontiers == (1, 1, 1, 1)
    return prepared != [len(kernel.signatures) for kernel in kernels]


def test_a_forward_finds_its_kernels_prepared(of_four_layers: Path) -> None:
    """In a process of its own, for here other tests have prepared them."""
    code = f"from {__name__} import compiled_by_a_forward; assert not compiled_by_a_forward({str(of_four_layers)!r})"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_with_other_kinds_is_left_to_openvino(of_blocks: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    directory, _ = of_blocks
    write_gguf(directory, tmp_path / "model.gguf", every_kind)

    assert knows_blocks(directory / "model.gguf")
    assert not knows_blocks(tmp_path / "model.gguf")


def with_an_embedding_in_halves(name: str) -> Kind:
    return Kind.F16 if name.startswith("token_embd") else blocks_alone(name)


def test_an_embedding_of_another_kind_that_is_the_head_too_is_left_to_openvino(
    of_blocks: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    write_gguf(of_blocks[0], tmp_path / "model.gguf", with_an_embedding_in_halves)

    assert not knows_blocks(tmp_path / "model.gguf")


@pytest.mark.skipif(not fits_cpu(), reason="the engine was not tried on such a CPU")
def test_a_vocabulary_that_fills_no_eight_lanes_and_an_embedding_in_halves_beside_a_head_are_run_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"vocab_size": 2043, "tie_word_embeddings": False}
    directory = save_random_model(Qwen3Config(**WIDE.to_diff_dict() | changes), tmp_path)
    file = directory / "model.gguf"
    weights = write_gguf(directory, file, with_an_embedding_in_halves, tokenizer__ggml__tokens=None)
    without_products_of_bytes(monkeypatch)
    tokens = random_tokens(FITS, 2043)
    expected = transformers_logits(directory, weights, tokens)
    engine = load(file, backend="openvino", weights="auto")

    logits = feed(engine, engine.new_pool(1).acquire(), tokens)

    assert any("kernels of ours, rows in 8 bits" in str(claim) for claim in engine.facts.claims)
    assert logits.shape == (FITS, 2043)
    assert (logits - expected).square().mean().sqrt() < 0.05 * expected.std()
