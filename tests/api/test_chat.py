"""A chat with a server that runs already: it makes tokens by the tokenizer of the server's model, or says what it needs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from api.chat import chat
from api.client import connect
from runtime import Settings
from runtime.errors import ModelUnavailable
from runtime.models import SEEDLING, find_model
from tests.actors.engines import tiny_text, tiny_tokenizer
from tests.api.doors import House, open_house


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A directory with the tokenizer that the servers of these tests have."""
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "tiny"


async def talk(house: House, typed: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return await chat(Settings(**settings), house.grpc, max_tokens=3, temperature=0.0)


async def test_it_takes_the_tokenizer_of_the_model_that_the_server_names(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_house(model_label=str(tiny)) as house:
        assert await talk(house, "hello\n", monkeypatch) == 0
        said = capsys.readouterr().out.splitlines()

        prompt = tiny_text().render([{"role": "user", "content": "hello"}])
        assert said[0].startswith(f"{tiny} on {house.grpc} remembers")
        assert said[1] == tiny_text().decode(house.engine.continued(prompt, 3))


async def test_it_takes_a_tokenizer_that_it_is_told_of_where_it_is_the_servers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(model_label="somebody's own") as house:
        assert await talk(house, "hello\n", monkeypatch, model=str(tiny)) == 0


@pytest.mark.parametrize(
    "label", [SEEDLING, "", "nobody-knows-it", "/no/such/directory", "~", str(find_model(SEEDLING))]
)
async def test_where_the_servers_tokenizer_cannot_be_had_one_line_says_what_is_needed(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(model_label=label) as house:
        with pytest.raises(ModelUnavailable) as refused:
            await talk(house, "hello\n", monkeypatch)

        said = str(refused.value)
        assert len(said.splitlines()) == 1
        assert f"tokenizer of {label or SEEDLING!r}, which the server runs" in said
        assert house.runtime.load().slab_in_use == 0


async def test_a_tokenizer_that_is_not_the_servers_is_refused_though_it_was_told_of(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(model_label=str(tiny)) as house:
        with pytest.raises(ModelUnavailable, match="has another tokenizer: set model to"):
            await talk(house, "hello\n", monkeypatch, model=str(find_model(SEEDLING)))


async def test_a_template_that_leaves_out_earlier_turns_ends_the_chat_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    async with open_house(model_label=str(tmp_path)) as house:
        await talk(house, "hello\nhello\n", monkeypatch)

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("perennial: the model's chat template leaves out earlier turns")


async def test_the_server_tells_which_model_it_runs() -> None:
    async with open_house(model_label="mine") as house, connect(house.grpc) as client:
        told = await client.model_info()

    assert (told.model, told.vocabulary, told.eos_token_ids) == ("mine", 100, frozenset({2}))
    assert told.tokenizer_digest == tiny_text().digest
