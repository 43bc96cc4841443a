"""Where the CPU knows more than AVX2, the exactness suite also runs as a machine with AVX2 alone would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.engine.machine import Level, level
from tests.runtime.engine.golden import AVX2_ALONE

_HERE = Path(__file__).parent
_SUITES = ("test_bit_exact.py", "test_linears.py", "test_attention.py", "test_probe.py", "test_golden.py")
_MOST_S = 900


@pytest.mark.skipif(level() <= Level.AVX2, reason="this CPU knows no more than AVX2: the suites ran so already")
def test_the_exactness_suite_passes_on_a_cpu_limited_to_avx2() -> None:
    suites = [str(_HERE / name) for name in _SUITES]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not mlx", *suites],
        env=os.environ | AVX2_ALONE,
        capture_output=True,
        text=True,
        timeout=_MOST_S,
        check=False,
    )

    print(run.stdout[-4000:])
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
