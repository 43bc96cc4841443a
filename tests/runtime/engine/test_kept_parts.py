"""A model's parts in a bundle: the same bits as without one, whatever becomes of its files, and weights in memory once."""

import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from runtime.bundles import BundleName, new_bundle
from runtime.engine import load_engine
from runtime.engine.machine import Level, level
from runtime.engine.openvino_fit import fits_cpu
from runtime.settings import Settings
from tests.conftest import SMALL, save_random_model
from tests.gguf_files import blocks_alone, every_kind, write_gguf
from tests.runtime.disks import set_disk
from tests.runtime.engine.feeding import LogitsEngine, feed, random_tokens, without_products_of_bytes

pytestmark = [
    pytest.mark.skipif(not fits_cpu(), reason="OpenVINO's kernels were not tried on such a CPU"),
    pytest.mark.usefixtures("roomy_disk"),
]

FORMAT = {"format": "pt"}
PLAIN = ("bfloat16" if level() >= Level.AVX512_BF16 else "float32", "none")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bundles lie, of which there are none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "perennial" / "graphs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(**SMALL | {"hidden_size": 256, "intermediate_size": 512})
    directory = save_random_model(config, tmp_path_factory.mktemp("model"))
    write_gguf(directory, directory / "model.gguf", every_kind)
    write_gguf(directory, directory / "blocks.gguf", blocks_alone)
    return directory


def loaded(model: Path, dtype: str = "bfloat16", weights: str = "int8") -> LogitsEngine:
    settings = Settings(device="cpu", window=64, backend="openvino", determinism="fast", dtype=dtype, weights=weights)
    return cast(LogitsEngine, load_engine(settings, model))


def logits(engine: LogitsEngine) -> Tensor:
    """Of forwards of few and of many rows."""
    return feed(engine, engine.new_pool(1).acquire(), random_tokens(70, 2048), [1, 2, 32, 35])


def bundle_of(cache: Path) -> Path:
    (bundle,) = (one for one in cache.iterdir() if one.is_dir())
    return bundle


@pytest.mark.parametrize(
    ("dtype", "weights"), [PLAIN, ("bfloat16", "int8"), ("bfloat16", "int4"), ("bfloat16", "auto")]
)
def test_bits_and_facts_are_the_same_without_a_bundle_when_it_is_written_and_from_it(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, weights: str
) -> None:
    path = model / "model.gguf" if weights == "auto" else model
    written, read = (loaded(path, dtype, weights) for _ in range(2))
    assert {file.name for file in bundle_of(cache).iterdir()} >= {"index.json", "head", "first", "between-0", "last"}
    with no_home(monkeypatch):
        alone = loaded(path, dtype, weights)

    assert written.facts == read.facts == alone.facts
    assert torch.equal(logits(written), logits(alone))
    assert torch.equal(logits(read), logits(alone))


def test_bits_and_facts_of_rows_by_blocks_are_the_same_too(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_products_of_bytes(monkeypatch)
    path = model / "blocks.gguf"
    written, read = (loaded(path, weights="auto") for _ in range(2))
    assert bundle_of(cache).name.split("-")[2] == "blocks"
    with no_home(monkeypatch):
        alone = loaded(path, weights="auto")

    assert written.facts == read.facts == alone.facts
    assert torch.equal(logits(written), logits(alone))
    assert torch.equal(logits(read), logits(alone))


def test_what_kernels_have_packed_takes_no_memory_beside_it(large_model: Path, cache: Path) -> None:
    engines = [loaded(large_model) for _ in range(2)]
    for engine in engines:
        # Each token brings a piece of the embedding.
        feed(engine, engine.new_pool(1).acquire(), [5] * 40, [1, 39])
    size = sum(file.stat().st_size for file in bundle_of(cache).iterdir())

    # Both have mapped all of it, from where it was written and from where it lies.
    assert resident_bytes(cache) < size / 4


def test_a_model_that_was_replaced_is_read_anew(model: Path, tmp_path: Path, cache: Path) -> None:
    path = shutil.copytree(model, tmp_path / "model")
    before = logits(loaded(path))
    file = path / "model.safetensors"
    weights = load_file(file)
    # Of the same size, and in the same place.
    save_file({name: -weight if name == "lm_head.weight" else weight for name, weight in weights.items()}, file, FORMAT)

    assert torch.equal(logits(loaded(path)), -before)
    bundle_of(cache)


@pytest.mark.parametrize(
    ("part", "damage"),
    [("head", "a flipped bit"), ("between-0", "the end is lost"), ("embedding", "gone"), ("index.json", "gone")],
)
def test_a_damaged_bundle_is_told_of_in_a_line_and_written_anew(
    model: Path, cache: Path, part: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = logits(loaded(model))
    file = bundle_of(cache) / part
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "a flipped bit" else content[: len(content) // 2])
    with caplog.at_level(logging.WARNING, logger="perennial.engine"):
        engine = loaded(model)

    assert torch.equal(logits(engine), before)
    assert len(caplog.messages) == 1
    caplog.clear()
    assert torch.equal(logits(loaded(model)), before)
    assert not caplog.messages


@pytest.mark.parametrize("fault", ["no folder", "files of 64 KiB", "no room"])
def test_where_none_can_be_written_the_log_says_so_and_bits_are_the_same(
    model: Path, cache: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with no_home(monkeypatch):
        alone = logits(loaded(model))
    with caplog.at_level(logging.WARNING, logger="perennial.engine"), faulty(fault, cache, monkeypatch):
        engine = loaded(model)

    assert torch.equal(logits(engine), alone)
    (line,) = caplog.messages
    assert "memory holds weights twice" in line
    assert not cache.is_dir() or not any(one.is_dir() for one in cache.iterdir())


def test_a_bundle_of_a_model_that_cannot_be_looked_up_does_not_keep_others_from_being_written(
    model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The superuser, who may be who runs this, looks into every directory, but at no name as long as this.
    with new_bundle(cache, 0, lambda _: True) as writer:
        writer.finish(BundleName("forgotten", "state", "form"), {"model": f"/{300 * 'x'}/model"})
    with caplog.at_level(logging.WARNING, logger="perennial.engine"):
        loaded(model)

    assert not caplog.messages
    assert len([one for one in cache.iterdir() if one.is_dir()]) == 2


@contextmanager
def no_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the block this user has no cache."""
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "")
        patch.setattr("os.path.expanduser", lambda path: path)
        yield


@contextmanager
def faulty(fault: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        match fault:
            case "no folder":
                cache.parent.mkdir(parents=True)
                cache.touch()
            case "no room":
                set_disk(patch, 2**40, 0)
            case _:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def resident_bytes(folder: Path) -> int:
    """What this process has in memory of files under a folder."""
    total, is_one = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_one = len(values) > 4 and folder in Path(values[4]).parents
        elif name == "Rss:" and is_one:
            total += 1024 * int(values[0])
    return total
