"""GGUF files by the commands of the terminal: what doctor says of one, and how a start ends on a broken one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.engine.openvino_fit import fits_cpu
from tests.contract.loops import MOST_S
from tests.contract.servers import complaints, environment, free_port, program
from tests.gguf_files import Kind, write_gguf

pytestmark = pytest.mark.door

BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda whole: whole[: len(whole) // 2], "download it again"),
    "a web page": (lambda _: b"<!doctype html><title>404</title>", "is no GGUF file"),
    "layers without end": (lambda whole: with_layers(whole, 2**31), "2147483648 layers"),
}


def with_layers(whole: bytes, count: int) -> bytes:
    key = b"qwen3.block_count\x04\x00\x00\x00"
    at = whole.index(key) + len(key)
    return whole[:at] + count.to_bytes(4, "little") + whole[at + 4 :]


@pytest.fixture(scope="module")
def file(seedling: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "seedling.gguf"
    write_gguf(seedling, path, lambda _: Kind.Q4_1)
    return path


def run(command: str, typed: str = "", **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("perennial"), command, *(["--bind", f"127.0.0.1:{free_port()}"] if command == "serve" else [])],
        input=typed,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=MOST_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "damage"), [("serve", "cut off"), ("chat", "a web page"), ("doctor", "layers without end")]
)
def test_a_broken_file_ends_each_command_with_one_line_and_status_1(
    command: str, damage: str, file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "model.gguf"
    damaged, words = BROKEN[damage]
    broken.write_bytes(damaged(file.read_bytes()))

    ended = run(command, "Hello\n", model=broken)

    (line,) = complaints(ended.stderr)
    assert ended.returncode == 1
    assert line.startswith("perennial: ")
    assert str(broken) in line
    assert words in line


def test_a_file_is_talked_to_as_any_model_is(file: Path) -> None:
    ended = run("chat", "Hello!\n", model=file)

    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("torch", r"weights .*\(dequantised: .*\d+ of Q4_1.*\)"),
        pytest.param(
            "openvino",
            r"\d+ of Q4_1: 4 bits with a scale in float16 and an offset for each 32, .* MiB for .*, no value rounded",
            marks=pytest.mark.skipif(not fits_cpu(), reason="OpenVINO's kernels were not tried on such a CPU"),
        ),
    ],
)
def test_doctor_says_what_each_kind_of_tensor_became(backend: str, words: str, file: Path) -> None:
    ended = run("doctor", model=file, backend=backend, dtype="float32")

    assert ended.returncode == 0, ended.stderr
    assert re.search(rf"^ *{words}$", ended.stdout, re.MULTILINE)
    assert "bit-exactness" in ended.stdout
