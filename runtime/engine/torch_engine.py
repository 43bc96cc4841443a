"""The torch engine: transformers' own model code, fed with row batches, attending over slabs."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from runtime.engine import EngineFacts, findings
from runtime.engine.architectures import ARCHITECTURES, Part, attending_kinds, layer_kinds
from runtime.engine.attention import ATTENTION_NAME, CLAIMS, slab_attention
from runtime.engine.attention_plan import plan_forward
from runtime.engine.attention_probe import Manner, attention_is_exact
from runtime.engine.configuration import (
    Form,
    check_memory,
    count_weights,
    engine_facts,
    is_small,
    read_config,
    refuse,
    slab_spec,
)
from runtime.engine.drawing import draw_tokens
from runtime.engine.exact import Claim
from runtime.engine.linears import FixedRowsLinear, RowLinear, weights_bytes
from runtime.engine.machine import kernel_class
from runtime.engine.probe import PROBED_ROWS, is_bit_exact
from runtime.engine.torch_model import (
    Loaded,
    choose_device,
    first_layers,
    forms_of,
    free_memory,
    held_weights,
    linear_claims,
    linears_are_exact,
    load_model,
)
from runtime.engine.torch_parts import CLAIMS_OF_PARTS, soft_cap
from runtime.engine.torch_slab import torch_pool
from runtime.events import Token
from runtime.gguf_file import GgufFile
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool
from runtime.slab_spec import SlabSpec

AttentionInterface.register(ATTENTION_NAME, slab_attention)


class TorchEngine:
    """A causal language model of one of `ARCHITECTURES` on one torch device."""

    def __init__(self, loaded: Loaded, spec: SlabSpec, form: Form, *, is_bit_exact: bool) -> None:
        """`form` describes the model's linears."""
        model, self._rotaries = loaded
        self._decoder = model.get_decoder()
        self._head = model.get_output_embeddings()
        self._kinds = attending_kinds(model.config)
        self._config: PreTrainedConfig = model.config
        self._parts = ARCHITECTURES[model.config.model_type].parts
        self._spec = spec
        self._device: torch.device = self._decoder.device
        self._form = form
        self._linears = [part for part in model.modules() if isinstance(part, RowLinear)]
        self._is_bit_exact = is_bit_exact
        self._weights_bytes = weights_bytes(model)

    @classmethod
    def load(cls, settings: Settings, directory: Path, beside: EngineFacts | None = None) -> TorchEngine:
        """The engine for the model in `directory`, under `strict` in the first form that a probe finds exact here.

        One that is loaded `beside` another leaves it its memory, and its threads, for which the other was probed.

        Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
        """
        config = read_config(directory)
        device = choose_device(settings)
        count = count_weights(config, directory)
        forms = forms_of(settings, device, count, GgufFile.read(directory).kinds() if directory.is_file() else {})
        widest = max(form.dtype.itemsize for form in forms)
        needed, free = held_weights(config, count) * widest, free_memory(device)
        check_memory(needed, free, settings, slab_spec(config, settings, forms[0].dtype), beside)
        if device.type == "cpu" and beside is None:
            torch.set_num_threads(1 if is_small(count) else psutil.cpu_count(logical=False) or 1)
        is_strict = settings.determinism == "strict"
        failed: list[Form] = []
        for form in forms:
            spec = slab_spec(config, settings, form.dtype)
            loaded = load_model(directory, form, device, ATTENTION_NAME, is_strict=is_strict)
            if not is_strict or _is_proven(loaded, spec, form):
                return cls(loaded, spec, form.after(failed), is_bit_exact=is_strict)
            failed.append(form)
            if form is not forms[-1]:
                # Memory was checked for one form at a time.
                del loaded
        if (settings.dtype, settings.weights) != ("auto", "auto"):
            raise refuse(failed)
        # A row that always runs alone has no other rows that its bits could depend on.
        spec = slab_spec(config, settings, form.dtype, row_tile=1)
        return cls(loaded, spec, replace(form, reason="one row a forward").after(failed), is_bit_exact=True)

    @cached_property
    def facts(self) -> EngineFacts:
        return engine_facts(
            "torch",
            self._config,
            self._form,
            self._spec,
            device=self._device.type,
            weights_bytes=self._weights_bytes,
            row_step=max((one.most_rows for one in self._linears if isinstance(one, FixedRowsLinear)), default=1),
            kernel_class=kernel_class(self._device),
            is_bit_exact=self._is_bit_exact,
            claims=self._claims(),
            tried=self._describe_probe(),
        )

    def _claims(self) -> list[Claim]:
        of_parts = (CLAIMS_OF_PARTS[part] for part in sorted(self._parts & CLAIMS_OF_PARTS.keys()))
        return [*linear_claims(self._linears), *CLAIMS, *of_parts]

    def _describe_probe(self) -> str:
        if self._spec.row_tile == 1:
            return "other rows in a forward: they change a row's bits, so each runs alone"
        counts = sorted({one.most_rows for one in self._linears})
        return (
            f"each linear at every count up to {' or '.join(map(str, counts))} on {PROBED_ROWS} rows or more, attention at "
            f"every count up to {self._spec.row_tile}, a layer in batches of two sessions"
        )

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self._spec, count, self._device)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        return draw_tokens(self.logits(batch), batch)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        """The logits of the rows with `draw`, [rows, vocabulary] float32; at most `row_tile` rows run at once."""
        rows = batch.rows
        assert 0 < len(rows) <= self._spec.row_tile
        device = self._device
        hidden: Tensor = self._decoder(
            input_ids=torch.tensor([[row.token_id for row in rows]], device=device),
            position_ids=torch.tensor([[row.position for row in rows]], device=device),
            use_cache=False,
            plan=plan_forward(batch, self._rotaries, self._config.num_attention_heads, self._kinds),
        ).last_hidden_state[0]
        wanted = [index for index, row in enumerate(rows) if row.draw is not None]
        if not wanted:
            return hidden.new_empty(0, self._config.vocab_size, dtype=torch.float32)
        logits: Tensor = self._head(hidden[wanted])
        return soft_cap(logits.float(), getattr(self._config, "final_logit_softcapping", None))


def _is_proven(loaded: Loaded, spec: SlabSpec, form: Form) -> bool:
    """Whether each part of the model, and its first layers as a whole, give rows the same bits in every batch here."""
    config, device = loaded.model.config, loaded.model.device
    cap = getattr(config, "attn_logit_softcapping", None)
    has_sinks = Part.SOFTMAX_SINKS in ARCHITECTURES[config.model_type].parts
    # In the order of layers, so that the probe's subject has the same description in every process.
    manners = dict.fromkeys(Manner(kind, cap, has_sinks) for kind in attending_kinds(config))
    return (
        linears_are_exact(loaded.model, form, device)
        and attention_is_exact(spec, config.num_attention_heads, loaded.rotaries, manners, device)
        and _layers_are_exact(loaded, spec, form)
    )


def _layers_are_exact(loaded: Loaded, spec: SlabSpec, form: Form) -> bool:
    config = loaded.model.config
    kinds = layer_kinds(config)
    # Layers of one kind have the same shapes, and so the same kernels: more of them would show nothing new.
    count = max(kinds.index(kind) for kind in kinds) + 1
    recurrent = sum(kind.is_recurrent for kind in kinds[:count])
    tried = replace(
        spec,
        layers=count - recurrent,
        recurrent=replace(spec.recurrent, layers=recurrent) if spec.recurrent else None,
    )

    def probe() -> bool:
        short = first_layers(loaded.model, count)
        # The head was tried by itself, and would take longest.
        short.set_output_embeddings(nn.Identity())
        engine = TorchEngine(Loaded(short, loaded.rotaries), tried, form, is_bit_exact=False)
        return is_bit_exact(engine, tried, config.vocab_size)

    return findings.find_or_probe(f"{config} {form} {tried}", probe)
