"""Agents from npm and PyPI in a folder of their own, and processes of them: each with an empty home and no other network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

NPM = {
    "@openai/codex": "0.171.0",
    "@anthropic-ai/claude-code": "2.1.332",
    "opencode-ai": "1.18.33",
    "@mariozechner/pi-coding-agent": "0.73.1",
    "@qwen-code/qwen-code": "0.24.4",
}
PYPI = ("openai[realtime]==3.57.0", "openai-agents==0.24.0")
_CACHE = Path(os.environ.get("PERENNIAL_AGENTS", Path.home() / ".cache" / "perennial-agents"))
_LONGEST_S = 120
_LONGEST_REGISTRY_S = 60


def node_program(package: str, name: str) -> Path:
    """The command `name` of a package from npm, installed if it is not yet. Skips the test where there is no way to."""
    home, wanted = _CACHE / "node", f"{package}@{NPM[package]}"
    installed = home / "node_modules" / package / "package.json"
    if not installed.exists() or json.loads(installed.read_text())["version"] != NPM[package]:
        npm = shutil.which("npm") or pytest.skip("there is no npm")
        home.mkdir(parents=True, exist_ok=True)
        _ask_registry([npm, "view", wanted, "version"])
        _install([npm, "install", "--prefix", str(home), "--no-audit", "--no-fund", wanted])
    return home / "node_modules" / ".bin" / name


def python_program() -> Path:
    """An interpreter that has what `PYPI` names, installed if it is not yet. Skips the test where there is no way to."""
    home = _CACHE / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    python, installed = home / "bin" / "python", home / "installed"
    if not installed.exists() or installed.read_text() != "\n".join(PYPI):
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        _ask_registry([str(python), "-m", "pip", "index", "versions", "openai"])
        _install([str(python), "-m", "pip", "install", "-q", *PYPI])
        installed.write_text("\n".join(PYPI))
    return python


def _hear_interrupts() -> None:
    # What a shell starts behind it ignores SIGINT, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ask_registry(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_REGISTRY_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"no registry answers {command}")
    if done.returncode != 0:
        pytest.skip(f"no registry answers {command}: {done.stderr}")


def _install(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass
class Desk:
    """Where an agent works: an empty home, a folder with a project, and what the agent's environment has besides."""

    place: Path
    more: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in (self.home, self.project):
            folder.mkdir(parents=True)
        subprocess.run(["git", "init", "-q", self.project], check=True, env=self._environment)

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def project(self) -> Path:
        return self.place / "project"

    @property
    def _environment(self) -> dict[str, str]:
        # Whatever else an agent would ask is to find nobody.
        nobody = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
        nobody |= {name.upper(): url for name, url in nobody.items()}
        local = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
        kept = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(self.home), "TERM": "dumb"}
        return {**kept, **nobody, **local, "DO_NOT_TRACK": "1", **self.more}

    def write(self, path: str, text: str) -> None:
        """Writes a file of the agent's home."""
        file = self.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    async def run(self, *command: str | Path) -> str:
        """What an agent says that works to its end. Raises TooSlowError, and AssertionError where it fails."""
        with trio.fail_after(_LONGEST_S):
            done = await trio.run_process([*map(str, command)], **self._how, check=False)
        said = str(done.stdout, errors="replace")
        assert done.returncode == 0, said
        return said

    async def interrupt(self, until: Awaitable[None], *command: str | Path) -> None:
        """Has an agent work until that returns, and then be interrupted as from a terminal. Raises TooSlowError."""
        how = {**self._how, "start_new_session": True, "preexec_fn": _hear_interrupts}
        agent = partial(trio.run_process, [*map(str, command)], **how, check=False)
        with trio.fail_after(_LONGEST_S):
            async with trio.open_nursery() as nursery:
                process = await nursery.start(agent)
                await until
                # All of it: some agents are a wrapper that starts the agent.
                os.killpg(process.pid, signal.SIGINT)

    @property
    def _how(self) -> dict[str, Any]:
        return {"cwd": self.project, "env": self._environment, "capture_stdout": True, "stderr": subprocess.STDOUT}
