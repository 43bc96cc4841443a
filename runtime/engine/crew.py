"""Threads that work through one list of steps together, inside one call of a kernel.

The parts of a step are claimed one by one, by whichever thread is free, and no thread begins a step before the step before
it is whole. A thread that wakes late finds less to do, and one that has not begun holds nobody up. One that the system takes off
its core inside a part holds up the others, which offer their cores to it meanwhile, and do not sleep.

What a thread does with a part that it has claimed must not raise: the others would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Looks at a counter before a waiting thread offers its core to others: some 50 microseconds.
_LOOKS = 1000

_INT, _LONG = ir.IntType(32), ir.IntType(64)


class Crew:
    """Threads that sleep between calls. They end when this object is collected."""

    def __init__(self, threads: int) -> None:
        self._others = [ThreadPoolExecutor(1, "rows") for _ in range(threads - 1)]

    def run(self, work: Callable[[], object], most: int) -> None:
        """Calls `work` here and on other threads, on at most so many in all, which share out what is in it."""
        called = []
        try:
            for other in self._others[: max(0, most - 1)]:
                called.append(other.submit(work))
            work()
        finally:
            for one in called:
                # Who has not begun need not, and no one goes on after this.
                if not one.cancel():
                    one.exception()
        for one in called:
            if not one.cancelled():
                one.result()


def _place(context: Any, builder: Any, kind: Any, counters: Any, index: Any) -> Any:
    return builder.gep(cgutils.create_struct_proxy(kind)(context, builder, counters).data, [index])


@intrinsic
def count_up(typing: Any, counters: Any, index: Any) -> Any:
    """Adds 1 to one of `counters` [int64], and returns what it was. What was written before is seen by who sees the new count."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        place = _place(context, builder, counters, *given)
        return builder.atomic_rmw("add", place, ir.Constant(_LONG, 1), "acq_rel")

    return types.int64(counters, types.intp), generate


@intrinsic
def wait_for(typing: Any, counters: Any, index: Any, least: Any) -> Any:
    """Returns once one of `counters` is `least` or more."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        place = _place(context, builder, counters, *given[:2])
        pause, give_way = (
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, []), name)
            for kind, name in ((ir.VoidType(), "llvm.x86.sse2.pause"), (_INT, "sched_yield"))
        )
        looks = cgutils.alloca_once(builder, _LONG)
        builder.store(ir.Constant(_LONG, _LOOKS), looks)
        look, wait, offer, done = (builder.append_basic_block(name) for name in ("look", "wait", "offer", "done"))
        builder.branch(look)
        builder.position_at_end(look)
        builder.cbranch(builder.icmp_signed(">=", builder.load_atomic(place, "acquire", 8), given[2]), done, wait)
        builder.position_at_end(wait)
        builder.call(pause, [])
        left = builder.sub(builder.load(looks), ir.Constant(_LONG, 1))
        builder.store(left, looks)
        builder.cbranch(builder.icmp_signed("<", left, ir.Constant(_LONG, 0)), offer, look)
        builder.position_at_end(offer)
        builder.call(give_way, [])
        builder.branch(look)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(counters, types.intp, types.int64), generate
