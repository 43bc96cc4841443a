"""A thousand servers on one store, and a million sessions that take turns as agents do, in simulated time.

`python -m bench.simulation` gives the tables and the plot of docs/simulation.md. What a server does follows our protocol: strict
routing by session, a lease that lapses, slabs left when idle, and a history read again where none was left. Times and sizes are
those of a machine and a model that are stated, not measured.
"""

from __future__ import annotations

import argparse
import bisect
import math
import random
import resource
import time
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.simulated_time import Clock, Places, Steps, many_objects
from runtime.durable.shared import GROUP_S

SCENARIOS = ("quiet", "growth", "zone lost", "rolling upgrade")
PART_BYTES = 8 * 2**20
SEGMENTS = 64
# On the ring, for each server.
POINTS = 64
# Dollars a million, as S3 takes them.
PUT, GET = 5.0, 0.4
# And for a gigabyte that lies there for an hour.
KEPT_GB = 0.023 / 730


@dataclass(frozen=True)
class Machine:
    """What a server can do. A slab's bytes are those of the tokens it holds; links to the store carry one thing at a time."""

    name: str
    slabs: int
    streams: int
    prefill_tokens_s: float
    token_s: float
    link_bytes_s: float
    token_bytes: int = 114_688
    window: int = 8192
    request_s: float = 0.02
    takes_the_quicker: bool = False
    """Whether it reads a history again where that is quicker than to fetch its slab. Ours does not, as yet."""


# Slabs of 64 GB on a card, and 20 Gbit/s to the store; the same with keys and values in 8 bits; and the first one, choosing.
BF16 = Machine("bf16", slabs=64, streams=48, prefill_tokens_s=20_000, token_s=0.015, link_bytes_s=2.5e9)
MACHINES = {
    "bf16": BF16,
    "int8": replace(BF16, name="int8", slabs=128, token_bytes=57_344),
    "bf16, choosing": replace(BF16, name="bf16, choosing", takes_the_quicker=True),
}


@dataclass(eq=False, slots=True)
class Server:
    """One replica: its slabs by last use, its streams, and when its links and its engine's prefill are free."""

    streams: Places
    is_up: bool = True
    died_at: float = -1.0
    slabs: OrderedDict[Session, None] = field(default_factory=OrderedDict)
    down_free: float = 0.0
    up_free: float = 0.0
    prefill_free: float = 0.0


@dataclass(eq=False, slots=True)
class Session:
    key: int
    history: int
    in_slab: int = 0
    in_store: int = 0
    segments: int = 0
    holder: Server | None = None
    is_released: bool = True
    written_at: float = -1e9
    turns_left: float = float("inf")


@dataclass
class Seen:
    """What happened, by minutes where it says so."""

    first_token_s: list[array[float]]
    counts: Counter[str] = field(default_factory=Counter)
    bytes_up: list[float] = field(default_factory=list)
    bytes_down: list[float] = field(default_factory=list)
    bytes_kept: float = 0.0

    def at(self, minute: int, first_token_s: float) -> None:
        self.first_token_s[min(minute, len(self.first_token_s) - 1)].append(first_token_s)


class Fleet:
    """All servers, the ring that sends a session to one of those that are up, and all sessions."""

    def __init__(
        self, machine: Machine, servers: int, minutes: int, lease_s: float, points: int = POINTS, seed: int = 0
    ) -> None:
        self.machine = machine
        self.minutes = minutes
        self.lease_s = lease_s
        self.chance = random.Random(seed)
        self.clock = Clock()
        self.sessions: list[Session] = []
        self.servers = [Server(self.new_streams()) for _ in range(servers)]
        ring = sorted((self.chance.random(), number) for number in range(servers) for _ in range(points))
        self._places = [place for place, _ in ring]
        self._owners = [number for _, number in ring]
        self.seen = Seen([array("d") for _ in range(minutes)], bytes_up=[0.0] * minutes, bytes_down=[0.0] * minutes)

    def serving(self, session: Session) -> Server:
        """Where the ring sends a session: the next server along it that is up."""
        at = bisect.bisect(self._places, (session.key * 0x9E3779B97F4A7C15 % 2**64) / 2**64)
        while not (server := self.servers[self._owners[at % len(self._owners)]]).is_up:
            at += 1
        return server

    def new_streams(self) -> Places:
        return Places(self.machine.streams)

    # What sessions do

    def rest_of_a_pause_s(self) -> float:
        """To the next turn of a session that is met at any moment: mostly in the longest pauses, and in the midst of them."""
        away, reading, tool = 0.1 * 1800, 0.3 * math.exp(3.7 + 0.9**2 / 2), 0.6 * math.exp(1.8 + 0.8**2 / 2)
        draw = self.chance.random() * (away + reading + tool)
        if draw < away:
            return self.chance.expovariate(1 / 1800)
        mu, sigma = (3.7, 0.9) if draw < away + reading else (1.8, 0.8)
        return self.chance.random() * self.chance.lognormvariate(mu + sigma**2, sigma)

    def pause_s(self) -> float:
        """To a session's next turn: mostly a tool that runs, else a person who reads, at times one who is away."""
        draw = self.chance.random()
        if draw < 0.6:
            return self.chance.lognormvariate(1.8, 0.8)
        return self.chance.lognormvariate(3.7, 0.9) if draw < 0.9 else self.chance.expovariate(1 / 1800)

    def begin(self, session: Session, first_pause_s: float) -> None:
        self.sessions.append(session)
        self.clock.begin(self.live(session, first_pause_s))

    def live(self, session: Session, first_pause_s: float) -> Steps[None]:
        """The turns of a session, until all is over."""
        yield first_pause_s
        while session.turns_left > 0:
            asked = self.clock.now
            new = min(8000, int(self.chance.lognormvariate(5.7, 1.1)))
            drawn = min(2000, int(self.chance.lognormvariate(4.8, 0.8)))
            session.history += new
            while True:
                server = self.serving(session)
                began = self.clock.now
                first = yield from self.turn(session, server, new, drawn)
                if not began <= server.died_at <= self.clock.now:
                    break
                # It was killed meanwhile: the client asks again, which helps once the lease has lapsed.
                self.seen.counts["turns begun again"] += 1
                yield max(0.0, server.died_at + self.lease_s - self.clock.now)
            self.seen.at(int(asked // 60), first - asked)
            session.history += drawn
            session.in_slab = session.history
            session.turns_left -= 1
            pause_s = self.pause_s()
            self.idle(session, server, pause_s)
            if self.chance.random() < 0.03 and session.turns_left > 5:
                self.fork(session, server)
            yield pause_s

    def turn(self, session: Session, server: Server, new: int, drawn: int) -> Steps[float]:
        """One turn at a server; when it gave its first token."""
        counts, machine = self.seen.counts, self.machine
        counts["turns"] += 1
        if session.holder is not server and session.holder is not None:
            counts["moves"] += 1
            wait_s = session.written_at + self.lease_s - self.clock.now
            if wait_s > 0 and not session.is_released:
                counts["turns that waited for a lease"] += 1
                yield wait_s
        # Those of the server as it is now: one that begins anew has others.
        streams = server.streams
        yield streams
        held = yield from self.woken(session, server, session.history - new)
        began = max(self.clock.now, server.prefill_free)
        server.prefill_free = began + (session.history - held) / machine.prefill_tokens_s
        first = server.prefill_free + machine.token_s + machine.request_s
        yield first - self.clock.now + drawn * machine.token_s
        self.clock.give_back(streams)
        counts["HEAD"] += 2
        writes = 1 + math.ceil(drawn * machine.token_s / GROUP_S)
        counts["PUT"] += writes
        counts["tokens drawn"] += drawn
        gathered, session.segments = divmod(session.segments + writes, SEGMENTS)
        counts["PUT"] += gathered > 0
        session.written_at = self.clock.now
        return first

    def woken(self, session: Session, server: Server, known: int) -> Steps[int]:
        """How many of the tokens that the session had are in its slab, once there is one."""
        counts, machine = self.seen.counts, self.machine
        if session in server.slabs and session.holder is server:
            counts["hits"] += 1
            server.slabs.move_to_end(session)
            yield machine.request_s
            return session.in_slab
        counts["PUT"] += 2
        counts["GET"] += session.segments
        self.take(session, server)
        yield 3 * machine.request_s
        size, now = self.slab_bytes(session), self.clock.now
        fetched = max(now, server.down_free) + size / machine.link_bytes_s
        is_slower = fetched > max(now, server.prefill_free) + session.in_store / machine.prefill_tokens_s
        if not size or (is_slower and machine.takes_the_quicker):
            counts["read again"] += 1
            counts["tokens read again"] += known
            return 0
        server.down_free = fetched
        counts["restored"] += 1
        counts["GET"] += 1 + int(size // PART_BYTES)
        counts["quicker read again"] += is_slower
        self.count_bytes(self.seen.bytes_down, server.down_free, size)
        yield server.down_free - now
        return session.in_store

    def take(self, session: Session, server: Server) -> None:
        """Gives a session a slab, for which the one used longest ago falls asleep."""
        if session.holder is not None and session.holder is not server:
            session.holder.slabs.pop(session, None)
        server.slabs[session] = None
        session.holder, session.is_released, session.written_at = server, False, self.clock.now
        if len(server.slabs) > self.machine.slabs:
            asleep, _ = server.slabs.popitem(last=False)
            asleep.is_released = True
            self.seen.counts["PUT"] += 1

    def idle(self, session: Session, server: Server, pause_s: float) -> None:
        """A slab is left in the store after two seconds, where that has fallen an eighth of the window behind."""
        if pause_s > 2 and server.is_up and session.history - session.in_store >= self.machine.window // 8:
            self.leave(session, server)

    def leave(self, session: Session, server: Server) -> None:
        session.in_store = session.history
        size = self.slab_bytes(session)
        server.up_free = max(server.up_free, self.clock.now) + size / self.machine.link_bytes_s
        self.seen.counts["PUT"] += 2 + int(size // PART_BYTES)
        self.seen.counts["slabs left"] += 1
        self.count_bytes(self.seen.bytes_up, server.up_free, size)

    def slab_bytes(self, session: Session) -> int:
        """Of the slab that lies in the store for a session."""
        return min(session.in_store, self.machine.window) * self.machine.token_bytes

    def count_bytes(self, minutes: list[float], at: float, size: float) -> None:
        minutes[min(int(at // 60), self.minutes - 1)] += size

    def fork(self, session: Session, server: Server) -> None:
        """A branch, which lives for some turns; its own id may belong to another server."""
        child = Session(self.chance.getrandbits(62), session.history, session.history, turns_left=5)
        self.take(child, server)
        # Nobody holds one that was not used.
        child.is_released = True
        self.seen.counts["forks"] += 1
        self.begin(child, self.chance.lognormvariate(1.0, 0.8))

    # What happens to servers

    def kill(self, servers: list[Server]) -> None:
        for server in servers:
            server.is_up, server.died_at = False, self.clock.now
            server.slabs.clear()

    def drain(self, servers: list[Server]) -> None:
        """Each leaves its slabs and gives its sessions up."""
        for server in servers:
            server.is_up, server.died_at = False, -1.0
            for session in server.slabs:
                if session.history > session.in_store:
                    self.leave(session, server)
                session.is_released = True
            server.slabs.clear()

    def start(self, servers: list[Server]) -> None:
        for server in servers:
            server.is_up = True
            server.streams = self.new_streams()
            server.down_free = server.up_free = server.prefill_free = self.clock.now

    def play(self, scenario: str) -> Steps[None]:
        """What happens beside the turns: from a third of the time on."""
        third = self.minutes * 20.0
        count = len(self.servers)
        match scenario:
            case "growth":
                # A tenth of the servers joins at once.
                self.kill(self.servers[: count // 10])
                yield third
                self.start(self.servers[: count // 10])
            case "zone lost":
                yield third
                self.kill(self.servers[::3])
            case "rolling upgrade":
                yield third
                batches = 20
                for batch in range(batches):
                    upgraded = self.servers[batch::batches]
                    self.drain(upgraded)
                    yield 2 * third / batches
                    self.start(upgraded)
            case _:
                yield 0.0


def simulated(
    scenario: str, machine: Machine, servers: int, sessions: int, minutes: int, lease_s: float, points: int = POINTS
) -> Seen:
    """One run. Sessions are in the midst of their pauses when it begins, and have slabs in the store."""
    with many_objects():
        fleet = Fleet(machine, servers, minutes, lease_s, points)
        chance = fleet.chance
        for _ in range(sessions):
            history = min(100_000, int(chance.lognormvariate(8.7, 1.0)))
            session = Session(chance.getrandbits(62), history, in_store=history)
            fleet.begin(session, fleet.rest_of_a_pause_s())
        fleet.clock.begin(fleet.play(scenario))
        fleet.clock.run(60.0 * minutes)
        fleet.seen.bytes_kept = sum(map(fleet.slab_bytes, fleet.sessions))
        return fleet.seen


def row_of(seen: Seen, machine: Machine, minutes: int) -> dict[str, str]:
    """A line of the table. The first minute, in which nobody holds a slab yet, is no part of the times."""
    counts = seen.counts
    turns = counts["turns"]
    later = [minute for minute in seen.first_token_s[1:] if minute]
    times = np.concatenate(later) if later else np.zeros(1)
    worst = max((np.percentile(minute, 99) for minute in later), default=0.0)
    hours = minutes / 60
    spared = counts["tokens drawn"] * (1 - machine.token_s / GROUP_S)
    dollars = ((counts["PUT"]) * PUT + (counts["GET"] + counts["HEAD"]) * GET) / 1e6 / hours
    return {
        "turns a second": f"{turns / minutes / 60:,.0f}",
        "slab at hand": f"{100 * counts['hits'] / turns:.1f} %",
        "from the store": f"{100 * counts['restored'] / turns:.1f} %",
        "read again": f"{100 * counts['read again'] / turns:.1f} %",
        "moves": f"{counts['moves']:,}",
        "waited for a lease": f"{counts['turns that waited for a lease']:,}",
        "begun again": f"{counts['turns begun again']:,}",
        "first token, s: median": f"{np.percentile(times, 50):.2f}",
        "99 %": f"{np.percentile(times, 99):.2f}",
        "99.9 %": f"{np.percentile(times, 99.9):.1f}",
        "worst minute's 99 %": f"{worst:.1f}",
        "GB/s to the store": f"{sum(seen.bytes_up) / minutes / 60 / 1e9:,.1f}",
        "GB/s from it": f"{sum(seen.bytes_down) / minutes / 60 / 1e9:,.1f}",
        "PUTs a second": f"{counts['PUT'] / minutes / 60:,.0f}",
        "GETs and HEADs a second": f"{(counts['GET'] + counts['HEAD']) / minutes / 60:,.0f}",
        "TB of slabs in the store": f"{seen.bytes_kept / 1e12:,.1f}",
        "tokens drawn a second": f"{counts['tokens drawn'] / minutes / 60:,.0f}",
        "requests, dollars an hour": f"{dollars:,.0f}",
        "keeping slabs, dollars an hour": f"{seen.bytes_kept / 1e9 * KEPT_GB:,.2f}",
        "with a PUT a token": f"{dollars + spared * PUT / 1e6 / hours:,.0f}",
        "quicker read again": f"{100 * counts['quicker read again'] / max(1, counts['restored']):.1f} %",
    }


def _peak_gb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def draw(found: dict[tuple[str, str], Seen], path: Path) -> None:
    """For each machine the tail of the first token and the bytes of each scenario, by the minute."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    machines = list(dict.fromkeys(machine for machine, _ in found))
    figure, axes = pyplot.subplots(2, len(machines), figsize=(6 * len(machines), 7), squeeze=False, sharex=True)
    for column, machine in enumerate(machines):
        for scenario in [scenario for of, scenario in found if of == machine]:
            seen = found[machine, scenario]
            tail: list[Any] = [np.percentile(minute, 99) if minute else np.nan for minute in seen.first_token_s]
            axes[0][column].plot(tail, label=scenario)
            both = [(up + down) / 60e9 for up, down in zip(seen.bytes_up, seen.bytes_down, strict=True)]
            axes[1][column].plot(both, label=scenario)
        axes[0][column].set_title(machine)
        axes[0][column].set_yscale("log")
        axes[1][column].set_xlabel("minute")
    axes[0][0].set_ylabel("first token, 99th percentile, s")
    axes[1][0].set_ylabel("GB/s to and from the store")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=int, default=12)
    parser.add_argument("--lease", type=float, default=10.0, help="state_lease_s")
    parser.add_argument("--points", type=int, default=POINTS, help="of each server on the ring")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--plot", type=Path, help="where to draw it, as SVG or PNG")
    asked = parser.parse_args()
    found: dict[tuple[str, str], Seen] = {}
    for machine in asked.machines:
        rows = {}
        for scenario in asked.scenarios:
            began = time.process_time()
            size = asked.servers, asked.sessions, asked.minutes
            seen = simulated(scenario, MACHINES[machine], *size, asked.lease, asked.points)
            found[machine, scenario] = seen
            rows[scenario] = row_of(seen, MACHINES[machine], asked.minutes)
            spent = f"{time.process_time() - began:.0f} s of one core, {_peak_gb():.1f} GB"
            print(f"<!-- {machine}, {scenario}: {spent}, {dict(seen.counts)} -->", flush=True)
        print(f"\n| {machine} | {' | '.join(rows)} |\n|{' --- |' * (len(rows) + 1)}")
        for name in rows[asked.scenarios[0]]:
            print(f"| {name} | {' | '.join(row[name] for row in rows.values())} |")
    if asked.plot:
        draw(found, asked.plot)


if __name__ == "__main__":
    main()
