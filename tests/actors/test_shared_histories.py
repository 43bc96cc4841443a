"""What several clients see of a session while servers take it from each other, clocks jump, and the store fails or is late."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count, cycle

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from actors import Runtime
from runtime.durable import SharedStore
from runtime.errors import CapacityExhausted, HistoryMismatch, SessionMoved, StorageFailed
from tests.actors.engines import LedgerEngine, open_lab
from tests.actors.test_durable import ENGINE, MODEL
from tests.reference.linearizable import Appended, Call, Refused, Seen, digest_of, is_linearizable
from tests.runtime.durable.buckets import Fault, FaultyObjects

SERVERS = 3
LEASE_S = 1000.0


@dataclass(frozen=True)
class Step:
    """What a client does next: at which server, and how many tokens it appends."""

    kind: str
    server: int
    tokens: int


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["append", "append", "append", "append", "info", "jump", "jump", "arrive"]),
        st.integers(0, SERVERS - 1),
        st.integers(1, 3),
    ),
    min_size=4,
    max_size=8,
)


@dataclass
class World:
    """Servers on one bucket, and what their clients have seen of one session."""

    faults: dict[int, Fault]
    passes: list[int]
    token: trio.lowlevel.TrioToken | None = None
    session_id: str = ""
    servers: list[Runtime] = field(default_factory=list)
    objects: list[FaultyObjects] = field(default_factory=list)
    clocks: list[float] = field(default_factory=lambda: [0.0] * SERVERS)
    calls: list[Call] = field(default_factory=list)
    moments: count[int] = field(default_factory=count)
    fresh: count[int] = field(default_factory=lambda: count(1))
    operations: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self._waits = cycle(self.passes)

    def fault(self, name: str, key: str) -> Fault | None:
        """What becomes of the next operation on the store, which others go before for some passes of the scheduler."""
        trio.from_thread.run(passes, next(self._waits), trio_token=self.token)
        return self.faults.get(next(self.operations)) if self.session_id else None


async def passes(number: int) -> None:
    for _ in range(number):
        await trio.lowlevel.checkpoint()


async def lived(world: World, clients: list[list[Step]]) -> None:
    bucket = MemoryStore()
    world.token = trio.lowlevel.current_trio_token()
    async with AsyncExitStack() as stack:
        for number in range(SERVERS):
            objects = FaultyObjects(bucket, world.fault)
            store = SharedStore(objects, MODEL, ENGINE, lease_s=LEASE_S, now=clock(world, number))
            world.objects.append(objects)
            world.servers.append(await stack.enter_async_context(open_lab(LedgerEngine(), store=store, capacity=2)))
        world.session_id = (await world.servers[0].create_session()).id
        async with trio.open_nursery() as nursery:
            for steps in clients:
                nursery.start_soon(act, world, steps)
        # In the end all is quiet, and somebody reads what there is.
        world.faults = {}
        world.clocks[0] = math.inf
        while not await looked(world, 0):
            pass


def clock(world: World, number: int) -> Callable[[], float]:
    return lambda: time.time() + world.clocks[number]


async def act(world: World, steps: list[Step]) -> None:
    length = 0
    for step in steps:
        match step.kind:
            case "append":
                length = await appended(world, step, length)
            case "info":
                await looked(world, step.server)
            case "jump":
                # Far enough to take every lease for lapsed, or none.
                world.clocks[step.server] = (2 * LEASE_S, -2 * LEASE_S, 0.0)[step.tokens - 1]
            case "arrive":
                for objects in world.objects:
                    await trio.to_thread.run_sync(objects.arrive)


async def appended(world: World, step: Step, expected: int) -> int:
    """Appends tokens that nobody else appends; the length that the client believes in from now on."""
    tokens = tuple(next(world.fresh) % 90 for _ in range(step.tokens))
    session = world.servers[step.server].find_session(world.session_id)
    began = next(world.moments)
    try:
        answer = await session.append(tokens, expected)
    except HistoryMismatch as error:
        length = int(str(error).split()[2].strip(","))
        world.calls.append(Call(began, next(world.moments), Refused(expected, length)))
        return length
    except (SessionMoved, CapacityExhausted):
        return expected
    except StorageFailed:
        world.calls.append(Call(began, math.inf, Appended(expected, tokens, None)))
        return expected
    world.calls.append(Call(began, next(world.moments), Appended(expected, tokens, answer.history_digest)))
    return answer.history_length


async def looked(world: World, server: int) -> bool:
    """Reads the whole history, by its digest."""
    began = next(world.moments)
    try:
        info = await world.servers[server].find_session(world.session_id).info()
    except (SessionMoved, StorageFailed, CapacityExhausted):
        return False
    world.calls.append(Call(began, next(world.moments), Seen(info.history_digest)))
    return True


@settings(max_examples=60)
@given(
    clients=st.lists(STEPS, min_size=2, max_size=3),
    faults=st.dictionaries(st.integers(0, 80), st.sampled_from(Fault), max_size=8),
    waits=st.lists(st.integers(0, 12), min_size=1, max_size=8),
)
def test_histories_are_linearizable_whoever_holds_a_session_and_whatever_fails(
    clients: list[list[Step]], faults: dict[int, Fault], waits: list[int]
) -> None:
    world = World(faults, waits)

    trio.run(lived, world, clients)

    assert is_linearizable(world.calls), world.calls


def test_the_search_finds_what_cannot_have_been() -> None:
    first, second = Appended(0, (1,), digest_of((1,))), Appended(0, (2,), digest_of((2,)))
    unheard = Appended(1, (3,), None)

    assert is_linearizable([Call(0, 1, first), Call(2, 3, Refused(0, 1)), Call(4, 5, Seen(digest_of((1,))))])
    assert is_linearizable([Call(0, 1, first), Call(2, math.inf, unheard), Call(3, 4, Seen(digest_of((1, 3))))])
    assert is_linearizable([Call(0, 1, first), Call(2, math.inf, unheard), Call(3, 4, Seen(digest_of((1,))))])
    # Acknowledged twice, lost, seen before it was asked for, and gone again.
    assert not is_linearizable([Call(0, 3, first), Call(1, 2, second)])
    assert not is_linearizable([Call(0, 1, first), Call(2, 3, Seen(digest_of(())))])
    assert not is_linearizable([Call(0, 1, Seen(digest_of((1,)))), Call(2, 3, first)])
    assert not is_linearizable(
        [
            Call(0, 1, first),
            Call(2, math.inf, unheard),
            Call(3, 4, Seen(digest_of((1, 3)))),
            Call(5, 6, Seen(digest_of((1,)))),
        ]
    )
