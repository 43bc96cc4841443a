"""The OpenVINO engine for CPUs: layers as compiled graphs, with our own kernels for attention over slabs between them."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from runtime.dtypes import dtype_named
from runtime.engine import EngineFacts, findings
from runtime.engine.block_graphs import InBlocks, knows_blocks
from runtime.engine.configuration import (
    HEAD_MOST_ROWS,
    IN_CACHE,
    KEPT,
    Form,
    check_covered,
    check_memory,
    count_weights,
    engine_facts,
    read_config,
    refuse,
    slab_spec,
)
from runtime.engine.drawing import draw_tokens
from runtime.engine.kept_parts import find_parts, held_bytes
from runtime.engine.machine import Level, hardware_level, kernel_class, level, sums_bytes
from runtime.engine.openvino_compiling import Compiling
from runtime.engine.openvino_fit import can_build, is_small_model
from runtime.engine.openvino_parts import InGraphs
from runtime.engine.parts import Making, lengthened
from runtime.engine.probe import PROBED_ROWS, is_bit_exact, is_exact_function
from runtime.engine.row_attention import CLAIM, RowAttention, row_attention_is_exact
from runtime.engine.torch_slab import SlabArena, torch_pool
from runtime.errors import InvalidSetting, ModelUnavailable
from runtime.events import Token
from runtime.foreign.pages import trim
from runtime.rows import RowBatch
from runtime.settings import Settings
from runtime.slab import SlabPool
from runtime.slab_spec import SlabSpec

_log = logging.getLogger("perennial.engine")

# The types of slabs that attention can read, whatever type the graphs compute in.
_HELD = ("float32", "bfloat16", "int8")

_TRIED = (
    f"each kind of graph at every count of rows on {PROBED_ROWS} rows or more, attention at every count, the first "
    "layers, two at most, in batches of two sessions"
)


class OpenVinoEngine:
    """A causal language model of one of `ARCHITECTURES` on a CPU."""

    def __init__(self, model: _Model, spec: SlabSpec, form: Form, slabs: int, *, is_bit_exact: bool) -> None:
        """As many as `slabs` slabs lie in one store at a time; a pool for which it has too few left has a store of its own."""
        self._model, self._spec, self._form = model, spec, form
        self._arena = SlabArena(spec, slabs, are_wiped=False)
        self._is_bit_exact = is_bit_exact

    @classmethod
    def load(cls, settings: Settings, directory: Path, beside: EngineFacts | None = None) -> OpenVinoEngine:
        """The engine for the model in `directory`, under `strict` in the first form that a probe finds exact here.

        One that is loaded `beside` another leaves it its memory, and its threads, for which the other was probed.

        Raises InvalidSetting, ModelUnavailable or NotEnoughMemory.
        """
        config = read_config(directory)
        if settings.device not in ("auto", "cpu"):
            raise InvalidSetting(f"backend=openvino runs on a CPU: set backend to torch for device={settings.device}")
        check_covered(config, "openvino")
        if not can_build(config):
            raise ModelUnavailable(
                f"backend=openvino cannot run the model in {directory}, whose layers have other parts, sizes that are not "
                "multiples of 32 or head dimensions that are not multiples of 16: set backend to torch"
            )
        forms = _forms(settings, config, directory)

        def spec_of(form: Form) -> SlabSpec:
            row_tile = _making(form, directory).row_counts[-1]
            return slab_spec(config, settings, form.dtype, row_tile=row_tile, others=_held_types())

        needed = _needed_bytes(config, directory, forms)
        check_memory(needed, psutil.virtual_memory().available, settings, spec_of(forms[0]), beside)
        if beside is None:
            torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
        is_strict = settings.determinism == "strict"
        failed: list[Form] = []
        for form in forms:
            spec = spec_of(form)
            model = _Model(config, directory, form, spec)
            if not is_strict or model.is_exact():
                model.release()
                slabs = settings.capacity + settings.max_concurrent
                return cls(model, spec, form.after(failed), slabs, is_bit_exact=is_strict)
            failed.append(form)
            # Memory was checked for one form at a time.
            del model
        raise refuse(failed)

    @cached_property
    def facts(self) -> EngineFacts:
        return engine_facts(
            "openvino",
            self._model.config,
            self._form,
            self._spec,
            device="cpu",
            weights_bytes=self._model.weights_bytes,
            row_step=1,
            kernel_class=f"{kernel_class()}, {self._model.making.library}",
            is_bit_exact=self._is_bit_exact,
            claims=[*self._model.making.claims, CLAIM],
            tried=_TRIED,
            tensors=self._model.tensors,
        )

    def new_pool(self, count: int) -> SlabPool:
        arena = self._arena if count <= self._arena.left else SlabArena(self._spec, count, are_wiped=False)
        return arena.pool(count)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        return draw_tokens(self.logits(batch), batch)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        """The logits of the rows with `draw`, [rows, vocabulary] float32; at most `row_tile` rows run at once."""
        rows = batch.rows
        assert 0 < len(rows) <= self._spec.row_tile
        return self._model.logits(batch)


class _Model:
    """The graphs of a model, its embedding, its rotary angles, and attention over slabs of `spec`."""

    def __init__(self, config: PreTrainedConfig, directory: Path, form: Form, spec: SlabSpec) -> None:
        """Raises ModelUnavailable."""
        self.making = _making(form, directory)
        with ThreadPoolExecutor(1) as beside:
            # Both take a while, and neither keeps a core busy all the time.
            prepared = beside.submit(self.making.prepare, spec)
            parts = find_parts(directory, self.making)
            prepared.result()
        self.config = config
        self._form, self._spec, self._parts = form, spec, parts
        self._graphs, self._embedding, self._rotary = parts.graphs, parts.embedding, parts.rotary
        self._attend = RowAttention(spec, config.num_attention_heads, self._rotary)
        self._least_rows = self.making.row_counts.start
        self.tensors, self.weights_bytes = parts.tensors, parts.weights_bytes
        self._no_logits = torch.empty(0, config.vocab_size)

    def is_exact(self) -> bool:
        """Whether each kind of graph, attention, and the first layers as a whole, give rows the same bits in every batch here."""
        described = f"{self.making.way} {self.config} {self._form} {' '.join(self.tensors)}".strip()
        graphs = self._graphs
        kinds = {"first": graphs.first, "last": graphs.last, "head": graphs.head}
        kinds |= {f"between {' '.join(graph.forms)}".strip(): graph for graph in graphs.between}
        for kind, graph in kinds.items():
            # What is imported might be called otherwise than what was compiled here.
            called = f"{kind}, imported" if graph.is_imported else kind
            most = HEAD_MOST_ROWS if graph is graphs.head else self._spec.row_tile
            probe = partial(is_exact_function, graph.of_rows, sum(graph.widths), torch.float32, most)
            if not findings.find_or_probe(f"{described} graph {called}, at most {most} rows", probe):
                _log.warning("a row gets other bits in other batches of the graph %s of %s", kind, self._form)
                return False
        layers = _FirstLayers(self, replace(self._spec, layers=min(2, self._spec.layers)))
        return row_attention_is_exact(
            self._spec, self.config.num_attention_heads, self._rotary
        ) and findings.find_or_probe(
            f"{described} {layers.spec}", partial(is_bit_exact, layers, layers.spec, self.config.vocab_size)
        )

    def release(self) -> None:
        """Hands back what graphs took for many rows at once, megabytes each, which they keep beside their weights."""
        self._graphs.release()
        trim()

    def hidden(self, batch: RowBatch, layers: int) -> Tensor:
        """The head's input for the rows with `draw`, after the first `layers` layers."""
        rows = batch.rows
        embedded = lengthened(self._embedding.rows([row.token_id for row in rows]), self._least_rows)
        angles = self._rotary(embedded, lengthened(torch.tensor([row.position for row in rows]), self._least_rows))
        plan = self._attend.plan(batch)
        graphs = self._graphs
        hidden, query, key, value = graphs.project(embedded, angles, self._attend, plan, layers)
        drawing = [index for index, row in enumerate(rows) if row.draw is not None]
        if not drawing:
            # What later rows need of the last layer is its keys and values.
            self._attend.write(layers - 1, key, value, plan)
            return hidden[drawing]
        attended = self._attend(layers - 1, query, key, value, plan)
        return graphs.last(attended[drawing], hidden[drawing])[0].clone()

    def logits(self, batch: RowBatch) -> Tensor:
        """The logits of the rows with `draw`, [rows, vocabulary] float32."""
        parts = self.hidden(batch, self._spec.layers).split(HEAD_MOST_ROWS)
        return torch.cat([self._graphs.head(part)[0].clone() for part in parts if len(part)] or [self._no_logits])


class _FirstLayers:
    """The model's first layers over slabs of `spec`, without the head, which was tried by itself and would take longest."""

    def __init__(self, model: _Model, spec: SlabSpec) -> None:
        self._model, self.spec = model, spec

    def new_pool(self, count: int) -> SlabPool:
        return torch_pool(self.spec, count)

    @torch.inference_mode()
    def logits(self, batch: RowBatch) -> Tensor:
        return self._model.hidden(batch, self.spec.layers)


def _making(form: Form, directory: Path) -> Making:
    threads = torch.get_num_threads()
    if form.weights == KEPT and not sums_bytes() and knows_blocks(directory):
        return InBlocks(threads)
    return InGraphs(Compiling(form.dtype, form.weights, threads))


def _needed_bytes(config: PreTrainedConfig, directory: Path, forms: Sequence[Form]) -> int:
    """What a load takes for weights, in the first form that will do. Raises ModelUnavailable."""
    makings = [_making(form, directory) for form in forms]
    if (held := held_bytes(directory, makings[0])) is not None:
        return held
    # The embedding stays beside a head that shares its weights.
    weights = count_weights(config, directory)
    weights += config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    return max(making.needed_bytes(directory, weights) for making in makings)


def _held_types() -> tuple[str, ...]:
    # An older x86 CPU has no instruction that reads float16, and numba's code has no substitute.
    reads_halves = platform.machine().lower() not in ("x86_64", "amd64") or hardware_level() >= Level.AVX2
    return (*_HELD, "float16") if reads_halves else _HELD


def _forms(settings: Settings, config: PreTrainedConfig, directory: Path) -> list[Form]:
    """The forms that the settings allow, in the order in which to try them. Raises InvalidSetting or ModelUnavailable.

    Weights of a GGUF file are rounded again only if a setting asks for it.
    """
    multiplies_halves = level() >= Level.AVX512_BF16
    if settings.dtype != "auto":
        dtype = dtype_named(settings.dtype)
    else:
        # Linears of whole numbers compute in float32; here the type is that of slabs.
        is_emulated = settings.weights == "none" and not multiplies_halves
        dtype = torch.float32 if is_emulated else torch.bfloat16
    if settings.weights != "auto":
        return [Form(dtype, settings.weights)]
    if directory.is_file():
        return [Form(dtype, KEPT, "as the file has them")]
    if settings.dtype == "auto" and not multiplies_halves and is_small_model(config, directory):
        return [Form(torch.float32, "none", IN_CACHE)]
    whole = Form(dtype, "int8", "" if multiplies_halves else "this CPU cannot multiply 16-bit numbers")
    if multiplies_halves and dtype == torch.bfloat16:
        return [Form(dtype, "none", "this CPU reads 16 bits a weight at its memory's speed"), whole]
    return [whole]
