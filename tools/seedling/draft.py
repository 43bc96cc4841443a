"""Trains seedling's draft: `python -m tools.seedling.draft` writes `runtime/seedling/draft`, a smaller model taught by seedling.

It learns the answers in the corpus' conversations first, as seedling did; then, at the same places, seedling's own
probabilities, so that it proposes what seedling says and not what else might be said (arXiv 2310.08461).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, softmax
from transformers import AutoTokenizer, Qwen3ForCausalLM

from tools.seedling.training import Encoder, Optimizer, Stage, fit, new_model, run, save, seeded, staged_batches

DRAFT = "draft"
CORPUS_STAGES = (Stage(400, 24, 256, 7),)
# A step costs twice as much with the teacher.
TAUGHT_STAGES = (Stage(160, 24, 256, 7), Stage(30, 6, 1024, 36))
STAGES = CORPUS_STAGES + TAUGHT_STAGES
STEPS = sum(stage.steps for stage in STAGES)
TAUGHT_STEPS = sum(stage.steps for stage in TAUGHT_STAGES)
TOKENS = sum(stage.steps * stage.rows * stage.length for stage in STAGES)
WARM_UP, DECAY = 50, STEPS // 2


def new_draft() -> Qwen3ForCausalLM:
    """The draft's shape with random weights."""
    return new_model(hidden_size=128, intermediate_size=288, num_hidden_layers=2, head_dim=32)


def loss_of(model: Any, teacher: Any | None, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy over what seedling says, with the corpus' tokens or with the teacher's probabilities."""
    is_answer = weights[:, 1:] == 1.0
    read = tokens[:, :-1]
    if teacher is None:
        wanted = tokens[:, 1:][is_answer]
    else:
        with torch.no_grad():
            wanted = softmax(
                teacher.lm_head(teacher.model(input_ids=read, use_cache=False).last_hidden_state[is_answer]), 1
            )
    return cross_entropy(
        model.lm_head(model.model(input_ids=read, use_cache=False).last_hidden_state[is_answer]), wanted
    )


def train_draft(seedling: Path, threads: int) -> None:
    """Trains the draft of the model in `seedling` and leaves it in a folder there."""
    rng = seeded(threads, 2)
    encode = Encoder(AutoTokenizer.from_pretrained(seedling))
    teacher = Qwen3ForCausalLM.from_pretrained(seedling, dtype=torch.float32).eval()
    model = new_draft().train()

    def losses() -> Iterator[torch.Tensor]:
        for stages, taught_by in ((CORPUS_STAGES, None), (TAUGHT_STAGES, teacher)):
            for tokens, weights in staged_batches(encode, rng, stages):
                yield loss_of(model, taught_by, tokens, weights)

    fit(losses(), Optimizer(model, STEPS, WARM_UP, DECAY), STEPS, partial(save, model, seedling / DRAFT))


if __name__ == "__main__":
    run(train_draft, __doc__)
