"""Engines: what each computes, against transformers and against the reference, and what it refuses to load."""

import json
from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from runtime.engine import load_engine
from runtime.engine.architectures import ARCHITECTURES, ENGINES
from runtime.errors import InvalidSetting, ModelUnavailable, NotEnoughMemory, StartError
from runtime.events import Sampling
from runtime.rows import Row, RowBatch
from runtime.sampling import Draw, draw_id
from runtime.settings import Settings
from runtime.text import Text
from tests.conftest import SMALL, save_random_model
from tests.reference.decoder import ReferenceDecoder
from tests.runtime.engine.feeding import GREEDY, Load, feed, random_tokens

FITS = 150
ON_EVERY_ENGINE = [name for name, one in ARCHITECTURES.items() if all(one.parts <= parts for parts in ENGINES.values())]
ROPES: Mapping[str, PreTrainedConfig] = {
    "linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": Qwen3Config(
        **SMALL,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
}


def transformers_logits(directory: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0].float()
    return logits


def fed(load: Load, directory: Path, tokens: list[int], **settings: int | str) -> Tensor:
    engine = load(directory, **settings)
    return feed(engine, engine.new_pool(1).acquire(), tokens)


@pytest.mark.parametrize("architecture", ON_EVERY_ENGINE)
def test_logits_equal_those_of_transformers_while_the_history_fits(
    small_models: Mapping[str, Path], architecture: str, load: Load
) -> None:
    directory = small_models[architecture]
    tokens = random_tokens(FITS, 2048)

    logits = fed(load, directory, tokens)

    torch.testing.assert_close(logits, transformers_logits(directory, tokens), rtol=0, atol=1e-4)


def test_logits_of_a_checkpoint_in_half_precision_equal_those_of_transformers_in_float32(
    seedling: Path, load: Load
) -> None:
    tokens = random_tokens(FITS, 2048)

    logits = fed(load, seedling, tokens)

    torch.testing.assert_close(logits, transformers_logits(seedling, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_those_of_transformers_with_scaled_rotary_embeddings(
    tmp_path: Path, rope: str, load: Load
) -> None:
    directory = save_random_model(ROPES[rope], tmp_path)
    tokens = random_tokens(FITS, 2048)

    logits = fed(load, directory, tokens)

    torch.testing.assert_close(logits, transformers_logits(directory, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ON_EVERY_ENGINE)
@pytest.mark.parametrize("sink", [0, 3])
def test_logits_past_the_window_equal_a_reference_that_recomputes_the_whole_history(
    small_models: Mapping[str, Path], architecture: str, sink: int, load: Load
) -> None:
    window = 24
    tokens = random_tokens(4 * window, 2048)

    logits = fed(load, small_models[architecture], tokens, sink=sink, window=window)

    expected = ReferenceDecoder(small_models[architecture]).logits(tokens, sink, window)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


def test_fast_forwards_past_the_window_equal_the_reference_too(small_models: Mapping[str, Path], load: Load) -> None:
    window = 40
    tokens = random_tokens(300, 2048)

    logits = fed(load, small_models["qwen3"], tokens, window=window, determinism="fast")

    expected = ReferenceDecoder(small_models["qwen3"]).logits(tokens, 4, window)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


def test_bfloat16_is_as_near_to_exact_logits_as_transformers_own_bfloat16(seedling: Path, load: Load) -> None:
    tokens = random_tokens(FITS, 2048)
    exact = transformers_logits(seedling, tokens, torch.float32)
    their_error = (transformers_logits(seedling, tokens, torch.bfloat16) - exact).square().mean().sqrt()

    logits = fed(load, seedling, tokens, dtype="bfloat16")

    assert (logits - exact).square().mean().sqrt() < 1.25 * their_error


@pytest.mark.parametrize("question", ["Hello!", "My name is Ada. What is my name?", "Count to five."])
def test_seedling_says_what_transformers_own_generate_says(seedling: Path, question: str, load: Load) -> None:
    prompt = Text.load(seedling).render([{"role": "user", "content": question}])
    model = AutoModelForCausalLM.from_pretrained(seedling, dtype=torch.float32, attn_implementation="eager").eval()
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    expected = generated[0, len(prompt) :].tolist()
    engine = load(seedling)
    slab = engine.new_pool(1).acquire()

    feed(engine, slab, prompt[:-1])
    history = list(prompt)
    while len(history) < len(prompt) + len(expected):
        history.append(engine.forward(RowBatch((Row(slab, len(history) - 1, history[-1], GREEDY),)))[0].token_id)

    assert history[len(prompt) :] == expected


@pytest.mark.parametrize("sink", [0, 4])
def test_logits_at_position_ten_million_are_those_at_position_two_thousand(
    small_models: Mapping[str, Path], sink: int, load: Load
) -> None:
    engine = load(small_models["qwen3"], sink=sink, window=64)
    head, tail = random_tokens(sink, 2048, seed=1), random_tokens(250, 2048, seed=2)

    def logits_at(last: int) -> Tensor:
        slab = engine.new_pool(1).acquire()
        if head:
            feed(engine, slab, head)
        return feed(engine, slab, tail, start=last + 1 - len(tail))[-100:]

    near, far = logits_at(2_000), logits_at(10_000_000)

    assert ((far - near).norm(dim=-1) / near.norm(dim=-1)).max() < 1e-3


def test_only_rows_that_draw_give_logits_in_row_order(small_models: Mapping[str, Path], load: Load) -> None:
    engine = load(small_models["qwen3"])
    pool = engine.new_pool(2)
    tokens = random_tokens(12, 2048)
    everything = feed(engine, pool.acquire(), tokens)
    slab = pool.acquire()

    wanted = [2, 3, 11]
    rows = (Row(slab, at, token, GREEDY if at in wanted else None) for at, token in enumerate(tokens))
    logits = engine.logits(RowBatch(tuple(rows)))

    assert torch.equal(logits, everything[wanted])


def test_rows_that_draw_nothing_fill_the_slab_and_give_no_token(small_models: Mapping[str, Path], load: Load) -> None:
    engine = load(small_models["qwen3"])
    slab = engine.new_pool(1).acquire()

    drawn = engine.forward(RowBatch(tuple(Row(slab, position, 7) for position in range(9))))

    assert (drawn, slab.live_length) == ((), 9)


def test_a_drawn_token_is_the_one_for_the_next_position(small_models: Mapping[str, Path], load: Load) -> None:

    engine = load(small_models["qwen3"])
    pool = engine.new_pool(2)
    tokens = random_tokens(20, 2048)
    sampling = Sampling(temperature=1.0, seed=5)
    logits = feed(engine, pool.acquire(), tokens)
    slab = pool.acquire()

    drawn = engine.forward(RowBatch(tuple(Row(slab, at, token, Draw(sampling)) for at, token in enumerate(tokens))))

    assert [token.token_id for token in drawn] == [draw_id(line, sampling, at + 1) for at, line in enumerate(logits)]


def test_a_rewritten_tile_leaves_no_trace_of_what_it_replaces(small_models: Mapping[str, Path], load: Load) -> None:
    engine = load(small_models["qwen3"], window=40)
    pool = engine.new_pool(2)
    tokens, wrong = random_tokens(150, 2048), random_tokens(32, 2048, seed=9)
    expected = feed(engine, pool.acquire(), tokens)[100:]
    slab = pool.acquire()
    feed(engine, slab, tokens[:100])

    feed(engine, slab, wrong, start=100)

    assert torch.equal(feed(engine, slab, tokens[100:], start=100), expected)


def test_a_reused_slab_leaves_no_trace_of_the_session_before(small_models: Mapping[str, Path], load: Load) -> None:
    engine = load(small_models["qwen3"], window=40)
    pool = engine.new_pool(1)
    tokens = random_tokens(150, 2048)
    slab = pool.acquire()
    expected = feed(engine, slab, tokens)
    feed(engine, slab, random_tokens(200, 2048, seed=9), start=5_000)
    pool.release(slab)

    logits = feed(engine, pool.acquire(), tokens)

    assert torch.equal(logits, expected)


@pytest.mark.parametrize("kept", [0, 20])
def test_what_an_earlier_session_left_reaches_nobody_though_it_be_no_number(
    small_models: Mapping[str, Path], load: Load, kept: int
) -> None:
    """Neither a session on an empty slab nor one that begins as the earlier one did, of which the first tokens are `kept`."""
    engine = load(small_models["qwen3"], window=40)
    pool = engine.new_pool(1)
    spec = pool.spec
    tokens = random_tokens(150, 2048)
    slab = pool.acquire()
    beginning = feed(engine, slab, tokens[:20])
    both = [torch.stack([slab.held(layer)[part] for layer in range(spec.layers)]) for part in range(2)]
    rest = feed(engine, slab, tokens[20:], start=20)
    no_numbers = both[0].new_full((spec.layers, spec.kv_heads, spec.slots - 20, spec.width), torch.nan)
    keys, values = (torch.cat((held, no_numbers), dim=2) for held in both)
    slab.fill(keys, values, spec.slots)
    history = array("I", tokens)
    pool.release(slab, history[:kept] + array("I", [0]) * (spec.slots - kept))

    again = pool.acquire(history[: max(kept, 1)])

    assert again.frontier == kept
    assert torch.equal(feed(engine, again, tokens[kept:], start=kept), torch.cat((beginning, rest))[kept:])


def test_facts_tell_what_was_loaded(small_models: Mapping[str, Path], load: Load, engine_name: str) -> None:
    facts = load(small_models["mistral"], "bfloat16", sink=2, window=100).facts

    model = AutoModelForCausalLM.from_pretrained(small_models["mistral"])
    assert (facts.backend, facts.dtype) == ("torch" if engine_name == "step" else engine_name, "bfloat16")
    assert (facts.architecture, facts.vocabulary, facts.is_bit_exact) == ("mistral", 2048, True)
    assert facts.weights_bytes == 2 * sum(weight.numel() for weight in model.parameters())
    assert (facts.slab.sink, facts.slab.window, facts.slab.row_tile) == (2, 100, facts.row_tile)


@pytest.mark.parametrize(("architecture", "longest"), [("qwen3", 512), ("qwen2", 512), ("mistral", 256)])
def test_the_window_is_cut_down_to_what_the_model_can_see(
    small_models: Mapping[str, Path], architecture: str, longest: int, load: Load
) -> None:
    spec = load(small_models[architecture], sink=10, window=10**6).facts.slab

    assert spec.visible == longest


def copied(model: Path, to: Path) -> Path:
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def with_config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def with_a_weight_missing(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def with_half_of_the_weights_file(directory: Path) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def with_noise_for_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 16)


def with_a_broken_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "qwen3", ')


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


DEFECTS: Mapping[str, Callable[[Path], object]] = {
    "no config.json": without_config,
    "a config.json that is no JSON": with_a_broken_config,
    "a config.json that is no object": lambda directory: (directory / "config.json").write_text("[]") and None,
    "an architecture unknown to transformers": with_config(model_type="perceptron", architectures=["Perceptron"]),
    "an architecture that we do not run": with_config(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    "no model_type": with_config(model_type=None),
    "a value of the wrong type": with_config(hidden_size="wide"),
    "a size of zero": with_config(num_attention_heads=0),
    "sizes that are not those of the weights": with_config(intermediate_size=96),
    "more layers than weights": with_config(num_hidden_layers=3, layer_types=None),
    "frequencies that change with the length": with_config(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "an unknown rope type": with_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
    "no weights": without_weights,
    "a weight missing": with_a_weight_missing,
    "half of the weights' file": with_half_of_the_weights_file,
    "noise for weights": with_noise_for_weights,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_model_directory_with_a_defect_is_unavailable_and_one_line_says_why(
    small_models: Mapping[str, Path], tmp_path: Path, defect: str, backend: str
) -> None:
    directory = copied(small_models["qwen3"], tmp_path / "model")
    DEFECTS[defect](directory)

    with pytest.raises(ModelUnavailable) as caught:
        load_engine(Settings(dtype="float32", backend=backend), directory)

    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (Settings(sink=512), "sink"),
        (Settings(sink=2**20), "sink"),
    ],
)
def test_a_setting_that_this_model_or_release_cannot_honour_is_refused_by_name(
    small_models: Mapping[str, Path], settings: Settings, field: str, backend: str
) -> None:
    with pytest.raises(InvalidSetting, match=field) as caught:
        load_engine(replace(settings, backend=backend), small_models["qwen3"])

    assert_one_line(caught.value)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_refused_by_name(
    small_models: Mapping[str, Path], device: str, backend: str
) -> None:
    if {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        pytest.skip(f"{device} is here")

    with pytest.raises(InvalidSetting, match=f"device={device}") as caught:
        load_engine(Settings(device=device, backend=backend), small_models["qwen3"])

    assert_one_line(caught.value)


@pytest.mark.parametrize("settings", [Settings(capacity=2**20), Settings(max_concurrent=2**20)])
def test_slabs_that_cannot_fit_in_memory_stop_the_start(
    small_models: Mapping[str, Path], settings: Settings, backend: str
) -> None:
    with pytest.raises(NotEnoughMemory, match="lower window, capacity or max_concurrent") as caught:
        load_engine(replace(settings, backend=backend), small_models["qwen3"])

    assert_one_line(caught.value)


def test_a_window_that_cannot_fit_in_memory_stops_the_start(
    small_models: Mapping[str, Path], tmp_path: Path, backend: str
) -> None:
    directory = copied(small_models["qwen3"], tmp_path / "model")
    with_config(max_position_embeddings=2**31)(directory)

    with pytest.raises(NotEnoughMemory) as caught:
        load_engine(Settings(window=2**31, backend=backend), directory)

    assert_one_line(caught.value)


def assert_one_line(error: StartError) -> None:
    assert str(error)
    assert len(str(error).splitlines()) == 1
