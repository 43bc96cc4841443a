"""A GGUF file as a checkpoint: the configuration and tokenizer that its metadata tell, and its tensors as they are stored.

transformers reads the file. Nothing in a file is trusted: sizes are compared before anything of that size is built.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as InTurn
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from runtime.checks import short_repr
from runtime.errors import ModelUnavailable
from runtime.foreign.gguf import (
    GGUF_CONFIG_MAPPING,
    GgufHeader,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
    read_gguf_metadata,
    read_table,
)
from runtime.model_files import file_identity, one_line

Values = Mapping[str, Any]

# What the readers raise for files that are damaged, by accident or on purpose.
_READ_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
# Those whose files the test suite compares with transformers, by llama.cpp's names, with transformers' for them: Mistral's are
# `llama`. Of their tensors none but whole rows are at another place than in transformers, experts aside.
ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt-oss": "gpt_oss"}
# Keys that are missing in transformers' table, or have another name there.
_OWN_KEYS: Mapping[str, Mapping[str, str]] = {"gpt-oss": {"attention.sliding_window": "sliding_window"}}
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    "max_position_embeddings",
)
_MORE_SIZES: Mapping[str, Sequence[str]] = {
    "gpt-oss": ("sliding_window", "num_local_experts", "num_experts_per_tok"),
}
# As in ggml.
_MOST_DIMENSIONS = 4
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"
# Names of splits that llama.cpp makes in two steps, each digit by itself first; transformers knows their second alone.
_DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_ENDS = ("eos", "eot", "eom")
# Where in a block of a kind the half-precision numbers lie that its weights are multiplied or shifted by, in bytes. The
# scales of MXFP4 are powers of 2, and numbers all.
_HALVES = {
    GGMLQuantizationType.Q8_0: (0,),
    GGMLQuantizationType.Q4_0: (0,),
    GGMLQuantizationType.Q4_1: (0, 2),
    GGMLQuantizationType.Q5_0: (0,),
    GGMLQuantizationType.Q5_1: (0, 2),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
    GGMLQuantizationType.MXFP4: (),
}
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of this `shape` and `kind` in a file; `read` maps its rows from there, uint8 [..., bytes of a row].

    Nothing is mapped until it is read, since pages of a mapping count as this process's memory while it is held.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        values, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // values * size

    def dense(self) -> Tensor:
        """The whole tensor in float32."""
        # Of a damaged one, what is infinite times 0 is no number, which whoever loads it looks for.
        with np.errstate(invalid="ignore"):
            return torch.tensor(dequantize(self.read(), self.kind)).view(self.shape)

    def is_finite(self) -> bool:
        """Whether all of its values are numbers; of a quantised tensor the scales tell."""
        places = _HALVES.get(self.kind)
        if places is None:
            return bool(self.dense().isfinite().all())
        blocks = self.read().reshape(-1, GGML_QUANT_SIZES[self.kind][1])
        return all(np.isfinite(blocks[:, at : at + 2].copy().view(np.float16)).all() for at in places)

    def plain(self) -> Tensor | None:
        """The whole tensor in the file's type; None if it is quantised."""
        dtype = _PLAIN.get(self.kind)
        return torch.from_numpy(np.array(self.read())).view(dtype) if dtype else None


class StoredRows:
    """Rows of a matrix that stay in the file, mapped, until they are looked up."""

    def __init__(self, stored: StoredTensor) -> None:
        self.nbytes = stored.nbytes
        self._kind, self._raw = stored.kind, stored.read()

    def rows(self, indices: Sequence[int]) -> Tensor:
        """[indices, columns] float32."""
        return torch.tensor(dequantize(self._raw[indices], self._kind))


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The contents of one file; the data of its tensors is not read yet."""

    path: Path
    architecture: str
    metadata: Values
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ModelUnavailable if it is not a whole GGUF file."""
        with one_line_errors(path):
            metadata, tensors = _header(path, file_identity(path))
            if metadata.get("split.count", 1) != 1:
                raise ModelUnavailable(
                    f"{path} is one of {short_repr(metadata['split.count'])} parts: join them by llama-gguf-split --merge first"
                )
            return cls(path, metadata["general.architecture"], metadata, tensors)

    def rope_factors(self, count: int) -> Tensor:
        """The divisors of the rotary embedding's frequencies, [count] in float32, which Llama 3.1 has.

        Raises ModelUnavailable if the file has others than `count` numbers over 0.
        """
        stored = self.tensors.get(_ROPE_FACTORS)
        factors = stored.dense() if stored else torch.ones(count)
        if factors.shape != (count,) or not bool((factors > 0).all() and factors.isfinite().all()):
            raise ModelUnavailable(
                f"{self.path} has {_ROPE_FACTORS} that divide no frequencies: convert the model anew"
            )
        return factors

    def weights(self) -> Mapping[str, StoredTensor]:
        """The tensors of the model's parameters."""
        return {name: stored for name, stored in self.tensors.items() if name != _ROPE_FACTORS}

    def matrices(self) -> list[StoredTensor]:
        """Those that rows are multiplied with: the embedding is one of them where the head shares it."""
        looked_up = () if self._is_tied else (_EMBEDDING,)
        return [stored for name, stored in self.weights().items() if len(stored.shape) > 1 and name not in looked_up]

    @property
    def embedding(self) -> StoredTensor:
        """Raises LookupError where it has none, and is no model."""
        return self.tensors[_EMBEDDING]

    def kinds(self) -> Mapping[str, int]:
        """The number of tensors of each kind, by the kind's name."""
        return Counter(stored.kind.name for stored in self.weights().values())

    def config_values(self) -> dict[str, Any]:
        """The values for transformers' configuration of this architecture. Raises ModelUnavailable."""
        if self.architecture not in ARCHITECTURES:
            raise ModelUnavailable(
                f"{self.path} is of architecture {short_repr(self.architecture)}; of GGUF files this release runs "
                f"{', '.join(ARCHITECTURES)}"
            )
        model_type = ARCHITECTURES[self.architecture]
        names = GGUF_CONFIG_MAPPING[model_type] | _OWN_KEYS.get(self.architecture, {})
        with one_line_errors(self.path):
            values = {name: self._own(key) for key, name in names.items() if name and self._own(key) is not None}
            embedding = self.tensors[_EMBEDDING].shape
            values |= {
                "model_type": model_type,
                "vocab_size": embedding[0],
                "tie_word_embeddings": self._is_tied,
            }
            # llama.cpp's defaults for values that a file leaves out.
            values = {"rope_theta": 10_000.0, "num_key_value_heads": values["num_attention_heads"]} | values
            if head_dim := self._own("attention.key_length"):
                values["head_dim"] = head_dim
            if self.architecture == "llama" and "blk.0.attn_q.bias" in self.tensors:
                values["attention_bias"] = True
            self._check(values, embedding)
            return values | {"rope_parameters": self._rope(values.pop("rope_theta"))}

    @property
    def _is_tied(self) -> bool:
        return _HEAD not in self.tensors

    def _own(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def _check(self, values: Values, embedding: Sequence[int]) -> None:
        """Raises ValueError for values that make no model, or a model that does not fit into the file."""
        more = _MORE_SIZES.get(self.architecture, ())
        for name in (*_SIZES, *more, *(["head_dim"] if "head_dim" in values else [])):
            if type(values[name]) is not int or values[name] < 1:
                raise ValueError(f"its {name} is {values[name]!r}")
        for name in ("rope_theta", "rms_norm_eps"):
            _check_positive(name, values[name])
        if tuple(embedding) != (values["vocab_size"], values["hidden_size"]):
            raise ValueError(f"its embedding is of {tuple(embedding)}, where rows are {values['hidden_size']} wide")
        if values["num_hidden_layers"] > len(self.tensors):
            raise ValueError(f"it has {len(self.tensors)} tensors for {values['num_hidden_layers']} layers")
        if (words := self.metadata.get("tokenizer.ggml.tokens", 0)) > values["vocab_size"]:
            raise ValueError(f"it has {words} tokens, and embeddings for {values['vocab_size']}")

    def _rope(self, theta: float) -> dict[str, Any]:
        kind = self._own("rope.scaling.type")
        if kind in (None, "none"):
            return {"rope_type": "default", "rope_theta": theta}
        if kind not in ("linear", "yarn"):
            raise ValueError(f"its rotary embedding is scaled by {kind!r}, which is not known here")
        factor = self._own("rope.scaling.factor")
        _check_positive("scaling of the rotary embedding", factor)
        scaling = {"rope_type": kind, "rope_theta": theta, "factor": factor}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._own("rope.scaling.original_context_length")
            # As in the model's own configuration; files do not say it.
            scaling["truncate"] = self.architecture != "gpt-oss"
        return scaling


def _check_positive(name: str, value: object) -> None:
    # Engines compute with it in float32, where so small a number may be 0, and a large one infinite.
    if not (isinstance(value, float) and 0 < torch.tensor(value, dtype=torch.float32) < math.inf):
        raise ValueError(f"its {name} is {value!r}")


def read_tokenizer(path: Path) -> tuple[PreTrainedTokenizerFast, frozenset[int]]:
    """The tokenizer of the file, with its chat template, and the ids that end a turn. Raises ModelUnavailable."""
    with one_line_errors(path):
        metadata, _ = read_gguf_metadata(str(path))
        architecture, words, options = get_gguf_tokenizer(str(path))
        backend = _backend(architecture, words)
        if words.get("pre_tokenizer_type") in _DIGITS_ALONE:
            backend.pre_tokenizer = InTurn([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        if not isinstance(options.get("chat_template", ""), str):
            raise ValueError("its chat template is not text")
        ends = {metadata.get(f"tokenizer.ggml.{end}_token_id") for end in _ENDS} - {None}
        # A float that equals an id would be found in the range.
        if not all(type(end) is int and end in range(len(words["tokens"])) for end in ends):
            raise ValueError(f"its turns end with tokens {short_repr(ends)}, not all of which it has")
        # Tokens to which the file assigns no role are special too: a user's text may not stand for them.
        special = [str(token.content) for token in backend.get_added_tokens_decoder().values() if token.special]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=special, **options)
        return tokenizer, frozenset(ends)


def _backend(architecture: str, words: dict[str, Any]) -> Any:
    try:
        backend, _ = convert_gguf_tokenizer(architecture, words)
    except Exception as error:
        # The tokenizers package raises nothing narrower for a vocabulary that does not fit together.
        raise ValueError(f"its tokenizer cannot be built: {error}") from error
    return backend


@lru_cache(maxsize=1)
def _header(path: Path, identity: tuple[int, ...]) -> tuple[Values, Mapping[str, StoredTensor]]:
    """Metadata and tensors of a file. A load asks for them several times, and to pass over a vocabulary takes a while."""
    metadata, shapes = read_table(str(path))
    for name, shape in shapes:
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"its tensor {short_repr(name)} has {len(shape)} dimensions")
    alignment = metadata.get("general.alignment", 1)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its tensors are aligned to {short_repr(alignment)}")
    return MappingProxyType(metadata), MappingProxyType(dict(_tensors(path)))


def _tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    header = GgufHeader.from_file(str(path))
    if len(header.ggml_types) != len(header.tensors):
        raise ValueError("it has two tensors of one name")
    length = path.stat().st_size
    for info in header.tensors:
        kind = GGMLQuantizationType(info.ggml_type)
        values, size = GGML_QUANT_SIZES[kind]
        if not info.shape or min(info.shape) < 1 or info.shape[-1] % values or (len(info.shape) == 1 and values > 1):
            raise ValueError(f"its tensor {short_repr(info.name)} of {kind.name} has the shape {info.shape}")
        start = header.data_start + info.offset
        if start + info.nbytes > length:
            raise ValueError(f"it ends inside its tensor {short_repr(info.name)}: download it again")
        # Raises NotImplementedError for kinds that cannot be dequantised.
        dequantize(np.zeros((1, size), np.uint8), kind)
        # Each value of a vector is a row.
        rows = info.shape[:-1] or info.shape
        shape = (*rows, info.nbytes // math.prod(rows))
        yield info.name, StoredTensor(kind, info.shape, partial(np.memmap, path, np.uint8, "r", start, shape))


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turns the readers' errors into ModelUnavailable, in one line that names the file."""
    try:
        yield
    except _READ_ERRORS as error:
        words = one_line(error).removeprefix("KeyError: ")
        match error:
            case struct.error() | UnicodeDecodeError():
                line = f"{path} is damaged or cut off: download it again ({words})"
            case KeyError():
                line = f"{path} has no {words}: it is not a model, or was badly converted"
            case _:
                line = f"{path} is no GGUF file that can be run: {words}"
        raise ModelUnavailable(line) from error
