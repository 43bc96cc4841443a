"""What every test of an engine runs on: each of the backends."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from runtime.engine.openvino_fit import fits_cpu
from tests.conftest import SMALL
from tests.runtime.engine import feeding


@pytest.fixture(scope="session", params=feeding.ENGINES)
def engine_name(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name == "openvino" and not fits_cpu():
        pytest.skip("OpenVINO's kernels were not tried on such a CPU")
    if name == "mlx":
        pytest.importorskip("mlx_lm")
    return name


@pytest.fixture(scope="session")
def backend(engine_name: str) -> str:
    """What the setting `backend` names."""
    if engine_name not in feeding.BACKENDS:
        pytest.skip(f"no setting chooses the engine {engine_name}")
    return engine_name


@pytest.fixture(scope="session")
def load(engine_name: str) -> feeding.Load:
    """Loads an engine, once for all tests that ask for the same."""
    return partial(feeding.load, backend=engine_name)


@pytest.fixture(scope="session")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random model that is too large for a CPU's cache, in the type of most checkpoints."""
    config = LlamaConfig(**SMALL | {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4096})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    directory = tmp_path_factory.mktemp("large_model")
    model.save_pretrained(directory)
    return directory
