"""What scenarios make of what they measure, on small models and for a moment."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from actors import open_runtime
from bench import marathon, scheduling, speed
from bench.figures import figure
from bench.peers.speeds import PREFILL, decoding
from runtime.models import SEEDLING, find_model
from runtime.settings import Settings
from runtime.text import Text

ONE = decoding(1)
LENGTH = marathon.Length(turns=20, appended=40, generated=4)


@pytest.fixture(scope="module")
def script() -> marathon.Script:
    return marathon.Script(Text.load(find_model(SEEDLING)), LENGTH)


def test_ratios_are_of_what_both_sides_measured() -> None:
    everyone = {
        "strict": {ONE: figure("tokens/s", [2.0]), PREFILL: figure("tokens/s", [60.0])},
        "floor": {ONE: figure("tokens/s", [3.0])},
        "fast": {PREFILL: figure("tokens/s", [120.0])},
        "llama.cpp Q8_0": {ONE: figure("tokens/s", [9.0])},
    }

    medians = {name: ratio.median for name, ratio in speed.compared(everyone).items()}

    assert medians == {"a step of 1 stream over the floor's": 1.5, "prefill, strict over fast": 0.5}


def test_each_line_of_the_marathon_is_as_long_as_was_asked_for(script: marathon.Script) -> None:
    lengths = [len(script.tokens(number)) for number in range(LENGTH.turns)]

    assert all(abs(length - LENGTH.appended) <= 2 for length in lengths[1:])


async def test_streams_and_an_append_beside_them_leave_no_session() -> None:
    async with open_runtime(Settings(capacity=5, max_concurrent=1, window=60)) as runtime:
        streaming, pace = await scheduling.streaming_while(runtime, partial(speed.prefill, runtime, 64))

        assert pace > 0
        assert streaming.gaps_ms
        assert min(streaming.gaps_ms) > 0
        assert runtime.load().slab_in_use == 0


@pytest.mark.door
def test_a_marathon_fills_its_window_and_no_more(script: marathon.Script) -> None:
    settings = Settings(sink=4, window=60, capacity=2, max_concurrent=1)

    run, short = trio.run(marathon.our_runs, settings, script, LENGTH)

    assert len(run.seconds) == len(run.resident) == LENGTH.turns
    assert len(short.seconds) == 2 * (LENGTH.turns // 10)
    assert run.history[-1] > 10 * (settings.sink + settings.window)
    assert marathon.our_figures(run, short, settings)["kv_live_bytes once full, most over least"].median == 1
