"""Simulated time: what happens in which order, and who waits for a place."""

from __future__ import annotations

from bench.simulated_time import Clock, Places, Steps


def test_things_happen_in_the_order_of_their_moments_and_then_of_asking() -> None:
    clock = Clock()
    seen: list[tuple[float, str]] = []

    def go(name: str, *waits_s: float) -> Steps[None]:
        for wait_s in waits_s:
            yield wait_s
            seen.append((clock.now, name))

    clock.begin(go("first", 2.0, 3.0))
    clock.begin(go("second", 1.0, 1.0, 4.0))
    clock.run(6.0)

    assert seen == [(1.0, "second"), (2.0, "first"), (2.0, "second"), (5.0, "first")]
    assert clock.now == 6.0


def test_who_finds_no_place_waits_and_the_first_that_waits_is_the_first_that_is_served() -> None:
    clock, places = Clock(), Places(2)
    began: list[tuple[float, str]] = []

    def use(name: str) -> Steps[None]:
        yield places
        began.append((clock.now, name))
        yield 5.0
        clock.give_back(places)

    for name in "abcd":
        clock.begin(use(name))
    clock.run(100.0)

    assert began == [(0.0, "a"), (0.0, "b"), (5.0, "c"), (5.0, "d")]
