"""The kernels in Triton against torch's products: run by Triton's interpreter, or on the device where there is one.

`just kernels` runs them; they are skipped where triton is not installed, as beside torch for CPUs.
"""

import os

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from runtime.dtypes import name_of
from runtime.engine.rotary import ExactRotary
from runtime.engine.step_attention import Step, attend_by_products
from runtime.engine.step_inputs import StepInputs
from runtime.engine.torch_slab import SlabArena
from runtime.rows import Row, RowBatch
from runtime.slab_spec import SlabSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("no device for Triton's kernels, and TRITON_INTERPRET is not set", allow_module_level=True)
kernels = pytest.importorskip("runtime.engine.step_kernels", reason="triton is not installed", exc_type=ImportError)

# Triton's interpreter computes nothing in bfloat16.
HALVES = [torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
ROWS = 12
SHAPES = {"pairs of heads": (4, 2, 32), "three a group": (9, 3, 64), "one width of no power of two": (2, 2, 80)}
# In the window, across a run's end, at the window's edge, and past it, long after.
STARTS = (0, 254, 298, 10_000_000)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return SHAPES[request.param]


class Attending:
    """Slabs full of random numbers, and queries over them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        heads, groups, width = shape
        self.spec = SlabSpec(1, groups, width, sink=4, window=300, row_tile=ROWS, dtype=name_of(dtype))
        self.arena = SlabArena(self.spec, 3, DEVICE)
        self.slabs = [self.arena.pool(1).acquire() for _ in range(2)]
        self.inputs = StepInputs(ROWS, kernels.block_rows(heads // groups), 2, DEVICE)
        config = LlamaConfig(hidden_size=heads * width, num_attention_heads=heads, head_dim=width)
        self.rotary = ExactRotary(LlamaRotaryEmbedding(config)).to(DEVICE)
        generator = torch.Generator().manual_seed(0)
        for held in (self.arena.store.keys, self.arena.store.values):
            held.copy_(torch.randn(held.shape, generator=generator))
        self.query = torch.randn(heads, ROWS, width, generator=generator).to(DEVICE, dtype)

    def __call__(self, *pieces: tuple[int, int, int], by_products: bool = False) -> torch.Tensor:
        """What rows attend to, of pieces of a slab's number, a position and a count."""
        rows = [Row(self.slabs[slab], start + n, 0) for slab, start, count in pieces for n in range(count)]
        self.inputs.fill(RowBatch(tuple(rows)))
        step = Step.of(self.spec, self.arena.store, self.inputs, kernels.attend_by_kernels, self.rotary)
        attend = attend_by_products if by_products else kernels.attend_by_kernels
        keys, values = self.arena.store.keys[0], self.arena.store.values[0]
        return attend(self.query, keys, values, step).cpu()


@pytest.mark.parametrize("start", STARTS)
def test_kernels_attend_as_products_do(shape: tuple[int, int, int], start: int) -> None:
    attending = Attending(shape, torch.float32)

    expected = attending((0, start, 7), (1, start // 2, 3), by_products=True)

    torch.testing.assert_close(attending((0, start, 7), (1, start // 2, 3)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_attend_in_16_bits_as_products_do(dtype: torch.dtype) -> None:
    attending = Attending(SHAPES["pairs of heads"], dtype)

    expected = attending((0, 290, 12), by_products=True)

    torch.testing.assert_close(attending((0, 290, 12)), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("start", STARTS)
def test_a_row_attends_to_the_same_bits_whatever_is_beside_it(start: int, dtype: torch.dtype) -> None:
    attending = Attending(SHAPES["pairs of heads"], dtype)
    whole = attending((0, start, ROWS))

    for count in (1, 5, 8):
        assert torch.equal(attending((0, start, count), (1, 40, ROWS - count))[:count], whole[:count])


def test_rows_that_are_missing_attend_to_nothing() -> None:
    attending = Attending(SHAPES["pairs of heads"], torch.float32)

    assert not attending((0, 290, 5))[5:].any()
