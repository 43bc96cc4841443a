"""Loads weights from a directory or a GGUF file into a model of transformers; every failure is reported in one line."""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging as transformers_logging

from runtime.dtypes import name_of
from runtime.errors import ModelUnavailable
from runtime.gguf_model import dense_model
from runtime.model_files import check_weights, one_line, quiet_transformers, read_checked_config

# For damaged files transformers and tokenizers raise errors of every kind, some of class Exception itself.
FILE_ERRORS = (Exception,)
# Files are read as data: no code that comes with a model is run, and nobody is asked whether to run it.
AS_DATA = {"trust_remote_code": False}
_LAYER = re.compile(r"\blayers?\.\d+\.")
# Tensors that some checkpoints hold although the model computes them from its configuration.
_COMPUTED = ("inv_freq", "masked_bias", ".bias_mask")


def load_weights(kind: Any, directory: Path, dtype: torch.dtype | Literal["auto"], refusal: str, **options: Any) -> Any:
    """The model in `directory` by one of transformers' auto classes, in this type or, under auto, in the checkpoint's own.

    Of a GGUF file it is the causal language model, in this type.

    Raises ModelUnavailable, in the words of `refusal`; also for weights that are not of this configuration, or no numbers.
    """
    if directory.is_file():
        assert isinstance(dtype, torch.dtype)
        model = dense_model(directory, dtype, **options)
        _check_numbers(model, directory)
        return model
    check_weights(directory, read_checked_config(directory))
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with quiet_transformers():
            model, report = kind.from_pretrained(
                directory,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                # Reported below, with the tensor's name.
                ignore_mismatched_sizes=True,
                **AS_DATA,
                **options,
            )
    except FILE_ERRORS as error:
        raise ModelUnavailable(f"{refusal}: {one_line(error)}") from error
    if report["missing_keys"]:
        raise ModelUnavailable(f"the weights in {directory} lack {sorted(report['missing_keys'])[0]} and maybe more")
    for name, held, wanted in sorted(report["mismatched_keys"]):
        raise ModelUnavailable(
            f"the weights in {directory} are not of its config.json: {name} is {list(held)}, and should be {list(wanted)}"
        )
    more = [name for name in report["unexpected_keys"] if _LAYER.search(name) and not name.endswith(_COMPUTED)]
    if more:
        raise ModelUnavailable(
            f"the weights in {directory} hold {sorted(more)[0]}, for which its config.json has no place: "
            "the two are not of one model"
        )
    _check_numbers(model, directory)
    return model


@torch.inference_mode()
def _check_numbers(model: Any, directory: Path) -> None:
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        if weight.is_floating_point() and weight.numel() and not all(map(torch.isfinite, weight.aminmax())):
            dtype = name_of(weight.dtype)
            raise ModelUnavailable(
                f"the weights in {directory} are damaged: {name} has values that are not finite in {dtype}"
            )
