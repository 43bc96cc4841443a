"""Torch's types by the names that settings and files give them."""

from __future__ import annotations

import torch


def dtype_named(name: str) -> torch.dtype:
    """The type that a name such as float32 stands for."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """The name of a type, such as float32."""
    return str(dtype).removeprefix("torch.")
