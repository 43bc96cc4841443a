"""The CUDA engine's step, on a CPU: what a graph may capture, what stays where it is, and what missing rows may touch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.engine.architectures import missing_parts
from runtime.engine.configuration import Form, read_config, slab_spec
from runtime.engine.graph_engine import GraphEngine
from runtime.engine.linears import ROWS_ON_GPU
from runtime.engine.step_attention import STEP_ATTENTION_NAME
from runtime.engine.step_inputs import StepInputs
from runtime.engine.step_model import StepModel, kernels_for
from runtime.engine.torch_model import load_model
from runtime.engine.torch_slab import SlabArena, as_torch
from runtime.errors import CapacityExhausted
from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.settings import Settings
from tests.runtime.engine.feeding import GREEDY, MOST_SLABS, LogitsEngine, feed, load, random_tokens

CPU = torch.device("cpu")
SHORT = Settings(window=64)
SLABS = 3


@pytest.fixture(scope="module")
def engine(seedling: Path) -> LogitsEngine:
    return load(seedling, window=64, backend="step")


@pytest.fixture
def arena(seedling: Path) -> SlabArena:
    config = read_config(seedling)
    return SlabArena(slab_spec(config, SHORT, torch.float32, row_tile=ROWS_ON_GPU), SLABS + 1)


@pytest.fixture
def model(seedling: Path, arena: SlabArena) -> StepModel:
    loaded = load_model(seedling, Form(torch.float32, "none"), CPU, STEP_ATTENTION_NAME, is_strict=True)
    return StepModel(loaded, arena, kernels_for(CPU, 1))


class NothingReadBack(TorchDispatchMode):
    """Fails where something would wait for the device, or depend on what only the device knows: no graph can capture it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_step_waits_for_nothing_that_a_graph_could_not_replay(model: StepModel, arena: SlabArena) -> None:
    slab = arena.pool(1).acquire()
    model.inputs.fill(RowBatch((Row(slab, 0, 5, GREEDY),)))

    with NothingReadBack():  # type: ignore[no-untyped-call] # torch's class.
        model.body()
        model.head()


@torch.inference_mode()
def test_all_that_a_step_reads_and_writes_stays_where_it_is(model: StepModel, arena: SlabArena) -> None:
    def places() -> list[int]:
        inputs = model.inputs
        columns = (inputs.tokens, inputs.positions, inputs.slabs, inputs.slots, inputs.drawing, inputs.firsts)
        return [
            one.data_ptr() for one in (*columns, model.logits, model.likeliest, arena.store.keys, arena.store.values)
        ]

    before = places()
    slab = arena.pool(1).acquire()
    for position in range(3):
        model.inputs.fill(RowBatch((Row(slab, position, 5, GREEDY),)))
        model.body()
        model.head()

    assert places() == before


@torch.inference_mode()
def test_rows_that_are_missing_touch_no_slab_that_somebody_has(model: StepModel, arena: SlabArena) -> None:
    slab, other = (as_torch(arena.pool(1).acquire()) for _ in range(2))
    other.keys.fill_(3.0)

    model.inputs.fill(RowBatch((Row(slab, 7, 5, None),)))
    model.body()

    assert (other.keys == 3.0).all()
    written = slab.keys[0].abs().sum(dim=(0, 2)).nonzero().flatten().tolist()
    assert written == [slab.spec.slot(7)]


def test_tokens_are_those_of_the_logits_however_each_is_drawn(engine: LogitsEngine) -> None:
    tokens = random_tokens(20, engine.facts.vocabulary)
    draws = (GREEDY, None, Draw(Sampling(temperature=0.7, seed=5)), Draw(Sampling(), top_logprobs=3))
    slab, again = engine.new_pool(1).acquire(), engine.new_pool(1).acquire()
    logits = feed(engine, slab, tokens)

    rows = tuple(Row(again, at, token, draws[at % 4]) for at, token in enumerate(tokens))
    drawn = iter(engine.forward(RowBatch(rows)))

    for row in rows:
        if row.draw is not None:
            token = next(drawn)
            if row.draw.sampling.temperature == 0.0:
                assert token.token_id == int(logits[row.position].argmax())
            assert (token.logprobs is not None) == (row.draw.top_logprobs is not None)
    assert next(drawn, None) is None


def test_greedy_tokens_need_no_logits(engine: LogitsEngine) -> None:
    tokens = random_tokens(ROWS_ON_GPU, engine.facts.vocabulary)
    logits = feed(engine, engine.new_pool(1).acquire(), tokens)
    slab = engine.new_pool(1).acquire()

    drawn = engine.forward(RowBatch(tuple(Row(slab, at, token, GREEDY) for at, token in enumerate(tokens))))

    assert [token.token_id for token in drawn] == logits.argmax(dim=-1).tolist()
    assert slab.frontier == len(tokens)


def test_slabs_are_had_again_once_nobody_holds_them(engine: LogitsEngine) -> None:
    for _ in range(2 * MOST_SLABS):
        engine.new_pool(MOST_SLABS // 2)


def test_more_slabs_than_there_are_cannot_be_had(arena: SlabArena) -> None:
    pool = arena.pool(SLABS)
    with pytest.raises(CapacityExhausted, match="raise capacity"):
        arena.pool(2)
    assert pool.total == SLABS


@pytest.fixture(scope="module")
def inputs(seedling: Path) -> tuple[StepInputs, SlabArena]:
    config = read_config(seedling)
    spec = slab_spec(config, SHORT, torch.float32, row_tile=ROWS_ON_GPU)
    return StepInputs(ROWS_ON_GPU, 5, SLABS, CPU), SlabArena(spec, SLABS + 1)


@given(lengths=st.lists(st.integers(0, 20), min_size=SLABS, max_size=SLABS), starts=st.integers(0, 10_000_000))
def test_each_row_attends_in_one_block_of_its_slab(
    inputs: tuple[StepInputs, SlabArena], lengths: list[int], starts: int
) -> None:
    step, arena = inputs
    slabs = [pool.acquire() for pool in [arena.pool(1) for _ in range(SLABS)]]
    rows = [Row(slab, starts + n, n) for slab, length in zip(slabs, lengths, strict=True) for n in range(length)]

    step.fill(RowBatch(tuple(rows)))

    counts = [int(count) for count in step.counts if count]
    assert max(counts, default=0) <= step.block
    covered = [
        int(first) + offset
        for first, count in zip(step.firsts, step.counts, strict=True)
        for offset in range(int(count))
    ]
    assert covered == list(range(len(rows)))
    for first, count in zip(step.firsts.tolist(), step.counts.tolist(), strict=True):
        assert len({step.slabs[row].item() for row in range(first, first + count)}) <= 1
    assert step.positions.tolist() == [row.position for row in rows] + [-1] * (ROWS_ON_GPU - len(rows))
    assert set(step.slabs[len(rows) :].tolist()) <= {SLABS}


def test_a_model_with_parts_that_a_step_does_not_have_runs_without_one(small_models: dict[str, Path]) -> None:
    assert missing_parts(read_config(small_models["gpt_oss"]), "cuda")
    assert not missing_parts(read_config(small_models["qwen3"]), "cuda")


def test_a_step_says_on_what_it_stands(engine: LogitsEngine) -> None:
    assert isinstance(engine, GraphEngine)
    assert engine.facts.row_tile == engine.facts.row_step == ROWS_ON_GPU
    assert [claim.split(" ")[0] for claim in engine.facts.claims] == ["linears", "attention", "norms,"]
