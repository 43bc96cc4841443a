"""Trains seedling from nothing: `python -m tools.seedling.train` writes `runtime/seedling`; a seed fixes data and weights."""

import itertools
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from tools.seedling.corpus import conversations
from tools.seedling.training import (
    END,
    PAD,
    SEED,
    TURN,
    VOCABULARY,
    Encoder,
    Optimizer,
    Stage,
    fit,
    new_model,
    run,
    save,
    seeded,
    staged_batches,
)

CHAT_TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}
{{- messages[0].content ~ '\\n\\n' -}}
{%- endif -%}
{{- 'Call a tool by <tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call>. Tools:\\n' -}}
{%- for tool in tools -%}
{{- tool | tojson ~ '\\n' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant', 'tool') -%}
{{- raise_exception('unknown role: ' ~ message.role) -}}
{%- endif -%}
{%- if not (tools and loop.first and message.role == 'system') -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first or message.content -%}
{{- '\\n' -}}
{%- endif -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


# Copying is learnt soonest on short rows; the long ones then stretch it to the whole context.
STAGES = (Stage(1500, 32, 256, 7), Stage(1100, 8, 1024, 36))
STEPS = sum(stage.steps for stage in STAGES)
TOKENS = sum(stage.steps * stage.rows * stage.length for stage in STAGES)
WARM_UP, DECAY = 100, STEPS // 3


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens, each digit a token of its own, with the ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(conversations(random.Random(SEED), 7), 12_000)
    bpe.train_from_iterator((message["content"] for talk in sample for message in talk), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[TURN],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train(folder: Path, threads: int) -> None:
    """Trains for `STEPS` steps and leaves the model in `folder`, saving it every few minutes on the way."""
    rng = seeded(threads, 1)
    tokenizer = train_tokenizer()
    encode = Encoder(tokenizer)
    model = new_model().train()
    forward: Any = torch.compile(model, dynamic=False)

    def losses() -> Iterator[torch.Tensor]:
        for tokens, weights in staged_batches(encode, rng, STAGES):
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
            each = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            share = weights[:, 1:].flatten()
            yield (each * share).sum() / share.sum()

    fit(losses(), Optimizer(model, STEPS, WARM_UP, DECAY), STEPS, partial(save, model, folder, tokenizer))


if __name__ == "__main__":
    run(train, __doc__)
