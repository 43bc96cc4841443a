"""Which form of a model is taken where nothing was asked for, and what happens where a form is not exact.

What a probe found is a file, so that a machine on which a form fails is one whose file says so.
"""

from __future__ import annotations

import json
import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.engine import load_engine, torch_engine
from runtime.engine.machine import Level, features, level
from runtime.engine.openvino_fit import fits_cpu
from runtime.engine.torch_model import Loaded, load_model
from runtime.errors import InvalidSetting
from runtime.rows import Row, RowBatch
from runtime.settings import Settings
from tests.runtime.engine.feeding import GREEDY

Findings = dict[str, bool]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "perennial" / "findings.json"


def findings(file: Path) -> Findings:
    content: Findings = json.loads(file.read_text())
    return content


def settings(weights: str = "auto", dtype: str = "auto") -> Settings:
    """On torch, which has several forms to choose from."""
    return Settings(backend="torch", weights=weights, dtype=dtype, device="cpu", window=64)


def found_by_starts(file: Path, directory: Path, weights: str) -> Findings:
    """What is known once each form with these weights that nobody needs to ask for has been tried."""
    for dtype in ("float32", "bfloat16") if level() == Level.AMX else ("float32",):
        load_engine(settings(weights, dtype), directory)
    return findings(file)


@pytest.fixture
def inexact_as_they_are(file: Path, seedling: Path) -> None:
    """The findings of a machine on which weights of 8 bits are exact, and those of the checkpoint are not."""
    exact = found_by_starts(file, seedling, "int8")
    everything = found_by_starts(file, seedling, "none")
    file.write_text(json.dumps({key: key in exact for key in everything}))


@pytest.mark.usefixtures("inexact_as_they_are")
def test_a_form_that_is_not_exact_gives_way_to_the_next_and_facts_say_why(
    seedling: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="perennial.engine"):
        facts = load_engine(settings(), seedling).facts

    assert (facts.weights, facts.is_bit_exact) == ("int8", True)
    assert "weights=none is not bit-exact in batches here" in facts.form_reason
    assert any("a row gets other bits in other batches of" in record.getMessage() for record in caplog.records)


@pytest.mark.usefixtures("inexact_as_they_are")
def test_a_form_that_was_asked_for_and_is_not_exact_is_refused_with_what_would_do(seedling: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"weights=none.*set dtype and weights to auto") as caught:
        load_engine(settings("none", "float32"), seedling)

    assert len(str(caught.value).splitlines()) == 1


def test_where_no_form_is_exact_each_row_runs_alone_and_the_start_goes_on(file: Path, seedling: Path) -> None:
    for weights in ("int8", "none"):
        found_by_starts(file, seedling, weights)
    file.write_text(json.dumps(dict.fromkeys(findings(file), False)))

    engine = load_engine(settings(), seedling)

    assert (engine.facts.row_tile, engine.facts.is_bit_exact) == (1, True)
    assert "one row a forward" in engine.facts.form_reason
    (row,) = (Row(engine.new_pool(1).acquire(), 0, 5, GREEDY),)
    assert len(engine.forward(RowBatch((row,)))) == 1


@pytest.mark.usefixtures("inexact_as_they_are")
def test_a_form_that_is_not_exact_has_left_memory_when_the_next_is_read(
    seedling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[object]] = []
    in_memory: list[int] = []

    def load(*given: Any, **named: Any) -> Loaded:
        in_memory.append(sum(one() is not None for one in models))
        loaded = load_model(*given, **named)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(torch_engine, "load_model", load)
    load_engine(settings(), seedling)

    assert len(in_memory) > 1
    assert not any(in_memory)


@pytest.mark.parametrize(
    ("here", "asked_for", "backend", "dtype", "weights"),
    [
        (Level.AVX2, "auto", *(("openvino", "bfloat16") if fits_cpu() else ("torch", "float32")), "int8"),
        (Level.AVX2, "torch", "torch", "float32", "int8"),
        (Level.AVX512, "auto", "openvino", "bfloat16", "int8"),
        (Level.AVX512, "torch", "torch", "float32", "int8"),
        (Level.AVX512_BF16, "auto", "openvino", "bfloat16", "none"),
        (Level.AVX512_BF16, "torch", "torch", "float32", "none"),
        (Level.AMX, "auto", "openvino", "bfloat16", "none"),
        (Level.AMX, "torch", "torch", "bfloat16", "none"),
    ],
)
def test_auto_takes_the_widest_form_that_a_cpu_reads_at_its_memorys_speed(
    large_model: Path, here: Level, asked_for: str, backend: str, dtype: str, weights: str
) -> None:
    if level() != here:
        pytest.skip(f"this CPU is {features()}, not {here.name}")
    facts = load_engine(replace(settings(), backend=asked_for), large_model).facts

    assert (facts.backend, facts.dtype, facts.weights) == (backend, dtype, weights)
    assert facts.form_reason


def test_a_model_that_fits_into_the_cache_stays_as_it_is(seedling: Path) -> None:
    facts = load_engine(settings(), seedling).facts

    assert facts.weights == "none"
    assert "small" in facts.form_reason


def test_a_form_that_was_asked_for_is_taken_without_a_word(seedling: Path) -> None:
    facts = load_engine(settings("int8", "float32"), seedling).facts

    assert (facts.weights, facts.form_reason) == ("int8", "")


@pytest.mark.parametrize(
    ("limit", "most"), [("AVX2", Level.AVX2), ("AVX512_CORE", Level.AVX512), ("SSE41", Level.OTHER), ("ALL", Level.AMX)]
)
def test_what_the_environment_takes_from_the_cpu_is_told(
    monkeypatch: pytest.MonkeyPatch, limit: str, most: Level
) -> None:
    own = level()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    assert level() == min(own, most)
    assert ("the environment limits it" in features()) == (level() < own)


def test_facts_name_the_cpu_and_its_kernel_class(seedling: Path) -> None:
    facts = load_engine(settings(), seedling).facts

    assert facts.cpu_features == features()
    assert f"threads {torch.get_num_threads()}" in facts.kernel_class
