"""How many rows of a prompt run beside streams."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.pace import Pace

DECODE_ROWS = 4
SECONDS = st.floats(0.001, 10)


def learnt(decode_s: float, row_s: float) -> Pace:
    """What a machine teaches whose forwards take `decode_s`, and `row_s` more for each row of a prompt."""
    pace = Pace()
    for _ in range(50):
        pace.record(DECODE_ROWS, 0, decode_s)
        rows = pace.prefill_rows
        pace.record(DECODE_ROWS, rows, decode_s + rows * row_s)
    return pace


@given(decode_s=SECONDS, row_s=SECONDS)
def test_a_stream_waits_twice_as_long_at_most_unless_for_the_least_rows(decode_s: float, row_s: float) -> None:
    rows = learnt(decode_s, row_s).prefill_rows

    assert rows == 4 or decode_s + rows * row_s <= 2 * decode_s


@given(decode_s=SECONDS, row_s=SECONDS)
def test_most_of_what_a_stream_may_wait_is_used(decode_s: float, row_s: float) -> None:
    rows = learnt(decode_s, row_s).prefill_rows

    assert decode_s + (rows + 1) * row_s > 1.45 * decode_s


@given(decode_rows=st.integers(1, 250), row_s=SECONDS, step=st.sampled_from([1, 8, 32]))
def test_a_forward_is_filled_up_to_what_it_is_padded_to(decode_rows: int, row_s: float, step: int) -> None:
    pace = learnt(1.0, row_s)
    rows = pace.rows_beside(decode_rows, step, 256)

    assert decode_rows < rows <= min(decode_rows + pace.prefill_rows, 256)
    assert rows % step == 0 or not any(decode_rows + 4 <= size <= rows for size in range(step, 257, step))


def test_where_nothing_is_known_a_few_rows_run() -> None:
    pace = Pace()
    pace.record(0, 256, 3.0)
    pace.record(DECODE_ROWS, 8, 1.0)

    assert pace.prefill_rows == 32


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_rows_that_cost_nothing_are_not_limited_by_chance(seconds: float) -> None:
    pace = Pace()
    pace.record(DECODE_ROWS, 0, 0.5)
    pace.record(DECODE_ROWS, 16, seconds)

    assert pace.prefill_rows == 32


def test_a_machine_that_slows_down_is_followed() -> None:
    pace = learnt(0.1, 0.001)
    fast = pace.prefill_rows
    for _ in range(50):
        pace.record(DECODE_ROWS, pace.prefill_rows, 0.1 + pace.prefill_rows * 0.004)

    assert pace.prefill_rows == pytest.approx(fast / 4, abs=1)
