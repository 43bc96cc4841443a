"""One conversation of hundreds of turns: how long a turn takes at its end and at its start, and what memory it holds.

A machine changes its pace within minutes, so the turns of the last tenth alternate with those of another session's second
tenth, which has waited for them since its first.

Ours is a session that is sent each turn's new tokens. A peer's server is sent the whole conversation each turn, as its
protocol wants, and gets as far as it can in the time that all of our turns took, or in `LONGEST_PEER_S`.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from itertools import accumulate

import psutil
import trio

from api.client import ClientSession, connect
from bench.figures import Figure, figure
from bench.models import SMALL
from bench.peers.processes import PeerFailed, installed
from bench.peers.servers import SERVERS, ServerKind, peer_server
from bench.scenario import Result, Setup
from bench.servers import serving
from runtime.events import Token
from runtime.models import SEEDLING, find_model
from runtime.settings import Settings
from runtime.text import Text

SINK, WINDOW = 4, 252
LONGEST_PEER_S = 90.0
OURS = "perennial"
LATENCY, MEMORY = "seconds a turn", "resident MB"
_WORDS = "the cat sat by the door and the dog ran to the river and then they came home".split()


@dataclass(frozen=True, slots=True)
class Length:
    """How many turns a conversation has, and how many tokens each appends, about, and generates."""

    turns: int
    appended: int
    generated: int


LENGTHS = {SMALL: Length(400, 218, 32), SEEDLING: Length(2_000, 32, 8)}


@dataclass(slots=True)
class Run:
    """What was seen turn by turn."""

    said: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    live_bytes: list[int] = field(default_factory=list)


class Script:
    """What the user says in each turn."""

    def __init__(self, text: Text, length: Length) -> None:
        self._text = text
        self._words = 1
        while len(self.tokens(1)) < length.appended:
            self._words += 1

    def line(self, number: int) -> str:
        return f"{number}: " + " ".join(_WORDS[index % len(_WORDS)] for index in range(self._words))

    def tokens(self, number: int) -> list[int]:
        """The line with what the template puts around it."""
        if number:
            return self._text.render_next_turn(self.line(number), is_after_eos=False)
        return self._text.render([{"role": "user", "content": self.line(number)}])


class Conversation:
    """A session that is told the script, turn by turn, from the turn `first` on."""

    def __init__(
        self, session: ClientSession, process: psutil.Process, script: Script, length: Length, first: int = 0
    ) -> None:
        self._session, self._process, self._script, self._length, self._first = session, process, script, length, first
        self.run = Run()

    async def go_on(self, turns: int) -> None:
        for _ in range(turns):
            tokens = self._script.tokens(self._first + len(self.run.seconds))
            began = trio.current_time()
            await self._session.append(tokens)
            async with self._session.generate(self._length.generated) as events:
                said = [event.token_id async for event in events if isinstance(event, Token)]
            self.run.seconds.append(trio.current_time() - began)
            self.run.said.append(said)
            info = await self._session.info()
            self.run.resident.append(self._process.memory_info().rss)
            self.run.history.append(info.history_length)
            self.run.live_bytes.append(info.kv_live_bytes)


async def our_runs(settings: Settings, script: Script, length: Length) -> tuple[Run, Run]:
    """What was seen of the whole conversation, and of the first two tenths of one whose second ran beside its last."""
    tenth = length.turns // 10
    async with (
        serving(settings) as (address, process),
        connect(address) as client,
        client.session() as short_session,
        client.session() as session,
    ):
        short = Conversation(short_session, process, script, length)
        whole = Conversation(session, process, script, length)
        await short.go_on(tenth)
        await whole.go_on(length.turns - tenth)
        for number in range(tenth):
            for conversation in (short, whole) if number % 2 else (whole, short):
                await conversation.go_on(1)
    return whole.run, short.run


async def peer_run(kind: ServerKind, setup: Setup, script: Script, length: Length, seconds: float) -> tuple[Run, str]:
    """What was seen until the time was over, and what ended it."""
    run = Run()
    messages: list[dict[str, str]] = []
    directory = str(find_model(setup.settings.model))
    threads = psutil.cpu_count(logical=False) or 1
    try:
        async with peer_server(kind, setup.peers, directory, threads) as server:
            with trio.move_on_after(seconds):
                for number in range(length.turns):
                    messages.append({"role": "user", "content": script.line(number)})
                    began = trio.current_time()
                    said = await server.answer(messages, length.generated)
                    run.seconds.append(trio.current_time() - began)
                    run.resident.append(server.resident_bytes)
                    messages.append({"role": "assistant", "content": said})
                return run, "it had them all"
            return run, f"{seconds:.0f} s were over"
    except PeerFailed as error:
        return run, str(error)


async def run(setup: Setup) -> Result:
    """Ours on either model; the peers on the small one, whose context takes the whole conversation."""
    result, ours = await _ours(setup)
    if setup.model == SMALL:
        await _measure_peers(setup, ours, result)
    return result


async def _ours(setup: Setup) -> tuple[Result, Run]:
    length = LENGTHS.get(setup.model, LENGTHS[SMALL])
    settings = replace(setup.settings, sink=SINK, window=WINDOW, capacity=2, max_concurrent=1, idle_ttl_s=0.0)
    script = Script(Text.load(find_model(settings.model)), length)
    ours, short = await our_runs(settings, script, length)
    result = Result(
        WINDOW, our_figures(ours, short, settings), {LATENCY: {OURS: ours.seconds}, MEMORY: {OURS: _megabytes(ours)}}
    )
    return result, ours


async def _measure_peers(setup: Setup, ours: Run, result: Result) -> None:
    length = LENGTHS[SMALL]
    script = Script(Text.load(find_model(setup.settings.model)), length)
    seconds = min(sum(ours.seconds), LONGEST_PEER_S)
    within = sum(passed <= seconds for passed in accumulate(ours.seconds))
    result.figures |= {
        "time for each peer": figure("s", [seconds]),
        f"{OURS}: turns in that time": figure("turns", [within]),
    }
    versions = await installed(setup.peers)
    for kind in SERVERS:
        if kind.package not in versions:
            result.remarks.append(f"{kind.label}: {kind.package} is not installed for {setup.peers}")
            continue
        theirs, ending = await peer_run(kind, setup, script, length, seconds)
        result.remarks.append(f"{kind.label}: {len(theirs.seconds)} turns, then {ending}")
        if theirs.seconds:
            result.peers[kind.package] = versions[kind.package]
            result.figures |= peer_figures(kind.label, theirs)
            result.series[LATENCY][kind.label] = theirs.seconds
            result.series[MEMORY][kind.label] = _megabytes(theirs)


def our_figures(run: Run, short: Run, settings: Settings) -> dict[str, Figure]:
    """Of the whole conversation, and of the one whose second tenth ran beside its last."""
    tenth = len(run.seconds) // 10
    early, late = run.seconds[tenth : 2 * tenth], run.seconds[-tenth:]
    # By then the window is full, and allocators have seen the largest forward.
    grown = run.resident[-1] - run.resident[tenth - 1] - 4 * (run.history[-1] - run.history[tenth - 1])
    beside = zip(run.seconds[-tenth:], short.seconds[-tenth:], strict=True)
    full = [held for held, long in zip(run.live_bytes, run.history, strict=True) if long >= SINK + settings.window]
    return {
        "turns": figure("turns", [len(run.seconds)]),
        "history": figure("tokens", [run.history[-1]]),
        "a turn, second tenth": figure("s", early),
        "a turn, last tenth": figure("s", late),
        "p50 of the last tenth over the second's": figure("x", [statistics.median(late) / statistics.median(early)]),
        "a turn of the last tenth over one of the second beside it": figure(
            "x", [last / second for last, second in beside]
        ),
        "resident growth from the first tenth on, less 4 bytes a token": figure("MB", [grown / 1e6]),
        "kv_live_bytes once full, most over least": figure("x", [max(full) / min(full)]),
    }


def peer_figures(label: str, run: Run) -> dict[str, Figure]:
    tenth = -(-len(run.seconds) // 10)
    return {
        f"{label}: turns in that time": figure("turns", [len(run.seconds)]),
        f"{label}: a turn, first tenth": figure("s", run.seconds[:tenth]),
        f"{label}: a turn, last tenth": figure("s", run.seconds[-tenth:]),
    }


def _megabytes(run: Run) -> list[float]:
    return [resident / 1e6 for resident in run.resident]
