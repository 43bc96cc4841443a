"""Bit-exactness: a row's logits, and so its token, depend on its session alone, never on how forwards were cut."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from runtime.engine.machine import Level, level
from runtime.engine.openvino_fit import fits_cpu
from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.slab_spec import BUCKET_SLOTS
from tests.conftest import save_random_model
from tests.gguf_files import blocks_alone, every_kind, write_gguf
from tests.runtime.engine.feeding import (
    GREEDY,
    BusyNeighbours,
    LogitsEngine,
    batches,
    feed,
    load,
    random_cut,
    random_tokens,
    threads,
    without_products_of_bytes,
)
from tests.runtime.engine.golden import AVX2_ALONE

# What else shows a kernel's order of sums.
_SUITES = ("test_bit_exact.py", "test_linears.py", "test_attention.py", "test_probe.py", "test_golden.py")
_MOST_S = 900
NEIGHBOURS = 7
# Engines of small models choose one thread; with several, kernels have more ways to sum.
THREADS = 2
SAMPLED = Draw(Sampling(temperature=0.8, top_p=0.95, top_k=50, seed=2**63 + 11))
# The shape of attention in Qwen3-0.6B; all else is small.
HEADS_OF_06B = Qwen3Config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=1024,
    eos_token_id=2,
    bos_token_id=None,
    pad_token_id=0,
    tie_word_embeddings=True,
)


# That of SmolLM2-135M in its layers: three heads a group, and widths that are no powers of two.
WIDTHS_OF_SMOLLM2 = LlamaConfig(
    vocab_size=1024,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=1024,
    eos_token_id=2,
    bos_token_id=None,
    pad_token_id=0,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def directories(
    seedling: Path, small_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    heads_of_06b = save_random_model(HEADS_OF_06B, tmp_path_factory.mktemp("heads_of_06b"))
    # seedling's tokenizer has more tokens than this model.
    for name, kinds in (("every kind", every_kind), ("blocks alone", blocks_alone)):
        write_gguf(heads_of_06b, heads_of_06b / f"{name}.gguf", kinds, tokenizer__ggml__tokens=None)
    return {
        "seedling": seedling,
        "small": small_models["qwen3"],
        "heads of 0.6B": heads_of_06b,
        GGUF: heads_of_06b / "every kind.gguf",
        BLOCKS: heads_of_06b / "blocks alone.gguf",
        "widths of SmolLM2": save_random_model(WIDTHS_OF_SMOLLM2, tmp_path_factory.mktemp("widths_of_smollm2")),
    }


@dataclass(frozen=True)
class Case:
    engine: LogitsEngine
    tokens: list[int]
    whole: Tensor

    def fed(self, cuts: Iterable[int], neighbours: BusyNeighbours | None = None) -> Tensor:
        cuts = (min(count, self.engine.facts.row_tile) for count in cuts)
        return feed(self.engine, self.engine.new_pool(1).acquire(), self.tokens, cuts, neighbours=neighbours)


GGUF, BLOCKS = "a GGUF file of every kind", "a GGUF file of blocks alone"
KINDS = (("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float32", "int4"))
# Where bfloat16 is emulated the second model's would take minutes, and seedling's are of the same kernels.
IS_BFLOAT16_NATIVE = level() >= Level.AVX512_BF16
# Slabs of another type than what is computed in.
KV_KINDS = (("float32", "none", "bfloat16"), ("float32", "int8", "float16"), ("float32", "int4", "int8"))
# MLX's products take a hundred times as long on a CPU, so that most of its cases are of a small model. Windows are shorter where
# a forward takes long, whatever its rows.
WINDOWS = {"mlx": 16, "step": 32}
_CASES = (
    *(("torch", "seedling", *kind) for kind in KINDS),
    *(
        ("torch", model, *kind)
        for model in ("heads of 0.6B", "widths of SmolLM2")
        for kind in KINDS
        if kind[0] == "float32" or IS_BFLOAT16_NATIVE
    ),
    *(
        ("openvino", model, *kind)
        for model in ("seedling", "heads of 0.6B", "widths of SmolLM2")
        for kind in KINDS
        if (IS_BFLOAT16_NATIVE if kind == ("bfloat16", "none") else fits_cpu())
    ),
    # Graphs of fewer bits are the same; slabs are of the other type.
    *(("openvino", "widths of SmolLM2", "bfloat16", weights) for weights in ("int8", "int4") if fits_cpu()),
    *(("mlx", "small", *kind) for kind in KINDS),
    ("mlx", "seedling", "float32", "none"),
    ("step", "seedling", "float32", "none"),
    ("step", "widths of SmolLM2", "float32", "int8"),
    *((("step", "heads of 0.6B", "bfloat16", "none"),) if IS_BFLOAT16_NATIVE else ()),
    *(("openvino", GGUF, dtype, "auto") for dtype in ("float32", "bfloat16") if fits_cpu()),
    *((("openvino", BLOCKS, "float32", "auto"),) if fits_cpu() else ()),
)
CASES = (
    *((*case, "auto") for case in _CASES),
    *(("openvino", "widths of SmolLM2", *kind) for kind in KV_KINDS if fits_cpu()),
)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Case:
    """A history three times as long as the window, and its logits when it is fed in one append."""
    backend, model, dtype, weights, kv_dtype = request.param
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    window = WINDOWS.get(backend, 64)
    with pytest.MonkeyPatch.context() as patch:
        if model == BLOCKS:
            without_products_of_bytes(patch)
        engine = load(
            directories[model],
            dtype,
            window=window,
            weights=weights,
            backend=backend,
            kv_dtype=kv_dtype,
            is_probed=True,
        )
    tokens = random_tokens(3 * engine.facts.slab.window, engine.facts.vocabulary)
    torch.set_num_threads(THREADS)
    return Case(engine, tokens, feed(engine, engine.new_pool(1).acquire(), tokens))


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    with threads(THREADS):
        yield


CUTS: Mapping[str, Callable[[], Iterable[int]]] = {
    "ones": lambda: repeat(1),
    "sevens": lambda: repeat(7),
    "33s": lambda: repeat(33),
    "a hundred and the rest": lambda: repeat(100),
    "a random cut": lambda: random_cut(32),
    "a random cut in larger parts": lambda: random_cut(150, seed=9),
}


def test_the_engine_says_that_it_is_bit_exact(case: Case) -> None:
    assert case.engine.facts.is_bit_exact


@pytest.mark.parametrize("cuts", CUTS)
def test_logits_are_the_same_bits_however_the_history_was_cut(case: Case, cuts: str) -> None:
    assert torch.equal(case.fed(CUTS[cuts]()), case.whole)


@pytest.mark.parametrize("cuts", ["sevens", "a random cut"])
def test_logits_are_the_same_bits_beside_seven_busy_sessions(case: Case, cuts: str) -> None:
    neighbours = BusyNeighbours(case.engine, NEIGHBOURS)
    most = case.engine.facts.row_tile - NEIGHBOURS
    chosen = {"sevens": repeat(7), "a random cut": random_cut(most, seed=1)}[cuts]

    assert torch.equal(case.fed(chosen, neighbours), case.whole)


def test_single_rows_are_the_same_bits_beside_seven_busy_sessions(case: Case) -> None:
    at = len(case.tokens) - 32
    slab = case.engine.new_pool(1).acquire()
    feed(case.engine, slab, case.tokens[:at])

    logits = feed(
        case.engine,
        slab,
        case.tokens[at:],
        repeat(1),
        start=at,
        neighbours=BusyNeighbours(case.engine, NEIGHBOURS, seed=2),
    )

    assert torch.equal(logits, case.whole[at:])


def test_logits_are_the_same_bits_whichever_other_rows_need_theirs(case: Case) -> None:
    choice = random.Random(3)
    slab = case.engine.new_pool(1).acquire()
    for batch in batches(slab, case.tokens, random_cut(32, seed=4)):
        rows = tuple(Row(row.slab, row.position, row.token_id, choice.choice([None, GREEDY])) for row in batch.rows)
        wanted = [row.position for row in rows if row.draw]

        assert torch.equal(case.engine.logits(RowBatch(rows)), case.whole[wanted])


def generated(
    case: Case, draw: Draw, cuts: Iterable[int], neighbours: BusyNeighbours | None, length: int = 12
) -> list[int]:
    """What a session generates after its history was fed by `cuts`."""
    slab = case.engine.new_pool(1).acquire()
    history = list(case.tokens)
    for batch in batches(slab, history[:-1], cuts, neighbours=neighbours, draw=draw):
        case.engine.forward(batch)
    while len(history) < len(case.tokens) + length:
        rows = (Row(slab, len(history) - 1, history[-1], draw),)
        batch = neighbours.join(rows) if neighbours else RowBatch(rows)
        drawn = case.engine.forward(batch)
        history.append(drawn[batch.rows.index(rows[0])].token_id)
    return history[len(case.tokens) :]


@pytest.mark.parametrize("draw", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_the_same_however_the_history_was_cut_and_whoever_runs_beside(case: Case, draw: Draw) -> None:
    alone = generated(case, draw, repeat(32), None)
    beside = generated(case, draw, random_cut(20, seed=5), BusyNeighbours(case.engine, NEIGHBOURS, seed=6))

    assert beside == alone


def test_verifying_a_proposal_gives_the_same_bits_as_decoding(case: Case) -> None:
    """Rows beyond the first wrong token are written, thrown away, and written anew."""
    choice = random.Random(7)
    slab = case.engine.new_pool(1).acquire()
    at, logits = 0, []
    while at < len(case.tokens):
        right = choice.randint(1, 8)
        proposal = case.tokens[at : at + right] + random_tokens(8 - right, 1024, seed=at)
        found = feed(case.engine, slab, proposal, start=at)
        logits.append(found[: min(right, len(case.tokens) - at)])
        at += right

    assert torch.equal(torch.cat(logits), case.whole)


@pytest.mark.parametrize(("backend", "model", "dtype", "weights", "kv_dtype"), CASES)
def test_logits_are_the_same_bits_across_a_buckets_edge(
    directories: dict[str, Path], backend: str, model: str, dtype: str, weights: str, kv_dtype: str
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    window = BUCKET_SLOTS + 6
    with pytest.MonkeyPatch.context() as patch:
        if model == BLOCKS:
            without_products_of_bytes(patch)
        engine = load(directories[model], dtype, window=window, weights=weights, backend=backend, kv_dtype=kv_dtype)
    first, start, end = BUCKET_SLOTS - 36, BUCKET_SLOTS - 12, BUCKET_SLOTS + 24
    tokens = random_tokens(end - first, engine.facts.vocabulary)
    pool = engine.new_pool(4)

    def fed(cuts: Iterable[int], neighbours: BusyNeighbours | None = None) -> Tensor:
        slab = pool.acquire()
        feed(engine, slab, tokens[: start - first], start=first)
        return feed(engine, slab, tokens[start - first :], cuts, start, neighbours)

    assert start < BUCKET_SLOTS < engine.facts.slab.visible < end
    whole = fed(repeat(32))
    assert torch.equal(fed(repeat(1)), whole)
    assert torch.equal(fed(repeat(7)), whole)
    assert torch.equal(fed(random_cut(25), BusyNeighbours(engine, NEIGHBOURS)), whole)


# In this file, the largest, because files are handed to processes by their size, and this takes longest.
@pytest.mark.skipif(level() <= Level.AVX2, reason="this CPU knows no more than AVX2: the suites ran so already")
@pytest.mark.timeout(_MOST_S)
def test_the_exactness_suite_passes_on_a_cpu_limited_to_avx2() -> None:
    """Where the CPU knows more than AVX2, the suite also runs as a machine with AVX2 alone would run it."""
    suites = [str(Path(__file__).with_name(name)) for name in _SUITES]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not mlx", *suites],
        env=os.environ | AVX2_ALONE,
        capture_output=True,
        text=True,
        check=False,
    )

    print(run.stdout[-4000:])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
