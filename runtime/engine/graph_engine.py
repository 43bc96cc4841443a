"""The engine for CUDA: one step of fixed shape, captured once as a graph and replayed for every forward.

A kernel chooses its order of sums by the shape of its input. Here each input has one shape: a step always has `ROWS_ON_GPU`
rows, of which a batch may leave some unused. More rows than one cost nothing on a GPU, whose time goes into reading the
weights. On a CPU the same step runs without being captured, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from runtime.engine import EngineFacts, findings
from runtime.engine.configuration import (
    Form,
    check_covered,
    check_memory,
    count_weights,
    engine_facts,
    read_config,
    refuse,
    slab_spec,
)
from runtime.engine.drawing import draw_tokens
from runtime.engine.exact import Claim, Ground
from runtime.engine.linears import ROWS_ON_GPU, RowLinear, weights_bytes
from runtime.engine.machine import kernel_class
from runtime.engine.probe import PROBED_ROWS, is_bit_exact
from runtime.engine.step_attention import STEP_ATTENTION_NAME
from runtime.engine.step_model import StepModel, capture, kernels_for
from runtime.engine.torch_model import (
    Loaded,
    first_layers,
    forms_of,
    free_memory,
    held_weights,
    linear_claims,
    linears_are_exact,
    load_model,
)
from runtime.engine.torch_slab import SlabArena
from runtime.events import Token
from runtime.gguf_file import GgufFile
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool
from runtime.slab_spec import SlabSpec

_PROBED_SLABS = 2
# With a workspace of fixed size cuBLAS chooses the same kernels in every stream.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_REST = Claim("norms, activations, rotation", "torch's kernels, of one shape", Ground.FIXED_ROWS)


class GraphEngine:
    """A causal language model on one CUDA device, or on a CPU as its double. All of its slabs are allocated at the start."""

    def __init__(self, loaded: Loaded, spec: SlabSpec, form: Form, slabs: int, *, is_bit_exact: bool) -> None:
        """Pools can have `slabs` slabs in all at a time. `form` describes the model's linears."""
        self._config = loaded.model.config
        self._spec, self._form = spec, form
        self._device: torch.device = loaded.model.device
        self._is_bit_exact = is_bit_exact
        self._linears = [part for part in loaded.model.modules() if isinstance(part, RowLinear)]
        self._weights_bytes = weights_bytes(loaded.model)
        # One more for the unused rows of a step.
        self._arena = SlabArena(spec, slabs + 1, self._device)
        self._kernels = kernels_for(self._device, self._config.num_attention_heads // spec.kv_heads)
        self._model = StepModel(loaded, self._arena, self._kernels)
        self._body = capture(self._model.body, self._device)
        self._head = capture(self._model.head, self._device)

    @classmethod
    def load(
        cls, settings: Settings, directory: Path, device: torch.device, beside: EngineFacts | None = None
    ) -> GraphEngine:
        """The engine for the model in `directory` on `device`, which under `strict` a probe has found exact.

        Raises InvalidSetting, ModelUnavailable, NotEnoughMemory or NotExact.
        """
        os.environ.setdefault(*_WORKSPACE)
        config = read_config(directory)
        check_covered(config, "cuda")
        count = count_weights(config, directory)
        forms = forms_of(settings, device, count, GgufFile.read(directory).kinds() if directory.is_file() else {})
        is_strict = settings.determinism == "strict"
        slabs = max(settings.capacity + settings.max_concurrent, _PROBED_SLABS)
        for form in forms:
            spec = slab_spec(config, settings, form.dtype, row_tile=ROWS_ON_GPU)
            needed = held_weights(config, count) * form.dtype.itemsize
            check_memory(needed, free_memory(device), settings, spec, beside)
            loaded = load_model(directory, form, device, STEP_ATTENTION_NAME, is_strict=is_strict)
            if not is_strict or _is_proven(loaded, spec, form):
                return cls(loaded, spec, form, slabs, is_bit_exact=is_strict)
        raise refuse(forms)

    @cached_property
    def facts(self) -> EngineFacts:
        return engine_facts(
            "torch",
            self._config,
            self._form,
            self._spec,
            device=self._device.type,
            weights_bytes=self._weights_bytes,
            row_step=self._spec.row_tile,
            kernel_class=kernel_class(self._device),
            is_bit_exact=self._is_bit_exact,
            claims=(*linear_claims(self._linears), self._kernels.claim, _REST),
            tried=f"each linear on {PROBED_ROWS} rows or more, a layer in batches of two sessions",
        )

    def new_pool(self, count: int) -> SlabPool:
        """Raises CapacityExhausted if fewer slabs are left."""
        return self._arena.pool(count)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        """The logits of the rows with `draw`, [rows, vocabulary] float32; at most `row_tile` rows run at once."""
        logits = self._model.logits[: self._run(batch)].clone()
        if self._device.type == "cuda":
            # Wait until the step has read its inputs, so that they may be filled again.
            torch.cuda.synchronize(self._device)
        return logits

    @torch.inference_mode()
    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        """As in the protocol. It waits for the device once: for tokens if every row draws the likeliest, else for logits.

        Sampled tokens are drawn on the CPU, whose logarithms make the noise that is promised for a position.
        """
        draws = [row.draw for row in batch.rows if row.draw is not None]
        count = self._run(batch)
        if all(draw.is_likeliest for draw in draws):
            return tuple(map(Token, self._model.likeliest.tolist()[:count]))
        return draw_tokens(self._model.logits[:count].cpu(), batch)

    def _run(self, batch: RowBatch) -> int:
        """Runs a step, and returns how many of its rows draw."""
        rows = batch.rows
        assert 0 < len(rows) <= self._spec.row_tile
        self._model.inputs.fill(batch)
        self._body()
        count = sum(row.draw is not None for row in rows)
        if count:
            self._head()
        for row in rows:
            row.slab.advance_all(row.position + 1)
        return count


def _is_proven(loaded: Loaded, spec: SlabSpec, form: Form) -> bool:
    """Whether the model's linears, and its first layer as a whole, give rows the same bits in every batch here."""
    config = loaded.model.config
    tried = replace(spec, layers=1)

    def probe() -> bool:
        short = first_layers(loaded.model, 1)
        engine = GraphEngine(Loaded(short, loaded.rotaries), tried, form, _PROBED_SLABS, is_bit_exact=False)
        return is_bit_exact(engine, tried, config.vocab_size)

    return linears_are_exact(loaded.model, form, loaded.model.device) and findings.find_or_probe(
        f"a step of {config} {form} {tried}", probe
    )
