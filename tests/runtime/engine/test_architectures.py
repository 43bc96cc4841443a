"""The architectures that some engines have no code for: what they compute, and that a row's bits are those of its session.

Those that every engine runs are tried in test_engine and test_bit_exact.
"""

import gc
import json
import random
import weakref
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma3TextConfig,
    Qwen2Config,
)

from runtime.durable.files import Files
from runtime.durable.slab_file import read_slab, write_slab
from runtime.engine import load_engine
from runtime.engine.architectures import ARCHITECTURES, ENGINES, Part, layer_kinds, missing_parts, recurrent_spec
from runtime.engine.machine import Level, level
from runtime.engine.torch_parts import take_over
from runtime.errors import ModelUnavailable
from runtime.settings import Settings
from runtime.slab import Slab
from tests.actors.test_durable import ENGINE
from tests.conftest import OWN_WINDOW, SMALL, SMALL_CONFIGS, YARN, save_random_model, small_gpt_oss
from tests.reference.decoder import ReferenceDecoder
from tests.runtime.engine.feeding import BusyNeighbours, LogitsEngine, feed, load, random_cut, random_tokens, threads
from tests.runtime.engine.test_engine import FITS, ON_EVERY_ENGINE, transformers_logits

ROOT = Path(__file__).parents[3]
ON_SOME_ENGINES = [name for name in ARCHITECTURES if name not in ON_EVERY_ENGINE]
WINDOW = 24
# Those of which we compute more than linears and plain attention. Where bfloat16 is emulated it takes minutes.
IN_BFLOAT16 = ("gemma2", "gpt_oss", "lfm2", "qwen3_5_text") if level() >= Level.AVX512_BF16 else ()
CASES = (
    *((name, "float32", "none") for name in ON_SOME_ENGINES),
    *((name, "bfloat16", "none") for name in IN_BFLOAT16),
    # Experts, gates of one column, and recurrent layers, in fewer bits.
    ("gpt_oss", "float32", "int8"),
    ("qwen3_5_moe_text", "float32", "int4"),
)
# Engines of small models choose one thread; with several, kernels have more ways to sum.
THREADS = 2


def test_each_architecture_has_a_small_model_to_be_tried_with() -> None:
    assert SMALL_CONFIGS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", ON_SOME_ENGINES)
def test_logits_equal_those_of_transformers_while_the_history_fits(
    small_models: Mapping[str, Path], architecture: str
) -> None:
    engine = load(small_models[architecture], determinism="fast")
    tokens = random_tokens(FITS, 2048)

    logits = feed(engine, engine.new_pool(1).acquire(), tokens)

    expected = transformers_logits(small_models[architecture], tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


VARIANTS = {
    "yarn of half angles": small_gpt_oss(YARN),
    "windows in the upper layers": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=OWN_WINDOW, max_window_layers=1
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers_where_a_configuration_asks_for_more(tmp_path: Path, variant: str) -> None:
    directory = save_random_model(VARIANTS[variant], tmp_path)
    engine = load(directory, determinism="fast")
    tokens = random_tokens(FITS, 2048)

    logits = feed(engine, engine.new_pool(1).acquire(), tokens)

    torch.testing.assert_close(logits, transformers_logits(directory, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", [name for name, one in ARCHITECTURES.items() if one.inside])
def test_the_text_of_a_model_with_other_senses_runs(tmp_path: Path, architecture: str) -> None:
    text = SMALL_CONFIGS[architecture]
    config = AutoConfig.for_model(
        ARCHITECTURES[architecture].inside,
        text_config=text.to_dict(),
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64},
    )
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    tokens = random_tokens(FITS, 2048)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens])).logits[0]
    engine = load(tmp_path, determinism="fast")

    logits = feed(engine, engine.new_pool(1).acquire(), tokens)

    assert engine.facts.architecture == architecture
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


# With the second, some of the sinks are farther away than a layer's own window at the end of the first, and some not.
@pytest.mark.parametrize(("sink", "window"), [(0, 24), (3, OWN_WINDOW - 1)])
@pytest.mark.parametrize("architecture", ON_SOME_ENGINES)
def test_logits_past_the_window_equal_a_reference_that_recomputes_the_whole_history(
    small_models: Mapping[str, Path], architecture: str, sink: int, window: int
) -> None:
    engine = load(small_models[architecture], sink=sink, window=window, determinism="fast")
    tokens = random_tokens(4 * window, 2048)

    logits = feed(engine, engine.new_pool(1).acquire(), tokens)

    expected = ReferenceDecoder(small_models[architecture]).logits(tokens, sink, window)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ON_SOME_ENGINES)
def test_logits_at_position_ten_million_are_those_at_position_two_thousand(
    small_models: Mapping[str, Path], architecture: str
) -> None:
    engine = load(small_models[architecture], "float32", window=WINDOW, determinism="fast")
    head, tail = random_tokens(4, 2048, seed=1), random_tokens(250, 2048, seed=2)

    def logits_at(last: int) -> Tensor:
        slab = engine.new_pool(1).acquire()
        feed(engine, slab, head)
        slab.skip(last + 1 - len(tail))
        return feed(engine, slab, tail, start=last + 1 - len(tail))[-100:]

    near, far = logits_at(2_000), logits_at(10_000_000)

    assert ((far - near).norm(dim=-1) / near.norm(dim=-1)).max() < 1e-3


@dataclass(frozen=True)
class Case:
    engine: LogitsEngine
    tokens: list[int]
    whole: Tensor

    def slab(self) -> Slab:
        return self.engine.new_pool(1).acquire()

    def random_cut(self) -> Iterator[int]:
        return random_cut(min(150, self.engine.facts.row_tile))


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    with threads(THREADS):
        yield


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: pytest.FixtureRequest, small_models: Mapping[str, Path]) -> Case:
    """A history three times as long as the window, and its logits when it is fed in one append."""
    architecture, dtype, weights = request.param
    engine = load(small_models[architecture], dtype, window=WINDOW, weights=weights)
    tokens = random_tokens(3 * WINDOW, 2048)
    with threads(THREADS):
        return Case(engine, tokens, feed(engine, engine.new_pool(1).acquire(), tokens))


def test_logits_are_the_same_bits_however_the_history_was_cut(case: Case) -> None:
    assert case.engine.facts.is_bit_exact
    assert torch.equal(feed(case.engine, case.slab(), case.tokens, repeat(1)), case.whole)
    assert torch.equal(feed(case.engine, case.slab(), case.tokens, case.random_cut()), case.whole)


def test_logits_are_the_same_bits_beside_seven_busy_sessions(case: Case) -> None:
    neighbours = BusyNeighbours(case.engine, 7)

    logits = feed(case.engine, case.slab(), case.tokens, repeat(7), neighbours=neighbours)

    assert torch.equal(logits, case.whole)


def test_verifying_a_proposal_gives_the_same_bits_as_decoding(case: Case) -> None:
    """Rows beyond the first wrong token are written, thrown away, and written anew."""
    choice = random.Random(7)
    slab = case.slab()
    at, logits = 0, []
    while at < len(case.tokens):
        right = choice.randint(1, 8)
        proposal = case.tokens[at : at + right] + random_tokens(8 - right, 1024, seed=at)
        found = feed(case.engine, slab, proposal, start=at)
        logits.append(found[: min(right, len(case.tokens) - at)])
        at += right
        slab.retract(min(at, len(case.tokens)))

    assert torch.equal(torch.cat(logits), case.whole)


@pytest.mark.parametrize("architecture", [name for name, one in SMALL_CONFIGS.items() if recurrent_spec(one)])
@pytest.mark.parametrize("start", [79, 80, 81])
def test_a_tile_of_which_one_row_came_true_leaves_no_trace(
    small_models: Mapping[str, Path], architecture: str, start: int
) -> None:
    """At the edge of the chunks of recurrent layers, which begin anew from a state before the tile."""
    engine = load(small_models[architecture], "float32", window=WINDOW)
    slab, other = (engine.new_pool(1).acquire() for _ in range(2))
    tokens, wrong = random_tokens(start + 30, 2048), random_tokens(engine.facts.row_tile - 1, 2048, seed=start)
    expected = feed(engine, other, tokens)[start + 1 :]
    feed(engine, slab, tokens[:start])

    feed(engine, slab, [tokens[start], *wrong], start=start)
    slab.retract(start + 1)

    assert torch.equal(feed(engine, slab, tokens[start + 1 :], repeat(5), start=start + 1), expected)


def test_a_session_goes_on_with_the_same_bits_in_a_fork_and_from_a_file(case: Case, tmp_path: Path) -> None:
    length = 60
    slab, fork, read = case.slab(), case.slab(), case.slab()
    feed(case.engine, slab, case.tokens[:length])
    history, path = array("I", case.tokens), tmp_path / "session.slab"

    fork.copy_from(slab)
    write_slab(Files(), path, ENGINE, slab, history)
    read_slab(Files(), path, ENGINE, read, history)

    for one in (fork, read):
        logits = feed(case.engine, one, case.tokens[length:], random_cut(20), start=length)
        assert torch.equal(logits, case.whole[length:])


@pytest.mark.parametrize("backend", ["openvino", "mlx"])
@pytest.mark.parametrize("architecture", ON_SOME_ENGINES)
def test_an_engine_refuses_what_it_has_no_code_for_and_names_the_part(
    small_models: Mapping[str, Path], architecture: str, backend: str
) -> None:
    pytest.importorskip("mlx_lm" if backend == "mlx" else backend)
    missing = missing_parts(AutoConfig.from_pretrained(small_models[architecture]), backend)

    with pytest.raises(ModelUnavailable, match=sorted(missing)[0]) as caught:
        load_engine(Settings(backend=backend), small_models[architecture])

    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = Gemma3TextConfig(**SMALL, use_bidirectional_attention=True)
    config.save_pretrained(tmp_path)

    with pytest.raises(ModelUnavailable, match="cannot generate"):
        load_engine(Settings(), tmp_path)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("lfm2", {"layer_types": ["conv"] * 3}),
        ("smollm3", {"no_rope_layers": [1]}),
        ("gemma2", {"layer_types": ["chunked_attention", "full_attention"]}),
    ],
)
def test_a_configuration_whose_layers_make_no_model_is_refused_in_one_line(
    tmp_path: Path, architecture: str, changes: dict[str, object]
) -> None:
    config = SMALL_CONFIGS[architecture].to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelUnavailable) as caught:
        load_engine(Settings(), tmp_path)

    assert len(str(caught.value).splitlines()) == 1


def test_a_model_holds_the_weights_of_its_experts_once(small_models: Mapping[str, Path]) -> None:
    """What they were cut from is let go."""
    model = AutoModelForCausalLM.from_pretrained(small_models["gpt_oss"])
    before = [weakref.ref(layer.mlp.experts.gate_up_proj) for layer in model.model.layers]

    take_over(model)
    gc.collect()

    assert [one() for one in before] == [None] * len(before)


def test_a_layer_has_the_window_and_the_rotation_that_its_configuration_gives_it() -> None:
    assert [kind.window for kind in layer_kinds(SMALL_CONFIGS["gemma2"])] == [OWN_WINDOW, None]
    assert [kind.window for kind in layer_kinds(SMALL_CONFIGS["mistral"])] == [256, 256]
    assert [kind.rotary for kind in layer_kinds(SMALL_CONFIGS["smollm3"])] == ["one", None]
    assert [kind.rotary for kind in layer_kinds(SMALL_CONFIGS["gemma3_text"])] == [
        "sliding_attention",
        "full_attention",
    ]


def test_torch_has_code_for_all_parts() -> None:
    assert ENGINES["torch"] == frozenset(Part)


def test_the_readme_and_the_page_of_architectures_say_what_the_table_says() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert all(f"`{name}`" in page for name in ENGINES)
    for one in ARCHITECTURES.values():
        able = [name for name, parts in ENGINES.items() if one.parts <= parts]
        engines = "all" if len(able) == len(ENGINES) else ", ".join(able)
        parts = ", ".join(part for part in Part if part in one.parts)
        assert f"| {one.models} | `{one.name}` | {parts} | {engines} |" in page
        assert all(name in readme for name in one.models.split(", "))
