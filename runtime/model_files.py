"""Checks a model's files before a library reads them, so that damage is reported in one line, and no file outside is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from runtime.checks import is_number, short_repr
from runtime.errors import ModelUnavailable

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# Bounds on whole numbers of a configuration: building a model takes time for each layer, before its size is known.
_WHOLE = {
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (1, 2**16),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "vocab_size": (1, 2**24),
    "max_position_embeddings": (1, 2**40),
    "sliding_window": (0, 2**40),
}
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
_KINDS = {
    "model_type": str,
    "hidden_act": str,
    "tie_word_embeddings": bool,
    "layer_types": list,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "quantization_config": dict,
    "text_config": dict,
}
_NAMES_OF_ROTATION = ("rope_type", "type")
_MOST_ROTATION = 1e30
_MOST_WORDS = 300
_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")


def file_identity(file: Path) -> tuple[int, ...]:
    """What changes where the file does: a copy that keeps its time has another time of change. Raises OSError."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' warnings in the block: what is wrong with a model is reported once, in our words."""
    # Imported here because it imports torch, which a process that is only given a tokenizer does not need.
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def is_file_there(file: Path) -> bool:
    """Raises ModelUnavailable if that cannot be seen, as in a directory that this user may not enter."""
    try:
        return file.is_file()
    except OSError as error:
        raise ModelUnavailable(f"{file} cannot be looked at: {error.strerror}") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelUnavailable if there is none, or the file cannot be read."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelUnavailable(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{file} is damaged, because it is not valid JSON: download it again") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{file} is damaged, because it is not a JSON object: download it again")
    return content


def read_checked_config(directory: Path) -> dict[str, Any]:
    """A model's config.json. Raises ModelUnavailable if it has a number that no model could have."""
    file = directory / CONFIG
    config = read_json_object(file)
    _check_config(file, config)
    # Multimodal models have the values of their text part in it.
    if isinstance(text := config.get("text_config"), dict):
        _check_config(file, text)
    return config


def _check_config(file: Path, config: Mapping[str, Any]) -> None:
    for name, kind in _KINDS.items():
        if not isinstance(config.get(name), kind | None):
            raise ModelUnavailable(f"{file}: {name} must be a {kind.__name__}, not {short_repr(config[name])}")
    for name in config.keys() & _WHOLE.keys():
        (low, high), value = _WHOLE[name], config[name]
        is_null = value is None and name in _MAY_BE_NULL
        if not (is_null or (type(value) is int and low <= value <= high)):
            raise ModelUnavailable(f"{file}: {name} must be from {low} to {high}, not {short_repr(value)}")
    epsilon = config.get("rms_norm_eps", 0.0)
    if not (is_number(epsilon) and 0 <= epsilon <= 1):
        raise ModelUnavailable(f"{file}: rms_norm_eps must be from 0 to 1, not {short_repr(epsilon)}")
    _check_rotation(file, {"rope_theta": config.get("rope_theta")})
    for name in ("rope_parameters", "rope_scaling"):
        _check_rotation(file, config.get(name) or {})
    for name in ("dtype", "torch_dtype"):
        dtype = config.get(name)
        if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
            raise ModelUnavailable(f"{file}: {name} must be one of {', '.join(_DTYPES)}, not {short_repr(dtype)}")


def _check_rotation(file: Path, parameters: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        if isinstance(value, dict):
            _check_rotation(file, value)
        elif name in _NAMES_OF_ROTATION or isinstance(value, bool | list | None):
            continue
        elif not (is_number(value) and 0 < value < _MOST_ROTATION):
            raise ModelUnavailable(f"{file}: {name} must be a number over 0, not {short_repr(value)}")


def check_weights(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelUnavailable unless all weights are plain numbers in whole safetensors files of this directory."""
    if (method := config.get("quantization_config")) is not None:
        raise ModelUnavailable(
            f"the weights in {directory} are quantised by {short_repr(method.get('quant_method'))}, which no engine here reads: "
            "get the model in 16 bits, and set weights to int8 or int4"
        )
    for file in _weight_files(directory):
        try:
            with safe_open(file, "pt") as held:
                for name in held.keys():  # noqa: SIM118 (It is no mapping.)
                    dtype = held.get_slice(name).get_dtype()
                    if name.endswith(".weight") and dtype not in _STORED_DTYPES:
                        raise ModelUnavailable(f"{file}: {name} is of type {dtype}, which no engine here computes with")
        except (OSError, SafetensorError) as error:
            raise ModelUnavailable(f"{file} is not a complete file of weights: download it again ({error})") from error


def count_stored(directory: Path) -> int:
    """How many weights the files in a directory hold. Raises ModelUnavailable, OSError or SafetensorError."""
    count = 0
    for file in _weight_files(directory):
        with safe_open(file, "pt") as held:
            count += sum(math.prod(held.get_slice(name).get_shape()) for name in held.keys())  # noqa: SIM118 (It is no mapping.)
    return count


def _weight_files(directory: Path) -> Iterator[Path]:
    if is_file_there(directory / _WEIGHTS):
        yield directory / _WEIGHTS
    elif is_file_there(directory / _INDEX):
        shards = read_json_object(directory / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelUnavailable(f"{directory / _INDEX} names no files of weights: download it again")
        for name in sorted(set(map(str, shards.values()))):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelUnavailable(
                    f"{directory / _INDEX} names {short_repr(name)}, which is not a safetensors file beside it"
                )
            if not is_file_there(directory / name):
                raise ModelUnavailable(f"{directory} lacks {name}, which its index names: download it again")
            yield directory / name
    elif any(any(directory.glob(pattern)) for pattern in _PICKLED):
        raise ModelUnavailable(
            f"{directory} holds its weights as pickles alone, which may run any code: convert them to safetensors"
        )
    else:
        raise ModelUnavailable(f"{directory} holds no weights: add {_WEIGHTS}, or {_INDEX} and the files that it names")


def one_line(error: BaseException) -> str:
    """An error's message, cut to one line."""
    words = " ".join(str(error).split())[:_MOST_WORDS]
    # The message of some errors is only a key.
    return f"{type(error).__name__}: {words}" if isinstance(error, LookupError) else words or type(error).__name__
