"""`docs/recordings.md`: what recorded agents cost here, beside reading everything again. `just recordings` writes it."""

from __future__ import annotations

from pathlib import Path

import trio

from tests import templates
from tests.api.recordings import AGENTS
from tests.api.replaying import Turn, replayed

_PAGE = Path(__file__).parents[2] / "docs" / "recordings.md"
_HEAD = """# What agents cost

Recordings of agents are sent again, over real sockets, to a server whose model answers as the recorded one did (`just recordings`
writes this page; `tests/api/test_recordings.py` checks each request). Tokens are seedling's, and descriptions of tools are
cut in the recordings: only the shares mean something. Where more was read than was new, the test names the request and why.

| agent | requests | tokens of their prompts | of these read | share |
| --- | --- | --- | --- | --- |
"""


def _row(agent: str, turns: list[Turn]) -> str:
    prompts, read = sum(turn.prompt for turn in turns), sum(turn.read for turn in turns)
    return f"| {agent} | {len(turns)} | {prompts:,} | {read:,} | {read / prompts:.1%} |\n"


def main() -> None:
    turns = {agent: [*trio.run(replayed, agent, templates.QWEN).values()] for agent in AGENTS}
    rows = "".join(_row(agent, its) for agent, its in turns.items())
    _PAGE.write_text(_HEAD + rows + _row("all", [turn for its in turns.values() for turn in its]))


if __name__ == "__main__":
    main()
