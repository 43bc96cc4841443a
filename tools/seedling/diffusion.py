"""Trains seedling's diffusion sibling: `python -m tools.seedling.diffusion` writes `runtime/seedling/diffusion`.

A masked-diffusion language model (arXiv 2406.07524, 2502.09992) that fills masks behind a context, taught by seedling: what
it learns to fill in is what seedling says when it draws greedily.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM, Qwen3ForCausalLM

from runtime.proposers.diffusion import SINK, WINDOW
from tools.seedling.corpus import conversations
from tools.seedling.training import END_ID, PAD_ID, VOCABULARY, Encoder, Optimizer, fit, run, save, seeded

DIFFUSION = "diffusion"
# The tokenizer has no mask: it is one more token of this model alone.
MASK_ID = VOCABULARY
MOST_MASKS = 24
# First whole conversations with holes, which teach much in each row, then what it is for: masks at the end.
HOLE_STEPS, TAIL_STEPS = 500, 700
STEPS = HOLE_STEPS + TAIL_STEPS
ROWS = 32
PEAK_RATE, WARM_UP, DECAY = 2e-3, 60, STEPS // 2
# Conversations that are read at once; their examples are dealt out in rows of about the same length.
POOL = 128
TAUGHT_ROWS = 16
LONGEST = 512
CUTS = 3
BEHIND_END_WEIGHT = 0.2
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A row with masks in it; a target and its weight for each token, `IGNORED` and 0 where none is wanted."""

    tokens: list[int]
    targets: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Talk:
    """The tokens of a conversation, where seedling speaks, and what it would say at each place."""

    tokens: list[int]
    is_answer: list[bool]
    greedy: list[int]


def new_model() -> ModernBertForMaskedLM:
    """The diffusion sibling's shape with random weights."""
    config = ModernBertConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        layer_types=["full_attention"] * 3,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")
        },
        bos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        mask_token_id=MASK_ID,
    )
    return ModernBertForMaskedLM(config)


def padded(rows: Sequence[list[int]], multiple: int) -> torch.Tensor:
    """The rows, filled up to the same length with the padding token."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[PAD_ID] * (length - len(row))] for row in rows])


def talks(encode: Encoder, teacher: Any | None, rng: random.Random) -> Iterator[list[Talk]]:
    """Conversations of the corpus, `POOL` at a time; without a teacher, seedling would say what they say."""
    sources = [conversations(rng, most_turns) for most_turns in (3, 3, 7, 20)]
    while True:
        encoded = sorted((encode(next(sources[index % 4])) for index in range(POOL)), key=lambda pair: len(pair[0]))
        pool = []
        for begin in range(0, POOL, TAUGHT_ROWS):
            part = encoded[begin : begin + TAUGHT_ROWS]
            said = [tokens[:LONGEST] for tokens, _ in part]
            greedy = said if teacher is None else likeliest(teacher, said)
            for tokens, (_, weights), would_say in zip(said, part, greedy, strict=True):
                pool.append(Talk(tokens, [weight == 1.0 for weight in weights[: len(tokens)]], would_say))
        yield pool


@torch.no_grad()
def likeliest(teacher: Any, rows: Sequence[list[int]]) -> list[list[int]]:
    """For each place of each row, what the teacher would say there after the tokens before it."""
    logits = teacher(input_ids=padded(rows, 64), use_cache=False).logits
    after: list[list[int]] = logits.argmax(-1).tolist()
    return [[PAD_ID, *line][: len(row)] for row, line in zip(rows, after, strict=True)]


def with_holes(talk: Talk, rng: random.Random) -> Example | None:
    """A piece of a conversation in which a share of each answer is masked, and a little of what users say."""
    length = SINK + WINDOW
    begin = rng.randrange(max(1, len(talk.tokens) - length + 1))
    tokens = talk.tokens[begin : begin + length]
    targets = [IGNORED] * len(tokens)
    ratio = 0.0
    for place in range(len(tokens)):
        says = talk.is_answer[begin + place]
        if says and (place == 0 or not talk.is_answer[begin + place - 1]):
            ratio = rng.random() if rng.random() < 0.8 else 0.0
        if rng.random() < (ratio if says else 0.05):
            targets[place], tokens[place] = tokens[place], MASK_ID
    weights = [1.0 if target != IGNORED else 0.0 for target in targets]
    return Example(tokens, targets, weights) if any(weights) else None


def with_tail(talk: Talk, begin: int, rng: random.Random) -> Example:
    """What seedling says from `begin` on, behind all that a fill looks at; masked are all of it or a random share.

    Where the corpus says something else than seedling would, nothing is known of what follows; behind the end of an
    answer comes the padding token.
    """
    count = rng.choice((4, 8, 16, rng.randint(1, MOST_MASKS)))
    tail: list[int] = []
    for place in range(begin, min(begin + count, len(talk.tokens))):
        tail.append(talk.greedy[place])
        if talk.greedy[place] != talk.tokens[place] or talk.greedy[place] == END_ID:
            break
    known = len(tail)
    is_ended = tail[-1] == END_ID
    weights = [1.0] * known + [BEHIND_END_WEIGHT if is_ended else 0.0] * (count - known)
    tail += [PAD_ID] * (count - known)
    ratio = 1.0 if rng.random() < 0.5 else rng.random()
    is_masked = [rng.random() < ratio or (place >= known and not is_ended) for place in range(count)]
    if not any(is_masked):
        is_masked[rng.randrange(count)] = True
    context = talk.tokens[:begin]
    if begin > SINK + WINDOW:
        context = [*talk.tokens[:SINK], *talk.tokens[begin - WINDOW : begin]]
    masked = [MASK_ID if hidden else token for hidden, token in zip(is_masked, tail, strict=True)]
    wanted = [token if hidden else IGNORED for hidden, token in zip(is_masked, tail, strict=True)]
    shares = [weight if hidden else 0.0 for hidden, weight in zip(is_masked, weights, strict=True)]
    nothing = len(context)
    return Example([*context, *masked], [IGNORED] * nothing + wanted, [0.0] * nothing + shares)


def examples(pool: Sequence[Talk], has_tails: bool, rng: random.Random) -> list[Example]:
    """What there is to learn from `pool`, the rows of a batch together and of about the same length."""
    found: list[Example] = []
    for talk in pool:
        if not has_tails:
            found += [one for _ in range(2) if (one := with_holes(talk, rng)) is not None]
            continue
        places = [place for place, says in enumerate(talk.is_answer) if says]
        cuts = min(len(places), CUTS * sum(token == END_ID for token in talk.tokens) // 2)
        found += [with_tail(talk, place, rng) for place in rng.sample(places, cuts)]
    found.sort(key=lambda example: len(example.tokens))
    parts = [found[begin : begin + ROWS] for begin in range(0, len(found) - ROWS + 1, ROWS)]
    rng.shuffle(parts)
    return [example for part in parts for example in part]


def batches(encode: Encoder, teacher: Any, rng: random.Random) -> Iterator[list[Example]]:
    """The batches of all steps."""
    for has_tails, steps in ((False, HOLE_STEPS), (True, TAIL_STEPS)):
        pools = talks(encode, teacher if has_tails else None, rng)
        done = 0
        while done < steps:
            dealt = examples(next(pools), has_tails, rng)
            for begin in range(0, len(dealt), ROWS):
                if done < steps:
                    yield dealt[begin : begin + ROWS]
                done += 1


def loss_of(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """The mean cross-entropy at the masks."""
    tokens = padded([example.tokens for example in batch], 16)
    length = tokens.shape[1]
    lengths = torch.tensor([len(example.tokens) for example in batch])
    targets = torch.tensor([[*one.targets, *[IGNORED] * (length - len(one.targets))] for one in batch]).flatten()
    weights = torch.tensor([[*one.weights, *[0.0] * (length - len(one.weights))] for one in batch]).flatten()
    wanted = weights.nonzero().squeeze(1)
    attended = (torch.arange(length) < lengths.unsqueeze(1)).long()
    hidden = model.model(input_ids=tokens, attention_mask=attended).last_hidden_state.flatten(0, 1)[wanted]
    losses = cross_entropy(model.decoder(model.head(hidden)), targets[wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights[wanted].sum()


def train_diffusion(seedling: Path, threads: int) -> None:
    """Trains the diffusion sibling of the model in `seedling` and leaves it in a folder there."""
    rng = seeded(threads, 3)
    encode = Encoder(AutoTokenizer.from_pretrained(seedling))
    teacher = Qwen3ForCausalLM.from_pretrained(seedling, dtype=torch.float32).eval()
    model = new_model().train()
    # On a processor without bfloat16, Muon takes longer than such a small model itself.
    optimizer = Optimizer(model, STEPS, WARM_UP, DECAY, PEAK_RATE, has_muon=False)
    losses = (loss_of(model, batch) for batch in batches(encode, teacher, rng))
    fit(losses, optimizer, STEPS, partial(save, model, seedling / DIFFUSION))


if __name__ == "__main__":
    run(train_diffusion, __doc__)
