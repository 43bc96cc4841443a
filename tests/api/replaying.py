"""Sends a recording's requests again, in order, to a server whose model answers as the recorded one did."""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from api.dialects.chat import request as chat
from api.dialects.messages import request as messages
from api.dialects.responses import request as responses
from api.reading import Terms
from runtime.items import Call, Item, Message, Reasoning, is_assistants
from runtime.script import Head, write
from runtime.slab import common_length
from runtime.text import Text
from tests.api.agents import Lane, calling, open_lane
from tests.api.doors import House, open_house
from tests.api.recordings import Heard, Sent, recordings
from tests.api.scripted import ScriptedEngine, spelled
from tests.templates import text_with

_READ = {"/v1/responses": responses.read, "/v1/messages": messages.read, "/v1/chat/completions": chat.read}
# No recording takes this long; without it a test that fails might never end.
_LONGEST_S = 240


@dataclass(frozen=True)
class Turn:
    """What one request cost. The first `known` tokens of its prompt had been read before, in whatever conversation."""

    prompt: int
    known: int
    rows: int
    drawn: int
    added: int
    """Tokens behind the last item of the model's that the prompt has, or behind the items that were held by name."""
    usage: dict[str, Any] | None

    @property
    def read(self) -> int:
        """Rows of the prompt that ran. The last runs once more for its logits; the last token drawn runs with the next turn."""
        return self.rows - self.drawn

    @property
    def reuse(self) -> dict[str, Any] | None:
        """What the answer says of it, if it came to its end. Before a prewarm is read, nothing is known of it."""
        usage = self.usage or {}
        details = usage.get("input_tokens_details") or usage.get("prompt_tokens_details") or usage
        return details if details and self.drawn else None

    @property
    def cached(self) -> int | None:
        """The same as the dialect has it."""
        reuse = self.reuse or {}
        return reuse.get("cached_tokens", reuse.get("cache_read_input_tokens"))

    @property
    def broke(self) -> str | None:
        """What the answer says of why more was to be read than what was new."""
        reuse = self.reuse
        if reuse is None:
            return None
        why: str | None = reuse["reread_because"] or reuse["broke_at"]
        return why


async def replayed(
    agent: str, template: str, names: Collection[str] = (), kept_by: str | None = None
) -> dict[tuple[str, int], Turn]:
    """Every request of an agent's recordings, or of those with these names: by the recording's name and its number there.

    `kept_by` writes a conversation as it is kept, where the template that the server has would write it otherwise.
    """
    text = text_with(template)
    engine = ScriptedEngine(text)
    ran: list[array[int]] = []
    turns: dict[tuple[str, int], Turn] = {}
    async with open_house(engine, text, model_label="local-model", sink=4, window=65_532) as house:
        for name, requests in recordings().items():
            if name.startswith(f"{agent}/") and (not names or name in names):
                replay = Replay(name, house, engine, ran, text_with(kept_by or template))
                with trio.fail_after(_LONGEST_S):
                    await replay.run(requests)
                turns |= {(name, number): turn for number, turn in replay.turns.items()}
    return turns


class Replay:
    """One recording on its way; `turns` are its requests that were answered, each with its number."""

    def __init__(self, name: str, house: House, engine: ScriptedEngine, ran: list[array[int]], kept_by: Text) -> None:
        self._name = name
        self._house = house
        self._engine = engine
        self._offered: dict[str, dict[str, Any]] = {}
        self._lanes: dict[int, Lane] = {}
        self._ours: dict[str, str] = {}
        self._arguments: dict[str, tuple[str, str]] = {}
        self._ran = ran
        self._told = Told(kept_by)
        self.turns: dict[int, Turn] = {}

    async def run(self, requests: Sequence[Sent]) -> None:
        """Sends them all."""
        async with AsyncExitStack() as stack:
            for number, (sent, following) in enumerate(zip(requests, [*requests[1:], None], strict=True)):
                await self._send(number, sent, following, stack)

    async def _send(self, number: int, sent: Sent, following: Sent | None, stack: AsyncExitStack) -> None:
        engine = self._engine
        # Who was refused asks again, and is told then what the model would have said at once.
        wanted = following.answer if sent.has_failed and following else sent.answer
        body = self._body(sent, wanted)
        is_cut = sent.is_cut and bool(wanted.parts)
        engine.script.clear()
        engine.write(_script(wanted.items, body, is_cut=is_cut), is_whole=not is_cut)
        rows, drawn = engine.rows, engine.drawn
        answer = await self._heard(sent, body, wanted if is_cut else None, stack)
        await self._until_idle(goes_on=is_cut)
        rows, drawn = engine.rows - rows, engine.drawn - drawn
        assert answer.error is None, answer.error
        self._learn(sent.answer, answer)
        told = self._told.prompt(sent.path or "/v1/responses", body)
        self._told.add(answer, told)
        history = array("I", engine.history) if rows else array("I")
        prompt = history[: len(history) - max(0, drawn - 1)]
        if rows:
            # The model's own tokens stay as they were drawn, where a template trims what they say.
            assert engine.text.spelled(prompt).split() == told.written(is_prewarm=not drawn).split()
        known = max((common_length(ran, prompt) for ran in self._ran), default=0)
        self._ran.append(history)
        self.turns[number] = Turn(len(prompt), known, rows, drawn, told.added, answer.usage)

    async def _heard(self, sent: Sent, body: dict[str, Any], until: Heard | None, stack: AsyncExitStack) -> Heard:
        """The answer, up to its end or to where the recorded client left."""
        answer = Heard()
        if sent.conn is None:
            async with calling(self._house.http, sent.path, body) as call:
                while (event := await call.receive()) is not None:
                    answer.hear(event)
                    if until is not None and _has_heard(answer, until):
                        break
            return answer
        if sent.conn not in self._lanes:
            self._lanes[sent.conn] = await stack.enter_async_context(open_lane(self._house.http))
        lane = self._lanes[sent.conn]
        await lane.send(body)
        while not answer.is_over and not (until is not None and _has_heard(answer, until)):
            answer.hear(await lane.receive())
        if until is not None:
            await lane.leave()
        return answer

    async def _until_idle(self, *, goes_on: bool) -> None:
        """Returns once the server does nothing more. Sockets know no event for "the other side has noticed"."""
        with trio.fail_after(100):
            await wait_all_tasks_blocked()
            while self._house.runtime.load().completions_running:
                if goes_on:
                    self._engine.go_on()
                await wait_all_tasks_blocked(0.005)

    def _learn(self, recorded: Heard, answer: Heard) -> None:
        if recorded.response_id and answer.response_id:
            self._ours[recorded.response_id] = answer.response_id
        for theirs, ours in zip(recorded.parts, answer.parts, strict=False):
            self._ours |= {theirs.marks[name]: ours.marks[name] for name in theirs.marks if name in ours.marks}
            if theirs.kind == "call" and theirs.text and ours.text:
                self._arguments[_told(theirs.text)] = (theirs.text, ours.text)

    def _body(self, sent: Sent, wanted: Heard) -> dict[str, Any]:
        text = json.dumps(sent.body)
        for theirs, ours in self._ours.items():
            text = text.replace(json.dumps(theirs), json.dumps(ours))
        body = _named(self._with_ours(json.loads(text)), self._name)
        # Some recorded answers call a tool that was not offered, which no model here can: it is offered then.
        self._offered |= {tool["name"]: tool for tool in body.get("tools") or () if "input_schema" in tool}
        called = {part.name for part in wanted.parts if part.kind == "call"} | {*_called(body)}
        missing = called - {tool.get("name") for tool in body.get("tools") or ()}
        if "messages" in body and "system" in body and missing:
            body["tools"] = body.get("tools", []) + [self._offered[name] for name in sorted(missing)]
        return body

    def _with_ours(self, told: Any) -> Any:
        """The same with the arguments that our model has called with: a grammar orders them, and leaves some out."""
        if isinstance(told, list):
            return [self._with_ours(one) for one in told]
        if not isinstance(told, dict):
            return told
        told = {key: self._with_ours(one) for key, one in told.items()}
        arguments = told.get("arguments", told.get("input") if told.get("type") == "tool_use" else None)
        if isinstance(arguments, str | dict) and (known := self._arguments.get(_told(arguments))):
            theirs, ours = known
            if isinstance(arguments, dict):
                return told | {"input": _as_in_javascript(json.loads(ours))}
            compact = json.dumps(_as_in_javascript(json.loads(ours)), separators=(",", ":"), ensure_ascii=False)
            return told | {"arguments": ours if arguments == theirs else compact}
        return told


def _told(arguments: str | dict[str, Any]) -> str:
    """The same for all spellings of the same arguments."""
    value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    return json.dumps(_as_in_javascript(value), sort_keys=True)


def _as_in_javascript(given: dict[str, Any]) -> dict[str, Any]:
    whole = {name: int(value) for name, value in given.items() if isinstance(value, float) and value.is_integer()}
    return given | whole


@dataclass(frozen=True)
class Prompt:
    """What a prompt is to be, found without what the server holds: its head and all of its items, as the model has said them."""

    text: Text
    head: Head
    items: Sequence[Item]
    options: Mapping[str, Any]
    held: int
    """How many of the items come from the answer that the request names, and those before it."""
    conversation: str | None = None

    def written(self, *, is_prewarm: bool) -> str:
        written = write(self.text, self.head, self.items, self.options)
        return self.text.spelled(written.tokens + (array("I") if is_prewarm else written.cue))

    @property
    def added(self) -> int:
        """Tokens behind what was held or said by the model, the cue included."""
        answered = [number for number, item in enumerate(self.items, 1) if is_assistants(item)]
        before = self.items[: max([self.held, *answered])]
        whole = write(self.text, self.head, self.items, self.options)
        return len(whole.tokens + whole.cue) - (
            len(write(self.text, self.head, before, self.options).tokens) if before else 0
        )


class Told:
    """What was said in all conversations: an oracle for prompts, which knows answers and no tokens."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._answers: list[list[Item]] = []
        self._named: dict[str, list[Item]] = {}
        self._heads: list[tuple[Head, Item]] = []

    def prompt(self, path: str, body: dict[str, Any]) -> Prompt:
        _, question = _READ[path](json.dumps(body).encode(), self._text, Terms("local-model", 2**16))
        conversation = body.get("conversation")
        base = self._named.get(body.get("previous_response_id") or conversation or "", [])
        head = question.head
        items = [*base, *self._kept(question.items)]
        if not head.tools and any(map(is_assistants, items)):
            # Who names no tools any more in a conversation has them forbidden; they stay in the prompt.
            known = (held for held, first in self._heads if first == items[0] and replace(held, tools=()) == head)
            head = next(known, head)
        self._heads.append((head, items[0]))
        return Prompt(self._text, head, items, question.options, len(base), conversation)

    def add(self, answer: Heard, prompt: Prompt) -> None:
        self._answers.append(answer.items)
        for name in (answer.response_id, prompt.conversation):
            if name:
                self._named[name] = [*prompt.items, *answer.items]

    def _kept(self, items: Sequence[Item]) -> list[Item]:
        """The items with those of the model as it said them, reasoning that a client left out included."""
        kept: list[Item] = []
        for is_ours, run in groupby(items, is_assistants):
            said = [*run]
            found = (whole for answer in reversed(self._answers) if is_ours and (whole := _whole(answer, said)))
            kept += next(found, said)
        return kept


def _whole(answer: Sequence[Item], said: Sequence[Item]) -> list[Item] | None:
    """As much of an answer as a client sends back who may leave reasoning out, and cut the last item off."""
    whole: list[Item] = []
    rest = [*said]
    for ours in answer:
        if not rest:
            break
        if _is_same(ours, rest[0]):
            rest.pop(0)
            whole.append(ours)
        elif isinstance(ours, Reasoning):
            whole.append(ours)
        else:
            break
    return None if rest else whole


def _is_same(ours: Item, theirs: Item) -> bool:
    match ours, theirs:
        case Reasoning(one), Reasoning(other):
            return other.strip() in ("", one.strip())
        case Message("assistant", one), Message("assistant", other):
            return one.strip() == other.strip()
        case Call(call_id=one), Call(call_id=other):
            return one == other
    return False


def _has_heard(answer: Heard, wanted: Heard) -> bool:
    """Whether the answer has come as far as the recorded client had it."""
    if len(answer.parts) < len(wanted.parts):
        return False
    last, ours = wanted.parts[-1], answer.parts[len(wanted.parts) - 1]
    return last.kind == "call" or ours.text.strip() == last.text.strip()


def _script(items: Sequence[Item], body: dict[str, Any], *, is_cut: bool) -> str:
    """What the model says; where that `is_cut` the last item has no end."""
    if body.get("tool_choice") == "required":
        # The model then calls at once.
        items = [item for item in items if isinstance(item, Call)]
    said = spelled(items, dict(_schemas(body))) or "Well."
    if is_cut:
        for end in ("\n</think>\n\n", "{}}\n</tool_call>"):
            said = said.removesuffix(end)
    return said


def _called(body: dict[str, Any]) -> Iterator[str]:
    for message in body.get("messages", ()):
        for block in message.get("content") or ():
            if isinstance(block, dict) and block["type"] == "tool_use":
                yield block["name"]


def _schemas(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each tool that the model knows, and the schema of its arguments."""
    for tool in body.get("tools") or ():
        space = f"{tool['name']}." if "tools" in tool else ""
        for one in tool.get("tools", [tool]):
            plain = one.get("function", one)
            if "name" in plain:
                yield space + plain["name"], plain.get("parameters") or plain.get("input_schema") or {}


def _named(body: dict[str, Any], name: str) -> dict[str, Any]:
    """The request, with the recording's name at the beginning of all that the model reads."""
    if body.get("instructions"):
        return body | {"instructions": f"{name}. {body['instructions']}"}
    if "system" in body:
        system = body["system"]
        at = next(n for n, block in enumerate(system) if not block["text"].startswith("x-anthropic"))
        system[at]["text"] = f"{name}. {system[at]['text']}"
        return body
    if body.get("previous_response_id") or body.get("conversation"):
        return body
    key = "input" if "input" in body else "messages"
    if isinstance(body[key], str):
        return body | {key: f"{name}. {body[key]}"}
    first = body[key][0]
    if isinstance(first["content"], str):
        first["content"] = f"{name}. {first['content']}"
    else:
        first["content"][0]["text"] = f"{name}. {first['content'][0]['text']}"
    return body
