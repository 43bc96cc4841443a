"""Two thousand turns of a model most of whose layers are recurrent: its state neither grows nor is read again after a crash."""

from __future__ import annotations

import re
import signal
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx
import pytest
from transformers import Qwen3_5TextConfig

from api.client import connect
from bench.marathon import SINK, WINDOW, Conversation, Length, Script
from bench.servers import serving
from runtime import Settings
from runtime.models import find_model
from runtime.text import Text
from tests.conftest import HYBRID, SMALL, save_random_model
from tests.contract.servers import free_port

pytestmark = pytest.mark.soak

# Attention in every fourth layer is what the configuration itself makes of their number.
LAYERS = {"num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 256}
SHAPE = Qwen3_5TextConfig(**SMALL | {name: value for name, value in HYBRID.items() if name != "layer_types"} | LAYERS)
LENGTH = Length(turns=2_000, appended=47, generated=4)
TENTH = LENGTH.turns // 10
SAVED_AT = LENGTH.turns - TENTH // 4
FORKS = 4


async def test_two_thousand_turns_of_a_hybrid_cost_the_same_and_outlive_a_crash(
    tmp_path: Path, record: Callable[[str, str], None]
) -> None:
    assert SHAPE.layer_types.count("full_attention") == LAYERS["num_hidden_layers"] // 4
    model = save_random_model(SHAPE, tmp_path / "model")
    script = Script(Text.load(find_model(str(model))), LENGTH)
    http = f"127.0.0.1:{free_port()}"
    settings = Settings(
        model=str(model),
        device="cpu",
        sink=SINK,
        window=WINDOW,
        capacity=FORKS + 2,
        max_concurrent=1,
        idle_ttl_s=0.0,
        state_dir=str(tmp_path / "state"),
    )

    async with serving(settings, dies=True) as (address, process), connect(address) as client:
        session, short_session = [await client.create_session() for _ in range(2)]
        whole, short = (Conversation(one, process, script, LENGTH) for one in (session, short_session))
        await short.go_on(TENTH)
        await whole.go_on(LENGTH.turns - TENTH)
        snapshot_id = ""
        # Turns of the second tenth take turns with those of the last, for a machine changes its pace within minutes.
        for number in range(LENGTH.turns - TENTH, LENGTH.turns):
            if number == SAVED_AT:
                snapshot_id = (await session.save()).snapshot_id
            for conversation in (short, whole) if number % 2 else (whole, short):
                await conversation.go_on(1)
        process.send_signal(signal.SIGKILL)

    run = whole.run
    async with serving(settings, "--bind", http) as (address, process), connect(address) as client:
        restored = await client.restore_session(snapshot_id)
        sessions = [restored, *[await restored.fork() for _ in range(FORKS)]]
        assert await rows_run(http) == 0
        for one in sessions:
            again = Conversation(one, process, script, LENGTH, first=SAVED_AT)
            await again.go_on(LENGTH.turns - SAVED_AT)
            assert again.run.said == run.said[SAVED_AT:]
        # The row that a generation begins with runs once more, for what is drawn from it.
        turns = LENGTH.turns - SAVED_AT
        assert await rows_run(http) == len(sessions) * (run.history[-1] - run.history[SAVED_AT - 1] + turns)
        woken = client.find_session(session.id)
        assert (await woken.info()).history_length == run.history[-1]
        both = [Conversation(one, process, script, LENGTH, first=LENGTH.turns) for one in (woken, sessions[-1])]
        for conversation in both:
            await conversation.go_on(1)
        assert both[0].run.said == both[1].run.said

    early, late = (run.live_bytes[bisect_left(run.history, length)] for length in (1_000, 100_000))
    assert early == late == max(run.live_bytes)
    beside = [last / second for last, second in zip(run.seconds[-TENTH:], short.run.seconds[-TENTH:], strict=True)]
    record(
        f"{LENGTH.turns} turns ({run.history[-1]} tokens) of a random hybrid of {LAYERS['num_hidden_layers']} layers, every "
        f"fourth attention; saved at turn {SAVED_AT}, `kill -9` at the end, restored, forked into {FORKS}",
        f"the same tokens in all {FORKS + 1}, 0 rows run before their first turn; the killed session goes on with those of a "
        f"fork; {early} bytes at 1,000 tokens and {late} at 100,000; a turn of the first tenth "
        f"{1e3 * median(run.seconds[:TENTH]):.0f} ms, of the last {1e3 * median(run.seconds[-TENTH:]):.0f}, of the last over "
        f"one of the second beside it {median(beside):.2f}",
    )


async def rows_run(http: str) -> int:
    """How many rows a server has run since its start."""
    async with httpx.AsyncClient(base_url=f"http://{http}") as client:
        text = (await client.get("/metrics")).text
    found = re.search(r"^perennial_forward_rows_sum (\S+)$", text, re.M)
    return int(float(found[1])) if found else 0
