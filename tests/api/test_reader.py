"""Requests are read in processes that can be ended, whatever a client or a chat template makes of them."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
import trio
import trio.testing
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from actors import Runtime
from api.dialects.chat.request import read
from api.reader import Reader, ReadingFailed, open_reader
from api.reading import ReadBody, Terms, Write
from api.server import Server
from runtime import Settings
from runtime.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MalformedRequest,
    ModelNotFound,
    NotServing,
    SlabOverflow,
)
from runtime.metrics import Metrics
from runtime.text import Text
from tests.actors.engines import LedgerEngine, open_lab
from tests.api.faults import EndsItsProcess, Fault
from tests.api.hostile import few_descriptors

TERMS = Terms("a model", 100)
SECRET = "xyzzy"
# Takes hours for some messages, and more memory than there is for others.
TEMPLATE = """{% set said = messages[0].content %}
{% if 'loop' in said %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{% elif 'grow' in said %}{{ 'x' * 20000000000 }}{% else %}{{ said }}{% endif %}"""


def text() -> Text:
    words = {"hello": 0, "[UNK]": 1} | {f"word{token_id}": token_id for token_id in range(2, 100)}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = TEMPLATE
    return Text(tokenizer, frozenset({2}))


def body(content: str, **more: object) -> bytes:
    return json.dumps({"model": "a model", "messages": [{"role": "user", "content": content}]} | more).encode()


async def read_prompt(reader: Reader, asked: bytes) -> list[int]:
    """The tokens of a request's messages, read as a completion has them read."""
    _, question = await reader.read(ReadBody(read, asked), len(asked))
    written = await reader.read(Write(question.head, (), question.items, question.options), len(asked))
    assert written is not None
    return [*written.tokens, *written.cue]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


async def test_a_request_is_read() -> None:
    asked = body("hello word7", max_tokens=3)
    async with open_reader(text(), TERMS, 60) as reader:
        _, question = await reader.read(ReadBody(read, asked), len(asked))

        assert question.max_tokens == 3
        assert await read_prompt(reader, asked) == [0, 7]


async def test_once_it_serves_the_process_is_there_that_reads_the_first_request() -> None:
    @asynccontextmanager
    async def opening(_: Settings, metrics: Metrics) -> AsyncIterator[Runtime]:
        async with open_lab(LedgerEngine(), metrics, text=text()) as runtime:
            yield runtime

    before = children()
    server = Server(Settings(model_label="a model"), opening)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        started = children() - before
        with server.call():
            assert await read_prompt(server.reader, body("hello")) == [0]

        assert children() - before == started
        assert len(started) == 1
        nursery.cancel_scope.cancel()
    assert children() <= before


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (b"{", MalformedRequest),
        (body("hello", model="other"), ModelNotFound),
        (body("hello", top_k=-1), InvalidRequest),
        (body("a" * 10_000), SlabOverflow),
    ],
)
async def test_what_is_wrong_with_a_request_is_raised(asked: bytes, kind: type[Exception]) -> None:
    async with open_reader(text(), TERMS, 60) as reader:
        with pytest.raises(kind):
            await reader.read(ReadBody(read, asked), len(asked))


@pytest.mark.parametrize("content", ["loop", "grow"])
async def test_a_template_that_has_no_end_is_ended_and_the_next_request_is_read(
    content: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_reader(text(), TERMS, 60) as reader:
        # The limit is of this request alone: a new process may take longer for its first one.
        await read_prompt(reader, body("hello"))
        with monkeypatch.context() as patch:
            patch.setattr("api.reader._LIMIT_S", 1.0)
            with pytest.raises(InvalidRequest, match="memory"):
                await read_prompt(reader, body(f"{content} {SECRET}"))

        assert await read_prompt(reader, body("hello")) == [0]
    assert SECRET not in caplog.text


async def test_a_request_is_not_read_for_longer_than_a_completion_may_take() -> None:
    async with open_reader(text(), TERMS, 0.2) as reader:
        await reader.warm()
        with pytest.raises(DeadlineExceeded):
            await read_prompt(reader, body("loop"))


async def test_the_end_does_not_wait_for_a_template_and_leaves_no_process() -> None:
    before = children()
    with trio.fail_after(200):
        async with open_reader(text(), TERMS, 60) as reader, trio.open_nursery() as nursery:
            await read_prompt(reader, body("hello"))
            nursery.start_soon(read_prompt, reader, body("loop"))
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()

    assert children() <= before


async def test_a_small_request_does_not_wait_for_a_long_one() -> None:
    async with open_reader(text(), TERMS, 60) as reader, trio.open_nursery() as nursery:
        nursery.start_soon(read_prompt, reader, body("loop", user="x" * 2**17))
        await trio.testing.wait_all_tasks_blocked(0.05)

        assert await read_prompt(reader, body("hello")) == [0]
        nursery.cancel_scope.cancel()


async def test_who_leaves_while_waiting_is_not_read() -> None:
    async with open_reader(text(), TERMS, 60) as reader, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(read_prompt, reader, body("loop"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.move_on_after(0.05):
            await read_prompt(reader, body("hello"))

        assert reader.waiting == 0
        nursery.cancel_scope.cancel()


async def test_without_room_for_a_process_a_request_is_told_to_come_again(caplog: pytest.LogCaptureFixture) -> None:
    async with open_reader(text(), TERMS, 60) as reader:
        with socket.socket() as last:
            most = last.fileno() + 2
        with few_descriptors(most), pytest.raises(NotServing, match="try again"):
            await read_prompt(reader, body("hello"))

        assert await read_prompt(reader, body("hello")) == [0]
    assert len(caplog.records) == 1


async def test_a_request_whose_process_ends_while_it_starts_is_told_to_come_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_reader(text(), EndsItsProcess("a model", 100), 60) as reader:
        with pytest.raises(NotServing, match="try again"):
            await read_prompt(reader, body("hello"))

    assert len(caplog.records) == 1


async def test_a_fault_in_reading_says_where_and_not_of_what(caplog: pytest.LogCaptureFixture) -> None:
    async with open_reader(text(), TERMS, 60) as reader:
        with pytest.raises(ReadingFailed) as failed:
            await reader.read(Fault(SECRET), 0)

    assert "TypeError" in str(failed.value)
    assert SECRET not in str(failed.value)
    assert SECRET not in caplog.text


def test_the_process_that_reads_loads_no_engine() -> None:
    program = "import sys, api.reading; assert not {'torch', 'mlx', 'trio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(autouse=True)
def _all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
