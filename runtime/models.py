"""Finds the directory or GGUF file of a model by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from runtime.checks import short_repr
from runtime.errors import InvalidSetting, ModelUnavailable
from runtime.model_files import CONFIG, is_file_there
from runtime.settings import Settings
from runtime.smollm2 import SMOLLM2, find_smollm2

SEEDLING = "seedling"
_WORDS = ("*.json", "*.jinja", "*.model", "*.txt")
_FILES = (*_WORDS, "*.safetensors")
_GGUF = ".gguf"
# Prefix of llama.cpp's files for a multimodal model's vision part.
_EYES = "mmproj"


def find_model(name: str, *, with_weights: bool = True) -> Path:
    """The directory or GGUF file of a bundled model, a local path or a Hugging Face id, downloaded if it is missing.

    A GGUF file on the hub is named `org/name:FILE.gguf`. Without `with_weights` no weights are downloaded, unless they are
    in one file with everything else. Raises ModelUnavailable.
    """
    if name == SMOLLM2:
        return find_smollm2()
    if found := _find_here(name):
        return found
    repository, _, file = name.partition(":")
    with _downloading(name):
        if file:
            return Path(hf_hub_download(repository, file))
        patterns = _FILES if with_weights else _WORDS
        directory = Path(snapshot_download(repository, allow_patterns=list(patterns)))
    if not is_file_there(directory / CONFIG):
        raise ModelUnavailable(
            f"{name!r} holds no config.json: name a model, or of a repository of GGUF files one as {name}:FILE{_GGUF}"
        )
    return directory


def check_name(name: str) -> None:
    """Raises ModelUnavailable if there is no model of this name here, and cannot be one on the hub. It downloads nothing."""
    if name != SMOLLM2:
        _find_here(name)


def _find_here(name: str) -> Path | None:
    """The bundled model, or the directory or file of this name; None for an id of the hub. Raises ModelUnavailable."""
    if name == SEEDLING:
        return Path(__file__).parent / SEEDLING
    if _is_directory(name):
        return _inside(Path(name), name)
    if name.endswith(_GGUF) and is_file_there(Path(name)):
        return Path(name)
    repository, colon, file = name.partition(":")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")) or (colon and not file.endswith(_GGUF)):
        raise ModelUnavailable(
            f"no model at {name!r}: give {SEEDLING!r}, a directory, or a Hugging Face id like org/name; or a GGUF file, "
            f"here or there as org/name:FILE{_GGUF}"
        )
    return None


def _is_directory(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError as error:
        raise ModelUnavailable(f"the directory {short_repr(name)} cannot be looked at: {error.strerror}") from error


def find_proposer_model(settings: Settings) -> Path:
    """The directory of the model that proposes: `proposer_model`, or the bundled model's own. Raises as `find_model`."""
    if settings.proposer_model:
        return find_model(settings.proposer_model)
    if settings.model != SEEDLING:
        raise InvalidSetting(
            f"proposer={settings.proposer} needs proposer_model: a directory or a Hugging Face id of a model with the "
            "same tokenizer"
        )
    return find_model(SEEDLING) / settings.proposer


def _inside(directory: Path, name: str) -> Path:
    """The directory, or the one GGUF file in it if it has no other weights."""
    files = [
        file for file in sorted(directory.glob(f"*{_GGUF}")) if not file.name.startswith(_EYES) and is_file_there(file)
    ]
    if files and not any(directory.glob("*.safetensors")):
        if len(files) > 1:
            raise ModelUnavailable(f"{name!r} holds {len(files)} GGUF files: name the one to run, such as {files[0]}")
        return files[0]
    if not is_file_there(directory / CONFIG):
        raise ModelUnavailable(f"{name!r} holds no config.json: it is not a model's directory")
    return directory


@contextmanager
def _downloading(name: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ModelUnavailable(f"{name!r} is neither a directory nor a Hugging Face id") from error
    except RuntimeError as error:
        raise ModelUnavailable(
            f"{name!r} cannot be kept, for this user has no home: set HF_HOME to a directory"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelUnavailable(f"{name!r} is no directory here and cannot be downloaded: {reason}") from error
