"""A step of a model: functions of no arguments over memory that stays where it is, which a graph may capture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import AttentionInterface

from runtime.engine.exact import Claim, Ground
from runtime.engine.step_attention import STEP_ATTENTION_NAME, Attend, Step, attend_by_products, step_attention
from runtime.engine.step_inputs import StepInputs
from runtime.engine.torch_model import Loaded
from runtime.engine.torch_slab import SlabArena, as_torch

# Runs before a graph is captured, enough for kernels to be compiled and for libraries to choose theirs.
_WARM_UPS = 3

_BY_PRODUCTS = Claim("attention", "torch's products in float32, of one shape", Ground.FIXED_ROWS)

AttentionInterface.register(STEP_ATTENTION_NAME, step_attention)


@dataclass(frozen=True, slots=True)
class StepKernels:
    """How a step attends on a device: rows of a slab in blocks of at most `block`."""

    attend: Attend
    block: int
    claim: Claim


def kernels_for(device: torch.device, heads_a_group: int) -> StepKernels:
    if device.type == "cuda" and find_spec("triton"):
        from runtime.engine.step_kernels import CLAIM, attend_by_kernels, block_rows

        return StepKernels(attend_by_kernels, block_rows(heads_a_group), CLAIM)
    return StepKernels(attend_by_products, 1, _BY_PRODUCTS)


class StepModel:
    """The two parts of a step, each a function of no arguments over memory that stays where it is."""

    def __init__(self, loaded: Loaded, arena: SlabArena, kernels: StepKernels) -> None:
        model, config = loaded.model, loaded.model.config
        spec, device = arena.spec, arena.device
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        (self._rotary,) = loaded.rotaries.values()
        self._arena, self._attend = arena, kernels.attend
        # Unused rows must write somewhere.
        self._spare = as_torch(arena.pool(1).acquire())
        self.inputs = StepInputs(spec.row_tile, kernels.block, self._spare.index, device)
        self.logits = torch.zeros(spec.row_tile, config.vocab_size, dtype=torch.float32, device=device)
        self.likeliest = torch.zeros(spec.row_tile, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(spec.row_tile, config.hidden_size, dtype=self._decoder.dtype, device=device)

    def body(self) -> None:
        """Runs the layers on the rows of `inputs`."""
        inputs = self.inputs
        step = Step.of(self._arena.spec, self._arena.store, inputs, self._attend, self._rotary)
        hidden: Tensor = self._decoder(
            input_ids=inputs.tokens.unsqueeze(0),
            position_ids=inputs.positions.unsqueeze(0),
            use_cache=False,
            step=step,
        ).last_hidden_state[0]
        self._hidden.copy_(hidden)

    def head(self) -> None:
        """Computes `logits`, and the `likeliest` token, of the rows that draw; other rows hold nothing of meaning."""
        logits = self._head(self._hidden.index_select(0, self.inputs.drawing)).float()
        self.logits.copy_(logits)
        self.likeliest.copy_(logits.argmax(dim=-1))


@torch.inference_mode()
def capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures `function` as a graph of `device`; it must not wait for the device, nor move its tensors.

    On a CPU, the function itself.
    """
    if device.type != "cuda":
        return function
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
