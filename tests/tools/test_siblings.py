"""The draft and the diffusion sibling as they lie in the repository, what they learn from, and how they are measured."""

import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from actors import Runtime, open_runtime
from runtime import Settings
from runtime.proposers.diffusion import SINK, WINDOW
from tools.seedling import diffusion, draft
from tools.seedling.card import HELD_OUT_SEED, drawn_dialogues, turns_in
from tools.seedling.diffusion import IGNORED, MASK_ID, MOST_MASKS, Talk, examples, talks, with_holes, with_tail
from tools.seedling.siblings import GreedyDraft, Turn, acceptance, disk_bytes, siblings
from tools.seedling.training import END_ID, OUTPUT, PAD_ID, VOCABULARY, Encoder, Optimizer, Stage, batches, save

ANSWER = tuple(range(10, 31))
TURNS = (Turn((1, 2, 3), ANSWER), Turn((4, 5), ANSWER[:1]))


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(OUTPUT))


@pytest.fixture(scope="module")
def pool(encode: Encoder) -> list[Talk]:
    """Conversations in which seedling would say what they say."""
    return next(talks(encode, None, random.Random(1)))


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    async with open_runtime(Settings(model="seedling", device="cpu", capacity=2, max_concurrent=1)) as runtime:
        yield runtime


def test_a_proposer_that_knows_the_answers_is_accepted_whole() -> None:
    def knowing(history: Sequence[int], count: int) -> Sequence[int]:
        said = len(history) - (3 if history[0] == 1 else 2)
        return [*ANSWER, *[0] * count][said : said + count]

    found = acceptance(knowing, TURNS, 4)
    # 21 tokens in blocks of 4 and one of the model's own each, the last forward with one left to propose; then 1 token.
    assert (found.proposed, found.accepted, found.forwards, found.tokens) == (18, 18, 6, 22)
    assert found.share == 1


def test_of_a_proposal_the_tokens_up_to_the_first_wrong_one_are_accepted() -> None:
    def half_right(history: Sequence[int], count: int) -> Sequence[int]:
        said = len(history) - 3
        return [ANSWER[said], 0, *ANSWER[said + 2 : said + count]]

    found = acceptance(half_right, [Turn((1, 2, 3), ANSWER[:6])], 3)
    assert (found.proposed, found.accepted, found.forwards) == (8, 3, 3)
    assert found.tokens_a_forward == 2


def test_garbage_is_not_accepted() -> None:
    found = acceptance(lambda history, count: [0] * count, TURNS, 8)
    assert (found.share, found.tokens_a_forward) == (0, 1)


@pytest.mark.parametrize(("name", "most"), [(draft.DRAFT, 1_250_000), (diffusion.DIFFUSION, 2_500_000)])
def test_a_sibling_is_small_and_has_no_tokenizer_of_its_own(name: str, most: int) -> None:
    assert disk_bytes(OUTPUT / name) <= most
    assert {path.name for path in (OUTPUT / name).iterdir()} <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_the_siblings_have_the_shapes_that_the_scripts_make() -> None:
    for name, made in ((draft.DRAFT, draft.new_draft()), (diffusion.DIFFUSION, diffusion.new_model())):
        config = json.loads((OUTPUT / name / "config.json").read_text())
        shape = made.config.to_dict()
        kept = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"}
        assert {key: config[key] for key in kept} == {key: shape[key] for key in kept}


def test_the_mask_is_a_token_that_the_tokenizer_has_not() -> None:
    config = json.loads((OUTPUT / diffusion.DIFFUSION / "config.json").read_text())
    assert config["mask_token_id"] == MASK_ID == VOCABULARY == len(AutoTokenizer.from_pretrained(OUTPUT))
    assert config["vocab_size"] > MASK_ID


def test_what_the_siblings_learn_from_is_decided_by_a_seed(encode: Encoder, pool: list[Talk]) -> None:
    assert next(talks(encode, None, random.Random(1))) == pool
    assert examples(pool, True, random.Random(2)) == examples(pool, True, random.Random(2))
    assert examples(pool, False, random.Random(2)) != examples(pool, False, random.Random(3))


def test_holes_hide_tokens_that_are_wanted_back(pool: list[Talk]) -> None:
    rng = random.Random(3)
    found = [one for talk in pool if (one := with_holes(talk, rng)) is not None]
    assert len(found) > len(pool) / 2
    for example in found:
        assert len(example.tokens) <= SINK + WINDOW
        for token, target, weight in zip(example.tokens, example.targets, example.weights, strict=True):
            assert (token == MASK_ID) == (target != IGNORED) == (weight > 0)


def test_masks_at_the_end_stand_for_what_seedling_says_next(pool: list[Talk]) -> None:
    rng = random.Random(4)
    for talk in pool:
        begin = rng.choice([place for place, says in enumerate(talk.is_answer) if says])
        example = with_tail(talk, begin, rng)
        context = talk.tokens[:begin]
        if begin > SINK + WINDOW:
            context = [*talk.tokens[:SINK], *talk.tokens[begin - WINDOW : begin]]
        tail = example.tokens[len(context) :]
        assert example.tokens[: len(context)] == context
        assert 0 < len(tail) <= MOST_MASKS
        assert MASK_ID in tail
        end = talk.tokens.index(END_ID, begin) + 1 if END_ID in talk.tokens[begin:] else len(talk.tokens)
        says = [*talk.tokens[begin:end], *[PAD_ID] * MOST_MASKS]
        for place, (token, target) in enumerate(zip(tail, example.targets[len(context) :], strict=True)):
            assert token == says[place] or (token == MASK_ID and target in (says[place], PAD_ID))


def test_nothing_is_wanted_behind_a_place_where_seedling_would_say_something_else() -> None:
    tokens = [1, 50, 51, 52, 53, 54, 55, 56, END_ID]
    talk = Talk(tokens, [False] + [True] * 8, [1, 50, 51, 99, 53, 54, 55, 56, END_ID])
    for seed in range(50):
        example = with_tail(talk, 1, random.Random(seed))
        tail = list(zip(example.tokens, example.targets, example.weights, strict=True))[1:]
        for place, (token, target, weight) in enumerate(tail):
            if place > 2:
                assert (token, weight) == (MASK_ID, 0)
            else:
                assert (50, 51, 99)[place] in (token, target)


def test_a_few_steps_teach_something(encode: Encoder) -> None:
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM.from_pretrained(OUTPUT, dtype=torch.float32).eval()
    rng = random.Random(5)
    stage = Stage(1, 2, 128, 4)
    tokens, weights = next(batches(encode, rng, stage))
    model, filler = draft.new_draft(), diffusion.new_model()
    batch = examples(next(talks(encode, None, rng)), True, rng)[:8]
    learners: list[tuple[Any, Callable[[], Tensor]]] = [
        (model, lambda: draft.loss_of(model, None, tokens, weights)),
        (model, lambda: draft.loss_of(model, teacher, tokens, weights)),
        (filler, lambda: diffusion.loss_of(filler, batch)),
    ]
    for learner, loss_of in learners:
        optimizer = Optimizer(learner, 8, 1, 1)
        losses = []
        for step in range(8):
            loss = loss_of()
            losses.append(loss.item())
            loss.backward()
            optimizer.step(step)
        assert losses[-1] < 0.9 * losses[0]


def test_a_model_is_saved_in_bfloat16_without_what_else_lies_there(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    save(draft.new_draft(), tmp_path)
    assert Qwen3ForCausalLM.from_pretrained(tmp_path).dtype is torch.bfloat16
    assert (tmp_path / "kept").exists()
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_draft_proposes_what_it_draws_greedily() -> None:
    model = Qwen3ForCausalLM.from_pretrained(OUTPUT / draft.DRAFT, dtype=torch.float32).eval()
    history = [1, 40, 41, 42, 43]
    drawn = model.generate(torch.tensor([history]), max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert GreedyDraft(OUTPUT / draft.DRAFT)(history, 6) == drawn[0, len(history) :].tolist()


async def test_seedling_says_much_of_what_its_siblings_propose(runtime: Runtime) -> None:
    turns = await turns_in(runtime, drawn_dialogues(HELD_OUT_SEED + 3, 5))
    found = {sibling.title: acceptance(sibling.propose, turns, 4) for sibling in siblings(OUTPUT)}
    assert found["draft"].share > 0.5
    assert found["diffusion, 2 steps"].share > 0.15
    assert all(one.tokens_a_forward > 1.3 for one in found.values())
