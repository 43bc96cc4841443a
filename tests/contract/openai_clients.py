"""OpenAI's own client in both of its forms, behind one face."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from runtime.models import SEEDLING
from tests.contract.loops import MOST_S
from tests.contract.servers import ServerProcess

TALK = [{"role": "user", "content": "Tell me about the sea."}]


class Client(Protocol):
    """What a test asks of a client, of either sort."""

    def models(self) -> list[str]: ...

    def answer(self, **body: Any) -> ChatCompletion: ...

    def chunks(self, **body: Any) -> list[ChatCompletionChunk]: ...


class SyncClient:
    def __init__(self, client: OpenAI) -> None:
        self._client = client

    def models(self) -> list[str]:
        return [model.id for model in self._client.models.list()]

    def answer(self, **body: Any) -> ChatCompletion:
        answer: ChatCompletion = self._client.chat.completions.create(**asked(body))
        return answer

    def chunks(self, **body: Any) -> list[ChatCompletionChunk]:
        with self._client.chat.completions.create(stream=True, **asked(body)) as stream:
            return list(stream)


class AsyncClient:
    def __init__(self, client: AsyncOpenAI, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def models(self) -> list[str]:
        async def listed() -> list[str]:
            return [model.id async for model in self._client.models.list()]

        return self._runner.run(listed())

    def answer(self, **body: Any) -> ChatCompletion:
        answer: ChatCompletion = self._runner.run(self._client.chat.completions.create(**asked(body)))
        return answer

    def answers(self, count: int, **body: Any) -> list[ChatCompletion]:
        """As many answers to the same, all asked for at once."""

        async def gathered() -> list[ChatCompletion]:
            creations = (self._client.chat.completions.create(**asked(body)) for _ in range(count))
            return await asyncio.gather(*creations)

        return self._runner.run(gathered())

    def chunks(self, **body: Any) -> list[ChatCompletionChunk]:
        async def streamed() -> list[ChatCompletionChunk]:
            async with await self._client.chat.completions.create(stream=True, **asked(body)) as stream:
                return [chunk async for chunk in stream]

        return self._runner.run(streamed())


def asked(body: dict[str, Any]) -> dict[str, Any]:
    return {"model": SEEDLING, "messages": TALK, "temperature": 0, "max_tokens": 24} | body


def options(server: ServerProcess, key: str) -> dict[str, Any]:
    return {"base_url": f"{server.http}/v1", "api_key": key, "max_retries": 0, "timeout": MOST_S}


@contextmanager
def sync_client(server: ServerProcess, key: str = "none") -> Iterator[SyncClient]:
    with OpenAI(**options(server, key)) as client:
        yield SyncClient(client)


@contextmanager
def async_client(server: ServerProcess, key: str = "none") -> Iterator[AsyncClient]:
    # A loop of asyncio's own: with trio_asyncio imported, a new loop would be made over trio.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        client = AsyncOpenAI(**options(server, key))
        yield AsyncClient(client, runner)
        runner.run(client.close())


CLIENTS: Mapping[str, Callable[[ServerProcess], AbstractContextManager[Client]]] = {
    "sync": sync_client,
    "async": async_client,
}


def text_of(answer: ChatCompletion) -> str:
    content = answer.choices[0].message.content
    assert content is not None
    return content


def text_in(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def reason_in(chunks: list[ChatCompletionChunk]) -> str | None:
    *earlier, last = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert earlier == [None] * len(earlier)
    return last
