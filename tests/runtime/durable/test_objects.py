"""What a URL names: an object store that honours conditional writes, or one line that says what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from runtime.durable import HistoryIdentity, SlabIdentity, open_store
from runtime.durable.objects import Objects, check_conditional_writes, open_objects
from runtime.errors import InvalidSetting, StartError

MODEL = HistoryIdentity("a model", 100)
ENGINE = SlabIdentity("a model", "torch", "avx512", "none", "bfloat16", "bfloat16", 4, 60, 96)


@pytest.mark.parametrize("url", ["s3://bucket/folder", "gs://bucket", "az://account/container", "memory://"])
def test_without_the_extra_one_line_says_what_to_install(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)

    with (
        pytest.raises(InvalidSetting, match=r"pip install 'perennial\[cloud\]'$") as caught,
        open_store(url, MODEL, ENGINE),
    ):
        pass

    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("url", ["ftp://host/folder", "http://host/folder", "s4://bucket", "://"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match="neither a directory nor"), open_store(url, MODEL, ENGINE):
        pass


def test_a_bound_of_a_bucket_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="state_max_bytes"), open_store("memory://", MODEL, ENGINE, most_bytes=1):
        pass


def test_a_bucket_that_does_not_answer_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
    }.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(StartError, match="cannot be written") as caught:
        open_objects("s3://bucket/folder")

    assert len(str(caught.value).splitlines()) == 1


def test_a_file_where_the_folder_should_be_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InvalidSetting, match="state_dir=file://"):
        open_objects(f"file://{tmp_path}/file/state")


class Careless(Objects):
    """A store that takes no notice of the condition of a write."""

    def create(self, key: str, content: bytes) -> None:
        self.put(key, content)


def test_a_store_that_does_not_honour_conditional_writes_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="If-None-Match"):
        check_conditional_writes(Careless(MemoryStore()), "s3://careless")


def test_nothing_of_the_trial_is_left(tmp_path: Path) -> None:
    open_objects(f"file://{tmp_path}/state")

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
