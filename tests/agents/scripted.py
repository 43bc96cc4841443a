"""A model that says what a script tells it. It reads the conversation in its slab, as any model does, and nothing else."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from transformers import AutoTokenizer

from runtime import Token
from runtime.engine import EngineFacts
from runtime.engine.torch_slab import as_torch
from runtime.models import SEEDLING, find_model
from runtime.rows import Row, RowBatch
from runtime.slab import Slab
from runtime.text import Text
from tests.actors.engines import LedgerEngine

# In the manner of models that think and call tools; it writes no earlier turn anew.
TEMPLATE = """
{%- if tools -%}
{{- '<|im_start|>system\\nCall a tool by <tool_call>{"name": ..., "arguments": ...}</tool_call>.\\n' -}}
{%- for tool in tools -%}{{- tool | tojson ~ '\\n' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' -}}
{%- if message.reasoning_content -%}{{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n\\n' -}}{%- endif -%}
{{- message.content or '' -}}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first or message.content -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_CUE = "assistant\n"
# More than any agent here says in one test, its head with it.
_WINDOW = 2**18


@dataclass(frozen=True, slots=True)
class Line:
    """What the model says where `cue` was said or shown to it since its last turn."""

    cue: str
    says: str = ""
    thinks: str = ""
    calls: tuple[tuple[str, Mapping[str, object]], ...] = ()

    @property
    def text(self) -> str:
        """The whole turn as the template writes it, less its end."""
        thought = f"<think>\n{self.thinks}\n</think>\n\n" if self.thinks else ""
        calls = [
            f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
            for name, arguments in self.calls
        ]
        return thought + "\n".join([*filter(None, [self.says]), *calls])


def scripted_text() -> Text:
    """seedling's tokenizer with `TEMPLATE`."""
    directory = find_model(SEEDLING)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    return Text(tokenizer, Text.load(directory).eos_token_ids)


class ScriptedEngine(LedgerEngine):
    """Draws the turn of the first of its lines whose cue stands behind the model's last turn.

    What it draws is a function of the tokens that the slab holds, and it errs where they do not lie at their positions.
    """

    def __init__(self, script: Sequence[Line], text: Text) -> None:
        super().__init__(sink=4, window=_WINDOW, row_tile=256, layers=1)
        self._script = [*script, Line("", says="There is nothing to do.")]
        self._text = text
        (self._begin_turn,) = text.encode("<|im_start|>")
        self._open_turn = array("I", text.encode(f"<|im_start|>{_CUE}"))
        self._end_of_turn = text.encode("<|im_end|>")
        self._turn_after = lru_cache(maxsize=64)(self._turn_after_prompt)

    @property
    def facts(self) -> EngineFacts:
        return replace(super().facts, vocabulary=2048)

    def forward(self, batch: RowBatch) -> tuple[Token, ...]:
        for _, rows in groupby(batch.rows, key=lambda row: id(row.slab)):
            self._write_all([*rows])
        return tuple(Token(self._drawn(row.slab, row.position)) for row in batch.rows if row.draw is not None)

    def _write_all(self, rows: Sequence[Row]) -> None:
        slots = torch.tensor([self.spec.slot(row.position) for row in rows])
        keys = torch.tensor([[[float(row.token_id)] for row in rows]], dtype=torch.float64)
        values = torch.tensor([[[float(row.position)] for row in rows]], dtype=torch.float64)
        as_torch(rows[0].slab).write(0, slots, rows[-1].position + 1, keys, values)

    def _drawn(self, slab: Slab, position: int) -> int:
        held = as_torch(slab)
        length = position + 1
        assert length <= self.spec.visible, "the conversation is longer than the slab of this test"
        assert np.array_equal(held.values[0, 0, :length, 0].numpy(), np.arange(length)), "the slab holds something else"
        tokens = held.keys[0, 0, :length, 0].numpy().astype(np.uint32)
        begin = int(np.flatnonzero(tokens == self._begin_turn)[-1]) + len(self._open_turn)
        turn, said = self._turn_after(tokens[:begin].tobytes()), tokens[begin:].tolist()
        assert turn[: len(said)] == said, "the model is made to say what it did not"
        return turn[len(said)]

    def _turn_after_prompt(self, prompt: bytes) -> list[int]:
        tokens = array("I", prompt)
        turns = self._text.spelled(tokens).split("<|im_start|>")[:-1]
        begin = max((number for number, turn in enumerate(turns) if turn.startswith(_CUE)), default=-1) + 1
        new = "".join(turns[begin:])
        line = next(line for line in self._script if line.cue in new)
        return self._text.encode(line.text) + self._end_of_turn
