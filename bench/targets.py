"""What the figures are meant to be, and what each that is missed would need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.figures import Figure
from bench.models import QWEN3_06B, SMALL, SMOLLM2
from bench.peers.speeds import LOAD, MEMORY, PREFILL, decoding
from runtime.models import SEEDLING
from runtime.smollm2 import SMOLLM2 as SMOLLM2_FILE


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


_STEP = (
    "Of a step of one stream on OpenVINO in 8 bits, 24.5 ms, the graphs take 18.4, attention 4.1, and what lies between them 2 "
    "(ADR 11). A graph whose weights lie in the cache takes 0.23 ms, one in turn with the others 0.55, and to read its weights "
    "takes 0.32: OpenVINO's kernels for one row compute and read one after the other. It would take kernels that do both at "
    "once. On CPUs with AVX2 alone OpenVINO widens weights to float32 and multiplies in it, where llama.cpp multiplies bytes: "
    "ONNX Runtime's MatMulNBits does so too, in half of the time for few rows (ADR 11)."
)
_EIGHT_BITS = (
    "Weights in 8 bits alone give 20.02, and rows rounded to 8 bits beside them 20.11; llama.cpp's Q8_0 is as far above its "
    "BF16. Rows in float32 would be close enough, without products of whole numbers and their speed."
)
_FEW_ROWS = (
    "From about 8 rows on arithmetic and not memory bounds a linear without AMX; each stream reads keys and values of its own "
    "besides, and a lone one has become faster than they have. With AVX-512 12 is what we want in the end."
)
_HAND_OVERS = (
    "Measured before the loop was profiled and cut: docs/loop.md has what was found, and 156 to 173 us on another machine. It "
    "grows with the time of a forward, whose weights fill the caches meanwhile."
)
_MINUTES_APART = (
    "The two tenths are minutes apart, and the machine's own pace changes meanwhile: the next figure in the table is of the same "
    "tenths, turn beside turn. A machine that nobody shares."
)

_LOAD = (
    "A load imports a graph a layer from disk (6 ms of a core each) and has its weights packed (8 ms a layer of SmolLM2 and 40 "
    "of the 0.6B shape in 4 bits, which oneDNN packs one by one; a quarter of that in 8). Layers that share a graph, or weights "
    "on disk as kernels read them, which OpenVINO does not hand out."
)
_MEMORY = (
    "What comes beside the weights is libraries (numba's compiler, and OpenVINO's plugin where that has the products: 110 MiB, "
    "however large the model), and the slots that were written. On OpenVINO scales of Q4_K, and offsets, are wider than in the "
    "file, and a graph takes a MiB or two."
)
_PRODUCTS = (
    "With AVX-512: of a prompt of the 0.6B shape in Q4_0 three quarters are OpenVINO's products, 515 billion multiplications a "
    "second, half of what two cores of Zen 5 can do on 8 bits. Weights of 4 bits with a sign cost a tenth, sums in groups of 32 "
    "another, groups of 16 (Q6_K) a quarter, which the other products of its layer pay too. It would take kernels that do more, "
    "or 512 rows at once (15 % faster), each count of which a probe would try. With AVX2 alone: of 41 ms for a token of one "
    "stream in Q4_0 kernels of ours take 32 (ADR 20), which wait for memory, attention 5, and the rest is what lies between "
    "them: a second thread has to wake for each layer."
)

# By the scenario and model that a result is of, and the figure's name in it.
TARGETS: Mapping[tuple[str, str], Mapping[str, Target]] = {
    ("speed", QWEN3_06B): {
        "a step of 1 stream over its memory's, int8": at_most(1.25, _STEP),
        "a step of 1 stream over its memory's, int4": at_most(1.4, _STEP),
        "32 streams over 1": at_least(8, _FEW_ROWS),
        "prefill, strict over fast": at_least(0.95),
        **{
            f"{done}, {mode} over {peer}": at_least(bound, _STEP)
            for mode, peer in (("strict", "llama.cpp BF16"), ("int8", "llama.cpp Q8_0"), ("int4", "llama.cpp Q4_K_M"))
            for done, bound in ((PREFILL, 1.5), (decoding(1), 1), (decoding(4), 1.3), (decoding(8), 1.3))
        },
    },
    **{
        ("scheduling", model): {
            "p99 beside the append over the median alone": at_most(
                2,
                "A forward with rows of the append in it takes as long as all its rows do: fewer of them beside streams, which "
                "slows the append, or kernels that are faster for few rows. On OpenVINO a forward of four streams of the 0.6B "
                "shape takes 49 ms, with 4 more rows 70, with 16 more 100, with 32 more 152: 4 to 5 ms for each of the first "
                "rows, where a prompt alone takes 2.4 a row.",
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
        ("gguf", model): {
            **{f"{kind}, {LOAD}, over llama.cpp's": at_most(2, _LOAD) for kind in kinds},
            **{f"{kind}, {MEMORY}, over the file": at_most(1.2, _MEMORY) for kind in kinds},
            **{
                f"{kind}, {done}, over llama.cpp's": at_least(bound, _PRODUCTS)
                for kind in kinds
                for done, bound in ((PREFILL, 1.5), (decoding(1), 1), (decoding(4), 1.3), (decoding(8), 1.3))
            },
        }
        for model, kinds in ((QWEN3_06B, ("Q8_0", "Q4_0", "Q4_K_M")), (SMOLLM2_FILE, ("Q4_1",)))
    },
    ("quality", SMOLLM2): {"perplexity, int8 above 16 bits": at_most(0.5, _EIGHT_BITS)},
    ("loop", QWEN3_06B): {"share of a token that is not its forward": at_most(3)},
    ("loop", SEEDLING): {"a token but for its forward": at_most(200, _HAND_OVERS)},
    **{
        ("marathon", model): {
            "p50 of the last tenth over the second's": at_most(1.02, _MINUTES_APART),
            "a turn of the last tenth over one of the second beside it": at_most(1.02),
            "resident growth from the first tenth on, less 4 bytes a token": at_most(1),
            "kv_live_bytes once full, most over least": at_most(1),
        }
        for model in (SMALL, SEEDLING)
    },
}
