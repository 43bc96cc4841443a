"""Metrics that are more than prometheus_client's own."""

from __future__ import annotations

from runtime.metrics import RECENT_TURNS, Metrics, TurnTime


def test_the_last_turns_are_kept_in_their_order_and_all_are_counted() -> None:
    metrics = Metrics()
    turns = [TurnTime("ours", length, 0.5) for length in range(RECENT_TURNS + 7)]

    for turn in turns:
        metrics.record_turn(turn)

    assert metrics.turns == tuple(turns[7:])
    assert metrics.registry.get_sample_value("perennial_time_to_first_token_seconds_count") == len(turns)


def test_the_count_of_generated_tokens_is_what_the_counter_says() -> None:
    metrics = Metrics()
    assert metrics.generated_token_count == 0

    metrics.generated_tokens_total.inc(3)

    assert metrics.generated_token_count == 3
