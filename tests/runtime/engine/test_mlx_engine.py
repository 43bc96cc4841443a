"""The MLX engine beside mlx-lm itself and beside the torch engine, and what it makes of checkpoints and settings."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from runtime.engine import load_engine
from runtime.engine.openvino_fit import fits_cpu
from runtime.errors import InvalidSetting, ModelUnavailable
from runtime.rows import Row, RowBatch
from runtime.settings import Settings
from runtime.slab import Slab
from runtime.text import Text
from tests.conftest import SMALL, save_random_model
from tests.runtime.engine.feeding import GREEDY, LogitsEngine, feed, load, random_tokens

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
generate_step = pytest.importorskip("mlx_lm.generate").generate_step

QUESTIONS = ("Hello!", "My name is Ada. What is my name?")


def continued(engine: LogitsEngine, prompt: list[int], count: int) -> list[int]:
    """The greedy tokens that follow a prompt."""
    slab = engine.new_pool(1).acquire()
    feed(engine, slab, prompt[:-1])
    history = list(prompt)
    while len(history) < len(prompt) + count:
        history.append(engine.forward(RowBatch((Row(slab, len(history) - 1, history[-1], GREEDY),)))[0].token_id)
    return history[len(prompt) :]


def generated_by_mlx_lm(directory: Path, prompt: list[int], count: int, dtype: Any = None) -> list[int]:
    model, _ = mlx_lm.utils.load_model(directory)
    if dtype is not None:
        model.set_dtype(dtype)
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def question_of(directory: Path, words: str) -> list[int]:
    return Text.load(directory).render([{"role": "user", "content": words}])


@pytest.mark.parametrize("words", QUESTIONS)
def test_inside_the_window_it_says_what_mlx_lm_says(seedling: Path, words: str) -> None:
    prompt = question_of(seedling, words)

    said = continued(load(seedling, backend="mlx"), prompt, 40)

    assert said == generated_by_mlx_lm(seedling, prompt, 40, mx.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_that_mlx_lm_quantised_stays_as_it_is(seedling: Path, tmp_path: Path, bits: int) -> None:
    directory = tmp_path / "quantised"
    mlx_lm.convert(str(seedling), str(directory), quantize=True, q_bits=bits, q_group_size=64, dtype="float32")
    prompt = question_of(seedling, QUESTIONS[0])

    engine = load(directory, backend="mlx", window=250)

    assert engine.facts.is_bit_exact
    assert engine.facts.weights_bytes < load(seedling, backend="mlx").facts.weights_bytes * (bits + 1.1) / 32
    assert continued(engine, prompt, 24) == generated_by_mlx_lm(directory, prompt, 24)


def test_in_float32_it_computes_what_the_torch_engine_does_far_past_the_window(seedling: Path) -> None:
    ours, other = (load(seedling, window=64, backend=backend) for backend in ("mlx", "torch"))
    tokens = random_tokens(300, ours.facts.vocabulary)

    logits, expected = (feed(engine, engine.new_pool(1).acquire(), tokens) for engine in (ours, other))

    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_two_hundred_greedy_tokens_are_those_of_the_torch_engine(seedling: Path) -> None:
    prompt = question_of(seedling, QUESTIONS[1])

    said, expected = (
        continued(load(seedling, window=64, backend=backend), prompt, 200) for backend in ("mlx", "torch")
    )

    assert said == expected


def test_what_a_slab_holds_can_be_read_and_filled_on_other_threads(seedling: Path) -> None:
    """As snapshots are written and read: beside the thread that runs forwards."""
    for dtype in ("float32", "bfloat16"):
        engine = load(seedling, dtype, window=64, backend="mlx")
        pool = engine.new_pool(2)
        slab, restored = pool.acquire(), pool.acquire()
        tokens = random_tokens(150, engine.facts.vocabulary)
        feed(engine, slab, tokens[:120])

        def restore(slab: Slab = slab, restored: Slab = restored) -> None:
            held = [slab.held(layer) for layer in range(slab.spec.layers)]
            keys, values = (torch.stack(parts) for parts in zip(*held, strict=True))
            restored.fill(keys, values, slab.frontier)

        thread = threading.Thread(target=restore)
        thread.start()
        thread.join()

        assert restored.frontier == 120
        expected = feed(engine, slab, tokens[120:], start=120)
        assert torch.equal(feed(engine, restored, tokens[120:], start=120), expected)


def test_a_fork_goes_on_alike_and_leaves_its_original_alone(seedling: Path) -> None:
    engine = load(seedling, window=64, backend="mlx")
    pool = engine.new_pool(2)
    slab, fork = pool.acquire(), pool.acquire()
    tokens = random_tokens(150, engine.facts.vocabulary)
    feed(engine, slab, tokens[:100])
    fork.copy_from(slab)

    feed(engine, fork, random_tokens(50, engine.facts.vocabulary, seed=3), start=100)
    logits = feed(engine, slab, tokens[100:], start=100)

    whole = feed(engine, engine.new_pool(1).acquire(), tokens)
    assert torch.equal(logits, whole[100:])


def test_a_slab_that_skips_ahead_sees_its_sinks_and_zeros_as_the_torch_engines_does(seedling: Path) -> None:
    found = []
    for backend in ("mlx", "torch"):
        engine = load(seedling, window=64, backend=backend)
        slab = engine.new_pool(1).acquire()
        feed(engine, slab, random_tokens(50, engine.facts.vocabulary))
        slab.skip(900)
        found.append(feed(engine, slab, random_tokens(40, engine.facts.vocabulary, seed=1), start=900))

    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)


def test_a_slab_takes_memory_as_tokens_arrive(seedling: Path) -> None:
    engine = load(seedling, window=900, backend="mlx", determinism="fast")
    ceiling = engine.facts.slab.ceiling_bytes
    mx.clear_cache()
    before = mx.get_active_memory()

    slab = engine.new_pool(8).acquire()
    assert mx.get_active_memory() - before < ceiling // 8
    feed(engine, slab, random_tokens(200, engine.facts.vocabulary))
    after_a_bucket = mx.get_active_memory() - before
    feed(engine, slab, random_tokens(1500, engine.facts.vocabulary), start=200)

    assert after_a_bucket < ceiling // 3
    assert mx.get_active_memory() - before < ceiling * 1.05


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_mlx_has_not_here_is_refused(seedling: Path, device: str) -> None:
    if device == "mps" and mx.metal.is_available():
        pytest.skip("mps is here")
    with pytest.raises(InvalidSetting, match=f"device={device} is not available to backend=mlx"):
        load_engine(Settings(backend="mlx", device=device), seedling)


def test_layers_that_do_not_divide_into_groups_are_refused_under_quantised_weights(tmp_path: Path) -> None:
    odd = {**SMALL, "intermediate_size": 100}
    directory = save_random_model(Qwen3Config(**odd, head_dim=32, tie_word_embeddings=True), tmp_path)

    with pytest.raises(InvalidSetting, match="weights=int8 cannot hold layers of"):
        load_engine(Settings(backend="mlx", weights="int8"), directory)


def test_without_mlx_lm_the_setting_is_refused_in_a_line_that_says_what_to_install(
    seedling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "runtime.engine.mlx_engine", raising=False)
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)

    with pytest.raises(InvalidSetting, match=r"pip install 'perennial\[mlx\]'") as caught:
        load_engine(Settings(backend="mlx"), seedling)

    assert len(str(caught.value).splitlines()) == 1


def test_off_apple_silicon_another_backend_is_chosen(small_models: Mapping[str, Path]) -> None:
    if sys.platform == "darwin":
        pytest.skip("this is a Mac")
    settings = Settings(window=64, determinism="fast", device="cpu")

    backend = "openvino" if fits_cpu() else "torch"
    assert load_engine(settings, small_models["qwen3"]).facts.backend == backend


def test_weights_of_no_file_are_no_model(small_models: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((small_models["qwen3"] / "config.json").read_bytes())

    with pytest.raises(ModelUnavailable, match="mlx-lm"):
        load_engine(replace(Settings(), backend="mlx"), tmp_path)
