"""The bundled model with each of its proposers: the same tokens, and some of them proposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoConfig, BertConfig, BertForMaskedLM

from actors import Runtime, open_runtime
from runtime import Settings
from runtime.engine.openvino_fit import fits_cpu
from runtime.errors import InvalidSetting, ModelUnavailable, PerennialError
from runtime.models import find_model
from tests.actors.engines import generated, sample
from tests.conftest import save_random_model

SETTINGS = Settings(device="cpu", dtype="float32", window=60, block_size=6)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "nucleus": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 6},
}
SESSIONS, LENGTH = 8, 90
MASKED = BertConfig(
    vocab_size=2049,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    mask_token_id=2048,
)
PROPOSERS = ("ngram", "draft", "diffusion")
ALL = tuple((name, number) for name in SAMPLINGS for number in range(SESSIONS))
Answers = Mapping[tuple[str, int], list[int]]


def prompt(runtime: Runtime, number: int) -> list[int]:
    messages = [
        {"role": "user", "content": f"My name is Anna. Count to {number + 3}, then tell me a story of the sea."}
    ]
    return runtime.text.encode(runtime.text.apply_template(messages))


async def answers(runtime: Runtime) -> Answers:
    """What sessions that run side by side come to, past the window, drawn in every way."""
    found = {}

    async def ask(name: str, number: int) -> None:
        session = await runtime.create_session()
        await session.append(prompt(runtime, number))
        found[name, number] = await generated(session, LENGTH, **SAMPLINGS[name])
        await session.close()

    for name in SAMPLINGS:
        async with trio.open_nursery() as askers:
            for number in range(SESSIONS):
                askers.start_soon(ask, name, number)
    return found


@pytest.fixture(scope="module", params=["torch", "mlx", "openvino", "openvino int8"])
def on_each(request: pytest.FixtureRequest) -> Settings:
    """The settings with each backend, and with slabs of 8 bits where it has them."""
    backend, _, kv_dtype = str(request.param).partition(" ")
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    if backend == "openvino" and not fits_cpu():
        pytest.skip("OpenVINO's kernels were not tried on such a CPU")
    return replace(SETTINGS, backend=backend, kv_dtype=kv_dtype or "auto")


def answers_of(settings: Settings) -> Answers:
    async def run() -> Answers:
        async with open_runtime(settings) as runtime:
            return await answers(runtime)

    return trio.run(run)


@pytest.fixture(scope="module")
def plain() -> Answers:
    return answers_of(SETTINGS)


@pytest.fixture(scope="module")
def of_random_weights(on_each: Settings, small_models: Mapping[str, Path]) -> tuple[Settings, Answers]:
    """Settings of a model of random weights, and what it says without a proposer."""
    settings = replace(on_each, model=str(small_models["qwen3"]))
    return settings, answers_of(settings)


@pytest.mark.parametrize("proposer", PROPOSERS)
async def test_tokens_are_those_without_a_proposer_and_some_were_proposed(plain: Answers, proposer: str) -> None:
    async with open_runtime(replace(SETTINGS, proposer=proposer)) as runtime:
        assert await answers(runtime) == plain

        proposed, accepted = (sample(runtime.metrics, f"{kind}_tokens_total") for kind in ("proposed", "accepted"))
        assert 0 < accepted <= proposed
        assert sample(runtime.metrics, "slab_in_use") == 0


@pytest.mark.parametrize("proposer", PROPOSERS)
async def test_a_fork_and_a_restored_session_go_on_with_the_same_tokens(
    tmp_path: Path, proposer: str, on_each: Settings
) -> None:
    async with open_runtime(replace(on_each, proposer=proposer, state_dir=str(tmp_path))) as runtime:
        session = await runtime.create_session()
        await session.append(prompt(runtime, 0))
        await generated(session, 40)
        saved = await runtime.save_session(session.id)
        others = [await runtime.fork_session(session.id), await runtime.restore_session(saved.snapshot_id)]

        expected, *found = [await generated(one, 40) for one in (session, *others)]

        assert found == [expected] * 2


@pytest.mark.parametrize("proposer", PROPOSERS)
async def test_a_model_of_random_weights_says_the_same_with_each(
    of_random_weights: tuple[Settings, Answers], tmp_path: Path, proposer: str
) -> None:
    settings, expected = of_random_weights
    BertForMaskedLM(MASKED).save_pretrained(tmp_path)
    # What drafts thinks as the model does, and so is often right; what fills masks says nothing of use.
    proposer_model = str(tmp_path) if proposer == "diffusion" else settings.model
    async with open_runtime(replace(settings, proposer=proposer, proposer_model=proposer_model)) as runtime:
        assert await answers(runtime) == expected
        assert sample(runtime.metrics, "proposed_tokens_total") > 0


async def test_a_draft_leaves_the_engine_its_threads() -> None:
    async with open_runtime(SETTINGS):
        threads = torch.get_num_threads()
    async with open_runtime(replace(SETTINGS, proposer="draft")):
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("proposer", ["draft", "diffusion"])
@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"model": "small"}, InvalidSetting, "needs proposer_model"),
        ({"proposer_model": "/nowhere"}, ModelUnavailable, "no model at '/nowhere'"),
    ],
)
async def test_a_model_that_proposes_has_to_be_there(
    small_models: Mapping[str, Path], proposer: str, more: dict[str, Any], error: type[PerennialError], says: str
) -> None:
    if "model" in more:
        more = {"model": str(small_models["qwen3"])}
    with pytest.raises(error, match=says):
        async with open_runtime(replace(SETTINGS, proposer=proposer, **more)):
            pass


async def test_a_draft_that_knows_fewer_tokens_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(find_model("seedling") / "draft")
    config.vocab_size = 1000
    with pytest.raises(ModelUnavailable, match="knows 1000 tokens and the model 2048"):
        async with open_runtime(
            replace(SETTINGS, proposer="draft", proposer_model=str(save_random_model(config, tmp_path)))
        ):
            pass
