"""The simulation of many servers: what it counts adds up, and what happens to servers shows."""

from __future__ import annotations

import pytest

from bench.simulation import MACHINES, SCENARIOS, row_of, simulated

SERVERS, SESSIONS, MINUTES, LEASE_S = 6, 900, 6, 10.0


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_turn_finds_its_slab_or_fetches_it_or_reads_again(scenario: str, machine: str) -> None:
    seen = simulated(scenario, MACHINES[machine], SERVERS, SESSIONS, MINUTES, LEASE_S)

    counts = seen.counts
    answered = sum(map(len, seen.first_token_s))
    served = counts["hits"] + counts["restored"] + counts["read again"]
    # Those that are under way at the end have begun and not ended.
    assert 0 < answered <= counts["turns"] - counts["turns begun again"]
    assert answered <= served <= counts["turns"]
    assert (counts["turns begun again"] > 0) == (scenario == "zone lost")
    assert set(row_of(seen, MACHINES[machine], MINUTES)) >= {"moves", "99.9 %"}


def test_the_same_seed_gives_the_same_run_and_no_lease_is_waited_for_while_all_is_quiet() -> None:
    first, second = (simulated("quiet", MACHINES["int8"], SERVERS, SESSIONS, MINUTES, LEASE_S) for _ in range(2))

    assert first.counts == second.counts
    assert first.counts["turns that waited for a lease"] == 0


def test_a_run_of_one_minute_has_a_line_of_the_table_too() -> None:
    seen = simulated("quiet", MACHINES["int8"], SERVERS, SESSIONS, 1, LEASE_S)

    assert row_of(seen, MACHINES["int8"], 1)["99.9 %"] == "0.0"
