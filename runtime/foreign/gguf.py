"""Gives transformers' reader of GGUF files the sizes of all kinds of blocks that the gguf package knows.

Its own table lacks kinds that llama.cpp writes beside others, as Q5_0 in files of Q4_K_M whose rows are no multiple of 256
(transformers/integrations/gguf/dequant.py).

Its header multiplies all dimensions of a tensor, and a file may have a tensor of so many that this takes hours: `read_table`
tells them before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GgufHeader, convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.integrations.gguf.dequant import GGML_BLOCK
from transformers.integrations.gguf.reader import _read_metadata, _read_tensor_table, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

# Kinds that the reader returns as plain values.
_PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

for _kind, _sizes in GGML_QUANT_SIZES.items():
    if _kind not in _PLAIN:
        GGML_BLOCK.setdefault(int(_kind), _sizes)


def read_table(path: str) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...]]]]:
    """A file's metadata, and the names and shapes of its tensors as they stand there."""
    blob = np.memmap(path, np.uint8, "r")
    metadata, count, table = _read_metadata(blob, path)
    entries, _ = _read_tensor_table(blob, count, table)
    return metadata, [(name, shape) for name, shape, *_ in entries]


__all__ = [
    "GGUF_CONFIG_MAPPING",
    "TENSOR_PROCESSORS",
    "GgufHeader",
    "TensorProcessor",
    "convert_gguf_tokenizer",
    "get_gguf_tokenizer",
    "read_gguf_metadata",
    "read_table",
]
