"""Weights in a directory or a GGUF file, in a model of transformers; what goes wrong is said in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from runtime.errors import ModelUnavailable
from runtime.gguf_model import dense_model

# What transformers raises over a config.json whose values make no sense, and over all other files of a model.
CONFIG_ERRORS = (ArithmeticError, AttributeError, LookupError, OSError, StrictDataclassError, TypeError, ValueError)
FILE_ERRORS = (*CONFIG_ERRORS, RuntimeError, SafetensorError)


def load_weights(kind: Any, directory: Path, dtype: torch.dtype | Literal["auto"], refusal: str, **options: Any) -> Any:
    """The model in `directory` by one of transformers' auto classes, in this type or, under auto, in the checkpoint's own.

    Of a GGUF file it is the causal language model, in this type. Raises ModelUnavailable, in the words of `refusal`.
    """
    if directory.is_file():
        assert isinstance(dtype, torch.dtype)
        return dense_model(directory, dtype, **options)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    except FILE_ERRORS as error:
        raise ModelUnavailable(f"{refusal}: {one_line(error)}") from error
    if report["missing_keys"]:
        raise ModelUnavailable(f"the weights in {directory} lack {sorted(report['missing_keys'])[0]} and maybe more")
    return model


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    words = next(iter(str(error).strip().splitlines()), "")
    # Some errors say no more than a key.
    return f"{type(error).__name__}: {words}" if isinstance(error, LookupError) else words or type(error).__name__
