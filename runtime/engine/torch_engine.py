"""The torch engine: transformers' own model code, fed with row batches, attending over slabs."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from runtime.checkpoints import CONFIG_ERRORS, load_weights, one_line
from runtime.engine import EngineFacts
from runtime.engine.attention import ATTENTION_NAME, AttentionAlone, padded, plan_forward, slab_attention
from runtime.engine.linears import can_pack, replace_linears, weights_bytes
from runtime.engine.probe import RowSizes, doubling, find_sizes
from runtime.engine.proven import proven
from runtime.engine.rotary import ExactRotary
from runtime.errors import InvalidSetting, ModelUnavailable, NotEnoughMemory
from runtime.events import Token
from runtime.rows import RowBatch
from runtime.sampling import drawn
from runtime.settings import Settings
from runtime.slab import SlabPool, SlabSpec

# Those whose logits the test suite compares with transformers' own.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# The largest first: the more rows in a forward, the faster a prompt is read.
STRICT_ROW_TILES = (256, 32)
FAST_ROW_TILE = 256
FAST_SIZES = RowSizes(doubling(1, FAST_ROW_TILE), doubling(1, FAST_ROW_TILE))

# Handing so little out to more threads costs more than it saves, several times more where other programs run.
_ONE_THREAD_BYTES = 32 * 2**20

# All layers of these architectures have the same shapes, and so the same kernels: more would show nothing more.
_PROBED_LAYERS = 1

AttentionInterface.register(ATTENTION_NAME, slab_attention)


class TorchEngine:
    """A causal language model of one of `ARCHITECTURES` on one torch device."""

    def __init__(self, model: PreTrainedModel, spec: SlabSpec, is_bit_exact: bool, sizes: RowSizes) -> None:
        """`model` attends by `ATTENTION_NAME` and turns by an ExactRotary."""
        decoder = model.get_decoder()
        self._decoder = decoder
        self._rotary: ExactRotary = decoder.rotary_emb
        self._head = model.get_output_embeddings()
        self._config: PreTrainedConfig = model.config
        self._spec = spec
        self._sizes = sizes
        self._weights_bytes = weights_bytes(model)
        self._is_bit_exact = is_bit_exact

    @classmethod
    def load(cls, settings: Settings, directory: Path, beside: EngineFacts | None = None) -> TorchEngine:
        """The engine for the model in `directory`, its row sizes proven on this machine under `strict`.

        One that is loaded `beside` another leaves it its memory, and its threads, for which its row sizes were proven.

        Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
        """
        config = _read_config(directory)
        device = _choose_device(settings)
        dtype = _choose_dtype(settings, device)
        is_strict = settings.determinism == "strict"
        tiles = STRICT_ROW_TILES if is_strict else (FAST_ROW_TILE,)
        specs = [_slab_spec(config, settings, dtype, device, tile) for tile in tiles]
        weights = _count_weights(config, directory)
        if config.tie_word_embeddings and (settings.weights != "none" or can_pack(dtype, device)):
            # The embedding stays as it is beside the form that the head gets.
            weights += config.vocab_size * config.hidden_size
        _check_memory(weights, settings, specs[0], beside)
        if device.type == "cpu" and beside is None:
            torch.set_num_threads(
                1 if weights * dtype.itemsize < _ONE_THREAD_BYTES else psutil.cpu_count(logical=False) or 1
            )
        model = _load_model(directory, dtype).to(device)
        replace_linears(model, model.get_output_embeddings(), settings.weights, dtype, device)
        if not is_strict:
            return cls(model, specs[0], False, FAST_SIZES)
        for spec in specs:
            shallow_spec = replace(spec, layers=min(spec.layers, _PROBED_LAYERS))
            find = partial(_find_sizes, model, shallow_spec)
            if sizes := proven(f"{config} {settings.weights}", shallow_spec, find):
                return cls(model, spec, True, sizes)
        raise InvalidSetting(
            f"determinism=strict cannot be had here: {settings.model} in {dtype} on {device.type} gives a row other "
            "bits in other batches; set determinism=fast, or another dtype"
        )

    @property
    def facts(self) -> EngineFacts:
        return EngineFacts(
            backend="torch",
            device=self._spec.device.type,
            dtype=str(self._spec.dtype).removeprefix("torch."),
            architecture=self._config.model_type,
            vocabulary=self._config.vocab_size,
            weights_bytes=self._weights_bytes,
            row_tile=self._spec.row_tile,
            row_sizes=self._sizes.rows,
            is_bit_exact=self._is_bit_exact,
            slab=self._spec,
        )

    def new_pool(self, count: int) -> SlabPool:
        return SlabPool(self._spec, count)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        drawing = [(row.draw, row.position) for row in batch.rows if row.draw is not None]
        logits = self.logits(batch)
        return tuple(drawn(line, draw, position + 1) for (draw, position), line in zip(drawing, logits, strict=True))

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        """Runs the batch and returns the logits of its rows with `draw`, [rows, vocabulary] float32, in row order."""
        rows = batch.rows
        assert 0 < len(rows) <= self._spec.row_tile
        device = self._spec.device
        filler = padded(len(rows), self._sizes.rows) - len(rows)
        hidden: Tensor = self._decoder(
            input_ids=torch.tensor([[*(row.token_id for row in rows), *[0] * filler]], device=device),
            position_ids=torch.tensor([[*(row.position for row in rows), *[0] * filler]], device=device),
            use_cache=False,
            plan=plan_forward(batch, self._sizes.queries, self._rotary, self._config.num_attention_heads),
        ).last_hidden_state[0]
        wanted = [index for index, row in enumerate(rows) if row.draw is not None]
        if not wanted:
            return hidden.new_empty(0, self._config.vocab_size, dtype=torch.float32)
        size = padded(len(wanted), self._sizes.rows)
        indices = torch.tensor([*wanted, *[wanted[-1]] * (size - len(wanted))], device=device)
        logits: Tensor = self._head(hidden.index_select(0, indices))
        return logits[: len(wanted)].float()


def _find_sizes(model: Any, spec: SlabSpec) -> RowSizes | None:
    """The least padding under which rows of the model's first `spec.layers` are bit-equal in every batch, or None."""
    config, rotary = model.config, model.get_decoder().rotary_emb
    attending = partial(AttentionAlone, spec, config.num_attention_heads, rotary)
    queries = find_sizes(attending, spec, AttentionAlone.tokens)
    if queries is None:
        return None
    shallow = _first_layers(model, spec.layers)
    rows = find_sizes(lambda rows: TorchEngine(shallow, spec, True, RowSizes(rows, queries)), spec, config.vocab_size)
    return RowSizes(rows, queries) if rows else None


def _read_config(directory: Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(directory)
    except CONFIG_ERRORS as error:
        raise ModelUnavailable(
            f"{directory} has no configuration that transformers can read: {one_line(error)}"
        ) from error
    if config.model_type not in ARCHITECTURES:
        raise ModelUnavailable(
            f"{directory} is of architecture {config.model_type!r}; this release runs {', '.join(ARCHITECTURES)}"
        )
    return config


def _count_weights(config: PreTrainedConfig, directory: Path) -> int:
    try:
        with torch.device("meta"):
            return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    except CONFIG_ERRORS as error:
        raise ModelUnavailable(f"the configuration in {directory} makes no model: {one_line(error)}") from error


def _load_model(directory: Path, dtype: torch.dtype) -> Any:
    refusal = f"the weights in {directory} cannot be loaded"
    model = load_weights(AutoModelForCausalLM, directory, dtype, refusal, attn_implementation=ATTENTION_NAME)
    decoder = model.get_decoder()
    decoder.rotary_emb = ExactRotary(decoder.rotary_emb)
    return model.eval()


def _first_layers(model: Any, count: int) -> Any:
    """The model with its first `count` layers alone, on the same weights."""
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    shallow = copy.deepcopy(model, weights)
    decoder = shallow.get_decoder()
    decoder.layers = decoder.layers[:count]
    return shallow


def _choose_device(settings: Settings) -> torch.device:
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = settings.device
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise InvalidSetting(f"device={name} is not available here: this machine has {[k for k in has if has[k]]}")
    return torch.device(name)


def _choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        chosen = getattr(torch, settings.dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    # Without hardware for it, bfloat16 on a CPU is emulated and slower than float32.
    is_native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 (torch has no public name)
    return torch.bfloat16 if is_native else torch.float32


def _slab_spec(
    config: PreTrainedConfig, settings: Settings, dtype: torch.dtype, device: torch.device, row_tile: int
) -> SlabSpec:
    longest = config.max_position_embeddings
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        longest = min(longest, config.sliding_window)
    if settings.sink >= longest:
        raise InvalidSetting(f"sink must be less than the model's maximum context of {longest}, got {settings.sink}")
    heads = config.num_attention_heads
    return SlabSpec(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        sink=settings.sink,
        window=min(settings.window, longest - settings.sink),
        row_tile=row_tile,
        dtype=dtype,
        device=device,
    )


def _check_memory(weights: int, settings: Settings, spec: SlabSpec, beside: EngineFacts | None) -> None:
    slabs = settings.capacity + settings.max_concurrent
    # Slabs take their memory as they fill.
    others = slabs * beside.slab.ceiling_bytes if beside else 0
    needed = weights * spec.dtype.itemsize + slabs * spec.ceiling_bytes + others
    free = torch.cuda.mem_get_info()[0] if spec.device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise NotEnoughMemory(
            f"{needed / 2**30:.1f} GiB needed (weights {weights * spec.dtype.itemsize / 2**30:.1f}, {slabs} slabs of "
            f"{spec.ceiling_bytes / 2**30:.2f}) and {free / 2**30:.1f} free: lower window, capacity or max_concurrent"
        )
