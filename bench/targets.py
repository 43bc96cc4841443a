"""What the figures are meant to be, and what each that is missed would need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.figures import Figure
from bench.models import QWEN3_06B, SMALL
from runtime.models import SEEDLING


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for a figure's median: the most that it may be, unless the least. `needs` is for when it is missed."""

    bound: float
    is_least: bool = False
    needs: str = ""

    @property
    def words(self) -> str:
        return f"{'at least' if self.is_least else 'at most'} {self.bound:,g}"

    def is_met_by(self, figure: Figure) -> bool:
        return figure.median >= self.bound if self.is_least else figure.median <= self.bound


def at_most(bound: float, needs: str = "") -> Target:
    return Target(bound, False, needs)


def at_least(bound: float, needs: str = "") -> Target:
    return Target(bound, True, needs)


_BETWEEN_LINEARS = (
    "With weights in half precision the linears take two thirds of a step. The rest is attention, some 80 small operations in "
    "each layer, and the Python between them: layers that run as one compiled whole, which torch.compile does not make of them "
    "(ADR 6)."
)
_FEW_ROWS = (
    "AVX2 multiplies in float32, and from about 8 rows on arithmetic and not memory bounds a linear; each stream reads keys and "
    "values of its own besides, and a lone one has become faster than they have. A machine with bf16 and AMX."
)
_FOUR_BITS = (
    "torch's kernel for weights of 4 bits computes in bfloat16, which this machine emulates; llama.cpp multiplies integers. No "
    "library here multiplies 4 by 8 bits on AVX2: FBGEMM begins at 8, torchao's kernels want AVX-512."
)
_HAND_OVERS = (
    "Each token is handed to the engine's thread and back, and passes executor, session and asker. A round trip to a session and "
    "a hand-over are a quarter of it; where the rest goes was not found. A profile of the loop first."
)
_MINUTES_APART = (
    "The two tenths are minutes apart, and the machine's own pace changes meanwhile: the next figure in the table is of the same "
    "tenths, turn beside turn. A machine that nobody shares."
)

# By the scenario and model that a result is of, and the figure's name in it.
TARGETS: Mapping[tuple[str, str], Mapping[str, Target]] = {
    ("speed", QWEN3_06B): {
        "a step of 1 stream over the floor's": at_most(1.10, _BETWEEN_LINEARS),
        "8 streams over 1": at_least(7, _FEW_ROWS),
        "32 streams over 1": at_least(16, _FEW_ROWS),
        "prefill, strict over fast": at_least(0.6),
        "prefill, fast over the floor": at_least(0.9),
        "prefill, strict over llama.cpp BF16": at_least(1),
        "prefill, fast over llama.cpp BF16": at_least(1),
        "1 stream, int8 over llama.cpp Q8_0": at_least(1, _BETWEEN_LINEARS),
        "1 stream, int4 over llama.cpp Q4_K_M": at_least(1, _FOUR_BITS),
    },
    **{
        ("scheduling", model): {
            "p99 beside the append over the median alone": at_most(
                2,
                "A forward with rows of the append in it takes as long as all its rows do: fewer of them beside streams, which "
                "slows the append, or kernels that are faster for many rows.",
            ),
            "all tokens together over the sum of both alone": at_least(
                0.9,
                "Where arithmetic and not memory bounds a forward, two tasks share the machine and their paces add up to 1 at "
                "best (the row below in the table): kernels that are faster for more rows.",
            ),
        }
        for model in (QWEN3_06B, SMALL)
    },
    **{
        ("proposing", model): {
            "quoting: ngram over none": at_least(2.5),
            **{f"unforeseen: {name} over none": at_least(0.97) for name in proposers},
        }
        for model, proposers in ((QWEN3_06B, ("ngram",)), (SEEDLING, ("ngram", "draft", "diffusion")))
    },
    ("loop", QWEN3_06B): {"share of a token that is not its forward": at_most(3)},
    ("loop", SEEDLING): {"a token but for its forward": at_most(200, _HAND_OVERS)},
    **{
        (scenario, model): {
            "p50 of the last tenth over the second's": at_most(1.02, _MINUTES_APART),
            "a turn of the last tenth over one of the second beside it": at_most(1.02),
            "resident growth from the first tenth on, less 4 bytes a token": at_most(1),
            "kv_live_bytes once full, most over least": at_most(1),
        }
        for scenario, model in (("marathon", SMALL), ("marathon", SEEDLING), ("marathon-mlx", SEEDLING))
    },
    ("mlx", QWEN3_06B): {"1 stream over mlx-lm's, by turns": at_least(0.95)},
    ("flatness", SEEDLING): {"mean of the last ten turns over the first ten's": at_most(1.15)},
}
