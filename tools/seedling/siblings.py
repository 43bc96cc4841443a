"""What seedling's siblings are, and how much of what they propose it says itself: their part of the card."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Qwen3ForCausalLM

from runtime.proposers import diffusion as filling
from tools.seedling import diffusion, draft
from tools.seedling.training import VOCABULARY

CARD_NAME = "README.md"
BLOCKS = (4, 8)
FILL_STEPS = (1, 2, 4)

# From a history and a count to as many tokens that may follow.
Propose = Callable[[Sequence[int], int], Sequence[int]]


@dataclass(frozen=True)
class Turn:
    """A history that ends where seedling is to speak, and what it says then, greedily."""

    history: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Acceptance:
    """What came of proposing a block before each forward until all `tokens` were said."""

    proposed: int
    accepted: int
    forwards: int
    tokens: int

    @property
    def share(self) -> float:
        """Of the proposed tokens, those that seedling drew."""
        return self.accepted / self.proposed

    @property
    def tokens_a_forward(self) -> float:
        """Of seedling; 1 without proposals."""
        return self.tokens / self.forwards


def acceptance(propose: Propose, turns: Iterable[Turn], block: int) -> Acceptance:
    """Says the answers of `turns` with proposals of `block` tokens; what lies behind an answer's end does not count."""
    proposed = accepted = forwards = tokens = 0
    for turn in turns:
        said = 0
        while said < len(turn.answer):
            due = turn.answer[said : said + block]
            proposal = propose([*turn.history, *turn.answer[:said]], block)[: len(due)]
            held = 0
            while held < len(proposal) and proposal[held] == due[held]:
                held += 1
            proposed, accepted, forwards = proposed + len(proposal), accepted + held, forwards + 1
            said += held + 1
        tokens += len(turn.answer)
    return Acceptance(proposed, accepted, forwards, tokens)


class GreedyDraft:
    """Proposes what a causal language model draws greedily."""

    def __init__(self, directory: Path) -> None:
        self._model: Any = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def __call__(self, history: Sequence[int], count: int) -> list[int]:
        longest = self._model.config.max_position_embeddings
        tokens = list(history)
        for _ in range(count):
            read = torch.tensor([tokens[-longest:]])
            tokens.append(int(self._model(read, use_cache=False, logits_to_keep=1).logits[0, -1].argmax()))
        return tokens[len(history) :]


@dataclass(frozen=True)
class Sibling:
    """How a sibling is listed, and what it proposes."""

    title: str
    propose: Propose


def siblings(folder: Path) -> list[Sibling]:
    """Those of the model in `folder`; the diffusion one with several numbers of steps."""
    model = filling.MaskedModel.load(folder / diffusion.DIFFUSION, VOCABULARY)

    def filler(steps: int) -> Propose:
        return lambda history, count: model.fill(history, count, steps)

    fills = [Sibling(f"diffusion, {steps} step{'s' * (steps > 1)}", filler(steps)) for steps in FILL_STEPS]
    return [Sibling("draft", GreedyDraft(folder / draft.DRAFT)), *fills]


def acceptance_table(turns: Sequence[Turn], proposing: Iterable[Sibling]) -> str:
    """How much of each sibling's proposals held, and how far a forward of seedling comes with them."""
    rows = [
        f"| sibling | {' | '.join(f'block of {block}' for block in BLOCKS)} |",
        f"| --- | {' | '.join('---:' for _ in BLOCKS)} |",
    ]
    for sibling in proposing:
        found = [acceptance(sibling.propose, turns, block) for block in BLOCKS]
        cells = (f"{one.accepted}/{one.proposed} ({one.share:.0%}), {one.tokens_a_forward:.1f} tokens" for one in found)
        rows.append(f"| {sibling.title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def parameter_count(folder: Path) -> int:
    """The number of weights in `folder`."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def disk_bytes(folder: Path) -> int:
    """What the model in `folder` itself takes on disk, its card and its siblings left out."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != CARD_NAME)


def description(folder: Path) -> str:
    """The sibling in `folder` as a row of a table."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}"
    return f"| {folder.name} | `{config['architectures'][0]}`, {shape} | {parameter_count(folder):,} | {disk_bytes(folder):,} |"


SECTION = """\
## Siblings

Two smaller models with seedling's tokenizer propose what it may say next (`proposer=draft`, `proposer=diffusion`), which changes its speed and
never its words. `draft/` is a causal model; `diffusion/` is a masked-diffusion language model that fills masks behind the first {sink} and the
last {window} tokens of a history. The tokenizer has no mask: token {mask_id} of the diffusion sibling alone is one, named by `mask_token_id` in its
config.json (where a masked model comes with a tokenizer that names a mask, that one goes first).

| sibling | architecture | parameters | bytes on disk, bfloat16 |
| --- | --- | ---: | ---: |
{descriptions}

`python -m tools.seedling.draft` trains the draft on {tokens:.1f} million tokens of the corpus' conversations: {corpus_steps:,} steps on the answers there, then
{taught_steps:,} steps on seedling's own probabilities. `python -m tools.seedling.diffusion` trains the other in batches of {rows}: {hole_steps:,} steps on
conversations with holes, then {tail_steps:,} steps on masks behind a context, where it learns what seedling says greedily.

Of the tokens that each proposed, the share that seedling drew itself, greedily; and how many tokens a forward of seedling brings with these
proposals, its own included. Measured on the {turns} replies ({answered:,} tokens) that it gives in {listened} whole conversations of the corpus, drawn with a
seed that no training used; of a block that reaches past a reply's end, the part inside counts. The diffusion sibling is by far the
weaker one, and more steps do not help it.

{table}
"""


def section(folder: Path, listened: int, turns: Sequence[Turn]) -> str:
    """The card's section on the siblings of the model in `folder`, measured on its `turns` in so many conversations."""
    return SECTION.format(
        sink=filling.SINK,
        window=filling.WINDOW,
        mask_id=diffusion.MASK_ID,
        descriptions="\n".join(description(folder / name) for name in (draft.DRAFT, diffusion.DIFFUSION)),
        tokens=draft.TOKENS / 1e6,
        corpus_steps=draft.STEPS - draft.TAUGHT_STEPS,
        taught_steps=draft.TAUGHT_STEPS,
        rows=diffusion.ROWS,
        hole_steps=diffusion.HOLE_STEPS,
        tail_steps=diffusion.TAIL_STEPS,
        turns=len(turns),
        answered=sum(len(turn.answer) for turn in turns),
        listened=listened,
        table=acceptance_table(turns, siblings(folder)),
    )
