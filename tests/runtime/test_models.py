"""From a model's name to its directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import ModelUnavailable
from runtime.models import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import sys
from runtime.errors import ModelUnavailable
from runtime.models import find_model

try:
    print(find_model(sys.argv[1]))
except ModelUnavailable as error:
    print("unavailable:", error)
"""


def found_in_a_new_process(name: str, home: Path, **environment: str) -> str:
    """What finding `name` prints where the Hugging Face cache is at `home`: its place is read once a process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def cache_model(home: Path, organisation: str, name: str) -> Path:
    """A model as the hub's cache holds it."""
    repository = home / "hub" / f"models--{organisation}--{name}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_seedling_comes_with_the_package() -> None:
    assert (find_model("seedling") / "config.json").is_file()


def test_a_local_directory_is_found_by_its_path(seedling: Path) -> None:
    assert find_model(str(seedling)) == seedling


def test_a_relative_path_of_two_parts_is_a_directory_before_it_is_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    assert find_model("models/mine") == Path("models/mine")


@pytest.mark.parametrize("name", ["/no/such/directory", "./no/such", "no_such", "a/b/c", "~/models", "/nowhere"])
def test_a_path_to_nothing_is_unavailable_and_one_line_says_what_would_be(name: str) -> None:
    with pytest.raises(ModelUnavailable, match="give 'seedling', a directory, or a Hugging Face id") as caught:
        find_model(name)

    assert len(str(caught.value).splitlines()) == 1


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_a_file_that_is_no_gguf_is_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("weights")

    with pytest.raises(ModelUnavailable):
        find_model(str(tmp_path / name))


def test_a_gguf_file_is_found_by_its_path_and_in_a_directory_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("weights")
    (tmp_path / "mmproj-model.gguf").write_text("eyes")
    (tmp_path / "config.json").write_text("{}")

    assert find_model(str(file)) == file
    assert find_model(str(tmp_path)) == file


def test_safetensors_go_before_a_gguf_file_beside_them(tmp_path: Path) -> None:
    for name in ("model.gguf", "config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")

    assert find_model(str(tmp_path)) == tmp_path


def test_a_gguf_file_of_a_repository_in_the_hub_cache_is_found_without_a_network(tmp_path: Path) -> None:
    snapshot = cache_model(tmp_path, "org", "tiny-GGUF")
    (snapshot / "tiny-Q4_0.gguf").write_text("weights")

    found = found_in_a_new_process("org/tiny-GGUF:tiny-Q4_0.gguf", tmp_path, HF_HUB_OFFLINE="1")

    assert found == str(snapshot / "tiny-Q4_0.gguf")


def test_a_gguf_file_that_cannot_be_downloaded_is_unavailable_in_one_line(tmp_path: Path) -> None:
    printed = found_in_a_new_process("org/tiny-GGUF:other.gguf", tmp_path, HF_HUB_OFFLINE="1")

    assert printed.startswith("unavailable: 'org/tiny-GGUF:other.gguf' is no directory here and cannot be downloaded: ")
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("name", ["org/name:model.bin", "org/name:", "a/b/c:model.gguf", "/org/name:model.gguf"])
def test_a_name_of_a_file_that_is_no_gguf_is_no_model(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"org/name:FILE\.gguf"):
        find_model(name)


@pytest.mark.parametrize("name", ["an org/name", "org/na..me", "org/-name-", "org/" + "n" * 200])
def test_a_name_that_is_no_id_is_unavailable(name: str) -> None:
    with pytest.raises(ModelUnavailable, match="neither a directory nor a Hugging Face id") as caught:
        find_model(name)

    assert len(str(caught.value).splitlines()) == 1


def test_an_id_in_the_hub_cache_is_found_without_a_network(tmp_path: Path) -> None:
    snapshot = cache_model(tmp_path, "org", "tiny")

    assert found_in_a_new_process("org/tiny", tmp_path, HF_HUB_OFFLINE="1") == str(snapshot)


def test_a_cached_id_is_found_where_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    snapshot = cache_model(tmp_path, "org", "tiny")

    assert found_in_a_new_process("org/tiny", tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == str(snapshot)


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_an_id_that_cannot_be_downloaded_is_unavailable_in_one_line(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    printed = found_in_a_new_process("org/no-such", tmp_path, **environment)

    assert printed.startswith("unavailable: 'org/no-such' is no directory here and cannot be downloaded: ")
    assert len(printed.splitlines()) == 1


def test_a_cached_id_without_config_is_no_model(tmp_path: Path) -> None:
    (cache_model(tmp_path, "org", "tiny") / "config.json").unlink()

    printed = found_in_a_new_process("org/tiny", tmp_path, HF_HUB_OFFLINE="1")

    assert printed.startswith("unavailable: 'org/tiny' holds no config.json: ")
    assert "org/tiny:FILE.gguf" in printed
