"""A masked-diffusion language model (arXiv 2406.07524, 2502.09992): fills masks after a context in a few forwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from runtime.checkpoints import AS_DATA, FILE_ERRORS, load_weights
from runtime.errors import ModelUnavailable, NotEnoughMemory
from runtime.model_files import one_line, quiet_transformers, read_checked_config

# How many of the history's first and last tokens a fill sees.
SINK, WINDOW = 4, 124

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
_PROBE_CONTEXT, _PROBE_MASKS = 8, 4


class MaskedModel:
    """A masked language model of transformers with the main model's tokens and a mask.

    A forward sees at most the `sink` first and the `window` last tokens of the history, and the masks, so its cost does not
    grow with the history. It holds no state of any session.
    """

    def __init__(self, model: Any, mask_id: int, vocabulary: int, sink: int = SINK, window: int = WINDOW) -> None:
        """`model` is any `...ForMaskedLM`; tokens of `vocabulary` and up, and the mask, are never proposed.

        Raises ModelUnavailable if the model's head cannot be applied at masked positions alone.
        """
        self._model = model.eval()
        self._mask_id = mask_id
        self._vocabulary = vocabulary
        self._sink, self._window = sink, window
        self._longest = _longest_input(model)
        self._prove_sparse_head()

    @classmethod
    def load(
        cls,
        directory: Path,
        vocabulary: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        sink: int = SINK,
        window: int = WINDOW,
        reserved: int = 0,
    ) -> Self:
        """The masked model in `directory`, for a main model of `vocabulary` tokens.

        The mask is the one that the tokenizer in the directory names, or else `mask_token_id` of its config.json. Others
        will take `reserved` bytes of memory. Raises ModelUnavailable or NotEnoughMemory.
        """
        refusal = f"{directory} holds no masked language model"
        try:
            read_checked_config(directory)
            with quiet_transformers():
                config = AutoConfig.from_pretrained(directory, **AS_DATA)
                mask_id = _mask_id(directory, config)
                with torch.device("meta"):
                    skeleton = AutoModelForMaskedLM.from_config(config)
            has = config.vocab_size
        except FILE_ERRORS as error:
            raise ModelUnavailable(f"{refusal}: {one_line(error)}") from error
        if has < vocabulary:
            raise ModelUnavailable(
                f"the masked model in {directory} has {has} tokens and the model {vocabulary}: they must share a tokenizer"
            )
        if type(mask_id) is not int or not 0 <= mask_id < has:
            raise ModelUnavailable(
                f"the masked model in {directory} names no mask: its tokenizer needs mask_token, or config.json mask_token_id"
            )
        _check_memory(sum(weight.numel() for weight in skeleton.parameters()) * dtype.itemsize, reserved)
        model = load_weights(AutoModelForMaskedLM, directory, dtype, refusal)
        return cls(model.to(device), mask_id, vocabulary, sink, window)

    @property
    def mask_id(self) -> int:
        return self._mask_id

    def context(self, history: Sequence[int], count: int = 0) -> list[int]:
        """The context that a fill of `count` tokens after `history` sees. `history` may already be such a context."""
        room = min(self._sink + self._window, self._longest - count)
        if len(history) <= room:
            return list(history)
        sink = min(self._sink, room)
        return [*history[:sink], *history[len(history) - (room - sink) :]]

    @torch.inference_mode()
    def fill(self, history: Sequence[int], count: int, steps: int) -> list[int]:
        """The `count` tokens that may follow `history`, in at most `steps` forwards and at most one for each token.

        Each forward keeps the most confident of the positions still masked, as many as leave an equal share to the
        forwards after it (low-confidence remasking).
        """
        assert steps > 0
        count = min(count, self._longest)
        context = self.context(history, count)
        tokens = [*context, *[self._mask_id] * count]
        masked = list(range(len(context), len(tokens)))
        for left in range(min(steps, count), 0, -1):
            confidence, best = self._allowed(self.logits(tokens, masked)).log_softmax(1).max(1)
            keep = -(-len(masked) // left)
            for index in confidence.argsort(descending=True, stable=True)[:keep].tolist():
                tokens[masked[index]] = int(best[index])
            masked = [position for position in masked if tokens[position] == self._mask_id]
        return tokens[len(context) :]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits at `positions` of the input, [positions, the model's vocabulary] float32.

        The head runs at these positions alone.
        """
        device = self._model.device
        with _head_only_at(self._model.base_model, torch.tensor(positions, device=device)):
            logits: Tensor = self._model(input_ids=torch.tensor([token_ids], device=device)).logits
        return logits[0].float()

    def _allowed(self, logits: Tensor) -> Tensor:
        allowed = logits[:, : self._vocabulary]
        if self._mask_id < self._vocabulary:
            allowed[:, self._mask_id] = -torch.inf
        return allowed

    @torch.inference_mode()
    def _prove_sparse_head(self) -> None:
        name = type(self._model).__name__
        length = min(_PROBE_CONTEXT + _PROBE_MASKS, self._longest)
        tokens = [token_id % self._vocabulary for token_id in range(length)]
        masked = list(range(length))[-_PROBE_MASKS:]
        for position in masked:
            tokens[position] = self._mask_id
        try:
            dense = self._model(input_ids=torch.tensor([tokens], device=self._model.device)).logits[0].float()
            sparse = self.logits(tokens, masked)
        except FILE_ERRORS as error:
            raise ModelUnavailable(f"{name} cannot run as a diffusion proposer: {one_line(error)}") from error
        # Kernels may round differently for fewer rows.
        tolerance = 1e-3 if self._model.dtype is torch.float32 else 5e-2
        if sparse.shape != dense[masked].shape or not torch.allclose(
            sparse, dense[masked], rtol=tolerance, atol=tolerance * float(dense.abs().max())
        ):
            raise ModelUnavailable(
                f"{name} cannot run as a diffusion proposer: its head looks at more than one position"
            )


def _check_memory(needed: int, reserved: int) -> None:
    free = psutil.virtual_memory().available
    if needed + reserved > free:
        raise NotEnoughMemory(
            f"{needed / 2**30:.1f} GiB needed for the model that proposes, beside {reserved / 2**30:.1f} for slabs, and "
            f"{free / 2**30:.1f} free: give a smaller proposer_model, or lower window, capacity or max_concurrent"
        )


@contextmanager
def _head_only_at(base: nn.Module, positions: Tensor) -> Iterator[None]:
    """In the block, `base` passes only the hidden states at `positions` to the head, whatever modules that has."""

    def select(module: nn.Module, inputs: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, positions]
        return output

    hook = base.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _longest_input(model: Any) -> int:
    """The longest input of the model, in tokens."""
    longest: int = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        # Roberta and similar models count positions from after the padding token's id.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    return longest


def _mask_id(directory: Path, config: Any) -> int | None:
    found: int | None = None
    if any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        found = AutoTokenizer.from_pretrained(directory, **AS_DATA).mask_token_id
    return getattr(config, "mask_token_id", None) if found is None else found
