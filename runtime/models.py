"""From the name of a model to a directory that holds it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from runtime.checks import shown
from runtime.errors import InvalidSetting, ModelUnavailable
from runtime.settings import Settings

SEEDLING = "seedling"
_WORDS = ("*.json", "*.jinja", "*.model", "*.txt")
_FILES = (*_WORDS, "*.safetensors")


def find_model(name: str, *, with_weights: bool = True) -> Path:
    """The directory of a bundled model, a local path or a Hugging Face id, downloaded where it is not yet.

    Where nobody asks for weights, none are downloaded. Raises ModelUnavailable.
    """
    if name == SEEDLING:
        return Path(__file__).parent / SEEDLING
    if _is_directory(name):
        directory = Path(name)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        directory = _download(name, _FILES if with_weights else _WORDS)
    else:
        raise ModelUnavailable(
            f"no model at {name!r}: give {SEEDLING!r}, a directory, or a Hugging Face id like org/name"
        )
    if not (directory / "config.json").is_file():
        raise ModelUnavailable(f"{name!r} holds no config.json: it is not a model's directory")
    return directory


def _is_directory(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError as error:
        raise ModelUnavailable(f"the directory {shown(name)} cannot be looked at: {error.strerror}") from error


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


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ModelUnavailable(f"{name!r} is neither a directory nor a Hugging Face id") from error
    except RuntimeError as error:
        raise ModelUnavailable(
            f"{name!r} cannot be kept, for this user has no home: set HF_HOME to a directory"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelUnavailable(f"{name!r} is no directory here and cannot be downloaded: {reason}") from error
