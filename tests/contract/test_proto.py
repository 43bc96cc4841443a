"""The generated code is what the proto file gives."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generating_the_code_anew_changes_nothing(tmp_path: Path) -> None:
    recipe = (ROOT / "justfile").read_text().split("\nproto:\n")[1].splitlines()[0]
    into = {"--python_betterproto2_out=proto": tmp_path, "--descriptor_set_out=proto": tmp_path}
    (tmp_path / "kakeya" / "v1").mkdir(parents=True)
    words = shlex.split(recipe)
    for index, word in enumerate(words):
        for start, folder in into.items():
            if word.startswith(start):
                words[index] = start.removesuffix("proto") + str(folder) + word.removeprefix(start)
    assert words.count("-Iproto") == 1
    assert sum(str(tmp_path) in word for word in words) == len(into)

    # protoc finds its plugin on the path.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, env=os.environ | {"PATH": path}, check=True, capture_output=True
    )

    # These two would make the whole of `proto` ours, which is also the package of the distribution proto-plus.
    (tmp_path / "__init__.py").unlink()
    (tmp_path / "py.typed").rename(tmp_path / "kakeya" / "py.typed")
    made = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert Path("kakeya/v1/runtime.binpb") in made
    assert made == {file: (ROOT / "proto" / file).read_bytes() for file in made}
    generated = {file.relative_to(ROOT / "proto") for file in (ROOT / "proto").rglob("*.py")}
    assert generated <= set(made)
