"""The engines, which run the model. A backend is imported only when it is chosen."""

from __future__ import annotations

import logging
import math
import platform
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from runtime.engine.probe import NO_NUMBERS
from runtime.errors import InvalidSetting, ModelUnavailable, NotExact
from runtime.events import Sampling, Token
from runtime.garbage import without_collecting
from runtime.model_files import one_line
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw
from runtime.sessions import SessionShape
from runtime.settings import Settings
from runtime.slab import SlabPool
from runtime.slab_spec import SlabSpec

__all__ = ["Engine", "EngineFacts", "load_engine"]

_log = logging.getLogger("perennial.engine")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Facts about the chosen model on this machine.

    A forward runs at most `row_tile` rows, and costs what the next multiple of `row_step` costs. `form_reason` says why this
    form was chosen where no setting named one. If forwards are bit-exact, `claims` are the grounds for that, a line each,
    and `tried` is what a probe checked besides. Machines of one `kernel_class` compute the same bits. `tensors` says for
    each kind of tensor in a GGUF file how the engine holds it, if it keeps weights as the file has them.
    """

    backend: str
    device: str
    dtype: str
    weights: str
    form_reason: str
    architecture: str
    vocabulary: int
    weights_bytes: int
    row_tile: int
    row_step: int
    is_bit_exact: bool
    claims: tuple[str, ...]
    tried: str
    cpu_features: str
    kernel_class: str
    slab: SlabSpec
    tensors: tuple[str, ...] = ()

    @property
    def shape(self) -> SessionShape:
        """What doors need to know about the engine."""
        slab = self.slab
        sizes = slab.token_bytes, slab.kept_bytes, slab.ceiling_bytes
        return SessionShape(slab.sink, slab.window, *sizes, is_bit_exact=self.is_bit_exact)


class Engine(Protocol):
    """Runs forwards; it holds weights and no state of any session. One thread at a time may call it."""

    @property
    def facts(self) -> EngineFacts: ...

    def new_pool(self, count: int) -> SlabPool:
        """`count` slabs of this engine's shape."""
        ...

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        """Runs at most `row_tile` rows and returns the tokens drawn, one for each row with `draw`, in row order."""
        ...


def load_engine(settings: Settings, directory: Path, beside: EngineFacts | None = None) -> Engine:
    """Loads the engine that `settings` ask for, with the model in `directory`, which may also be a GGUF file.

    It takes no memory and no threads from an engine that is loaded `beside` it.

    Raises InvalidSetting, ModelUnavailable or NotEnoughMemory, each with one line that says what to do.
    """
    with without_collecting():
        engine = _chosen_engine(settings, directory, beside)
        _check_forward(engine, directory)
    return engine


def _check_forward(engine: Engine, directory: Path) -> None:
    """Raises ModelUnavailable if a forward fails or its logits are not finite, with which a server could never answer."""
    row = Row(engine.new_pool(1).acquire(), 0, 0, Draw(Sampling(), top_logprobs=1))
    try:
        (token,) = engine.forward(RowBatch((row,)))
    except Exception as error:
        raise ModelUnavailable(f"the model in {directory} cannot be run: {one_line(error)}") from error
    if token.logprobs is None or not math.isfinite(token.logprobs.chosen):
        raise ModelUnavailable(NO_NUMBERS)


def _chosen_engine(settings: Settings, directory: Path, beside: EngineFacts | None) -> Engine:
    is_mlx_best = directory.is_dir() and _is_best_by_mlx(directory)
    if settings.backend == "mlx" or (settings.backend == "auto" and is_mlx_best):
        try:
            from runtime.engine.mlx_engine import MlxEngine
        except ImportError as error:
            raise InvalidSetting(
                f"backend=mlx cannot import mlx-lm ({error}): pip install 'perennial[mlx]', or set backend to torch"
            ) from error
        return MlxEngine.load(settings, directory, beside)
    if settings.backend == "openvino":
        from runtime.engine.openvino_engine import OpenVinoEngine

        return OpenVinoEngine.load(settings, directory, beside)
    if settings.backend == "auto" and (engine := _on_openvino(settings, directory, beside)):
        return engine
    if engine := _on_cuda(settings, directory, beside):
        return engine
    from runtime.engine.torch_engine import TorchEngine

    return TorchEngine.load(settings, directory, beside)


def _on_openvino(settings: Settings, directory: Path, beside: EngineFacts | None) -> Engine | None:
    """The OpenVINO engine if it is known to be the fastest here, and bit-exact if `determinism` asks for that; else None."""
    if not find_spec("openvino"):
        return None
    from runtime.engine.openvino_fit import is_best_by

    if not is_best_by(settings, directory):
        return None
    from runtime.engine.openvino_engine import OpenVinoEngine

    try:
        return OpenVinoEngine.load(settings, directory, beside)
    except NotExact as error:
        _log.warning("%s; torch runs the model", error)
        return None


def _on_cuda(settings: Settings, directory: Path, beside: EngineFacts | None) -> Engine | None:
    """The engine of one captured step, if there is a CUDA device and the engine has code for the model; else None."""
    from runtime.engine.architectures import missing_parts
    from runtime.engine.configuration import read_config
    from runtime.engine.torch_model import choose_device

    device = choose_device(settings)
    if device.type != "cuda" or missing_parts(read_config(directory), "cuda"):
        return None
    from runtime.engine.graph_engine import GraphEngine

    try:
        return GraphEngine.load(settings, directory, device, beside)
    except NotExact as error:
        _log.warning("%s; each row runs alone", error)
        return None


def _is_best_by_mlx(directory: Path) -> bool:
    """Whether this is Apple silicon, mlx-lm is installed, and the MLX engine has code for the model."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64") or not find_spec("mlx_lm"):
        return False
    from runtime.engine.architectures import missing_parts
    from runtime.engine.configuration import read_config

    return not missing_parts(read_config(directory), "mlx")
