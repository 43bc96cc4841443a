"""The steps that the trainers of seedling and its siblings share: rows of the corpus, the optimizer, the loop, saving."""

import argparse
import itertools
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tools.seedling.corpus import Message, conversations

OUTPUT = Path(__file__).parents[2] / "runtime" / "seedling"
SEED = 20
PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, TURN_ID, END_ID = range(3)
VOCABULARY = 2048
SINK = 4
USER_WEIGHT = 0.2
PEAK_RATE = 3e-3
SAVE_SECONDS = 180


@dataclass(frozen=True)
class Stage:
    """A run of steps on rows of one length, with conversations of up to about `most_turns` exchanges."""

    steps: int
    rows: int
    length: int
    most_turns: int


def new_model(**sizes: int) -> Qwen3ForCausalLM:
    """Seedling's shape with random weights, or one of other `sizes`."""
    shape = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-6,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        **shape | sizes,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.do_sample = False
    return model


class Encoder:
    """Token ids of conversations, with the loss weight of each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._headers = {role: [TURN_ID, *self._ids(f"{role}\n")] for role in ("system", "user", "assistant")}
        self._newline = self._ids("\n")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def __call__(self, talk: list[Message]) -> tuple[list[int], list[float]]:
        """The tokens of `talk` as the chat template writes them, then the padding token; one weight for each."""
        tokens: list[int] = []
        weights: list[float] = []
        for message in talk:
            header, body = self._headers[message["role"]], [*self._ids(message["content"]), END_ID]
            tokens += [*header, *body, *self._newline]
            weight = 1.0 if message["role"] == "assistant" else USER_WEIGHT
            weights += [USER_WEIGHT] * len(header) + [weight] * len(body) + [USER_WEIGHT] * len(self._newline)
        return [*tokens, PAD_ID], [*weights, USER_WEIGHT]


def packed_rows(encode: Encoder, rng: random.Random, stage: Stage) -> Iterator[tuple[list[int], list[float]]]:
    """Rows of `stage.length + 1` tokens: whole conversations, then the head of the one that starts the next row."""
    room = stage.length + 1
    tokens: list[int] = []
    weights: list[float] = []
    for talk in conversations(rng, stage.most_turns):
        more, more_weights = encode(talk)
        if len(more) > room:
            # What a session's cache keeps of a long history: its first tokens and its last.
            more = more[:SINK] + more[SINK - room :]
            more_weights = more_weights[:SINK] + more_weights[SINK - room :]
        tokens, weights = tokens + more, weights + more_weights
        if len(tokens) >= room:
            yield tokens[:room], weights[:room]
            tokens, weights = more, more_weights


def batches(encode: Encoder, rng: random.Random, stage: Stage) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and loss weights, both [rows, length + 1]."""
    rows = packed_rows(encode, rng, stage)
    while True:
        taken = list(itertools.islice(rows, stage.rows))
        yield torch.tensor([tokens for tokens, _ in taken]), torch.tensor([weights for _, weights in taken])


def staged_batches(
    encode: Encoder, rng: random.Random, stages: Iterable[Stage]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of all steps of each stage."""
    for stage in stages:
        yield from itertools.islice(batches(encode, rng, stage), stage.steps)


def learning_rate(step: int, steps: int, warm_up: int, decay: int) -> float:
    """The share of the peak rate at `step` of `steps`: a warm-up, a plateau, and a fall to nearly nothing."""
    rising = min(1.0, (step + 1) / warm_up)
    left = min(1.0, (steps - step) / decay)
    return rising * (0.02 + 0.98 * (1 - math.cos(math.pi * left)) / 2)


class Optimizer:
    """Muon for the matrices and AdamW for the rest, or AdamW for all, on one schedule."""

    def __init__(
        self,
        model: torch.nn.Module,
        steps: int,
        warm_up: int,
        decay: int,
        rate: float = PEAK_RATE,
        has_muon: bool = True,
    ) -> None:
        self._weights = list(model.parameters())
        self._rate = rate
        self._schedule = (steps, warm_up, decay)
        matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
        others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            if has_muon
            else torch.optim.AdamW(matrices, lr=rate, betas=(0.9, 0.95), weight_decay=0.1),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, step: int) -> None:
        """Changes the weights by their gradients, and clears these."""
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rate * learning_rate(step, *self._schedule)
            optimizer.step()
            optimizer.zero_grad()


def save(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Leaves model and tokenizer in `folder`, in bfloat16; whatever else lies there stays."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    rounded = type(model)(model.config)
    rounded.load_state_dict(model.state_dict())
    if model.can_generate():
        rounded.generation_config = model.generation_config
    rounded.to(torch.bfloat16).save_pretrained(fresh)
    if tokenizer is not None:
        tokenizer.save_pretrained(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    for path in fresh.iterdir():
        path.replace(folder / path.name)
    fresh.rmdir()


def seeded(threads: int, stream: int) -> random.Random:
    """Seeds torch, and gives the generator of the corpus that this trainer reads: each has a `stream` of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    return random.Random(SEED + stream)


def fit(losses: Iterable[torch.Tensor], optimizer: Optimizer, steps: int, save_model: Callable[[], None]) -> None:
    """Goes down each of so many losses, which are computed one after the other; saves every few minutes and at the end."""
    started = saved = time.monotonic()
    mean: float | None = None
    for step, loss in enumerate(itertools.islice(losses, steps), 1):
        loss.backward()
        optimizer.step(step - 1)
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps} loss {mean:.3f} seconds {time.monotonic() - started:.0f}", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS or step == steps:
            save_model()
            saved = time.monotonic()


def run(train: Callable[[Path, int], None], words: str | None) -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("--seedling", type=Path, default=OUTPUT, help="folder of the model (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    train(arguments.seedling, arguments.threads)
