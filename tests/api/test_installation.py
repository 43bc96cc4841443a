"""What a wheel installs, what a client loads of it, and that whatever takes its place is named."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = {"actors", "api", "proto", "runtime"}
ENGINES_AND_DOORS = {
    "torch",
    "transformers",
    "llguidance",
    "openvino",
    "quart",
    "quart_trio",
    "hypercorn",
    "trio_asyncio",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a copy of the tracked files, as of an archive without a history."""
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(source / "dist"),
        str(source),
    ]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ""})
    return next((source / "dist").iterdir())


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Path:
    """A folder in which the wheel is installed."""
    folder = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


# An editable installation finds our modules wherever else they are missing.
NOT_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


def run(code: str, *path: Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter that looks for modules in `path` first, and not in `folder`, where it runs."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-P", "-c", NOT_EDITABLE + code],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def printed(code: str, *path: Path, folder: Path = ROOT) -> list[str]:
    done = run(code, *path, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_wheel_has_our_four_packages_and_nothing_that_another_distribution_has(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}

    assert {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")} == PACKAGES
    assert {name.name for name in names if len(name.parts) == 2 and name.parts[0] == "proto"} == {"message_pool.py"}
    assert {
        Path("api/py.typed"),
        Path("actors/py.typed"),
        Path("runtime/py.typed"),
        Path("proto/kakeya/py.typed"),
    } <= names
    assert {Path("runtime/seedling/draft/model.safetensors"), Path("api/page/index.html")} <= names


def test_proto_is_shared_with_a_package_of_that_name_in_the_same_folder(site: Path) -> None:
    (site / "proto" / "__init__.py").write_text("whose = 'proto-plus'")

    told = "import proto, proto.kakeya.v1 as ours; print(proto.whose, ours.CreateSessionRequest('x').client_label)"
    assert printed(told, site) == ["proto-plus x"]


IMPORT = """
import asyncio, os, sys, warnings
def state():
    return {**vars(asyncio), **vars(asyncio.events), **os.environ, "finders": [*sys.meta_path], "warnings": [*warnings.filters]}
before = state()
import api.client, api.client_sync
print([name for name, value in state().items() if name in before and value is not before[name] and value != before[name]])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
print(*(str(vars(module).get("__file__")) for name, module in sys.modules.items() if name.partition(".")[0] in %r))
"""


def test_a_client_loads_no_engine_and_no_door_and_changes_nothing_for_others(site: Path) -> None:
    changed, loaded, _ = printed(IMPORT % PACKAGES, site)

    assert changed == "[]"
    assert not ENGINES_AND_DOORS & {*loaded.split()}


def test_a_chat_with_a_server_elsewhere_waits_for_no_engine(site: Path) -> None:
    [loaded] = printed("import sys, api.chat; print(*sys.modules)", site)

    # Tokenizers come with grammars, which need little.
    assert not (ENGINES_AND_DOORS - {"llguidance"}) & {*loaded.split()}


def test_the_clients_distribution_has_all_that_it_loads_in_trio_too(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())
    for source, target in project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        files = [ROOT / "client" / source]
        for file in files[0].rglob("*.py") if files[0].is_dir() else files:
            place = tmp_path / target / file.relative_to(files[0])
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())

    _, loaded, files_of_ours = printed(
        IMPORT.replace("api.client_sync", "api.client_sync, api.bridge") % PACKAGES, tmp_path
    )

    assert all(file in ("None", str(None)) or Path(file).is_relative_to(tmp_path) for file in files_of_ours.split())
    whose = packages_distributions()
    needed = closure(project["project"]["dependencies"])
    foreign = {name for module in loaded.split() if module not in PACKAGES for name in whose.get(module, [])}
    assert {name.lower().replace("_", "-") for name in foreign} - BESIDE <= needed


# Whatever Python starts with in a development environment; pydantic is loaded by betterproto2 where it is there.
BESIDE = {"perennial", "setuptools", "pip", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"}


def closure(requirements: list[str]) -> set[str]:
    """The names of the distributions that these need, themselves included."""
    found: set[str] = set()
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        one = waiting.pop()
        name = one.name.lower().replace("_", "-")
        if name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += [Requirement(each) for each in requires(one.name) or ()]
    return found


WAITING = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
import {entry}
"""


@pytest.mark.parametrize(
    "entry", ["actors.tree", "actors.messages", "api.http", "api.doors", "bench.__main__", "tools.gpu_check"]
)
def test_threads_of_openmp_are_told_to_wait_quietly_before_torch_is_loaded(
    entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)

    assert printed(WAITING.format(entry=entry), ROOT) == ["passive"]


SAID = "from api import installation; print(*installation.intruders(), sep='\\n'); print('--'); print(*installation.rivals())"


def test_an_installation_as_it_was_made_has_neither_intruders_nor_rivals(site: Path, tmp_path: Path) -> None:
    assert printed(SAID, site, folder=tmp_path) == ["", "--", ""]


def test_a_file_that_another_distribution_has_overwritten_is_named_with_it(site: Path, tmp_path: Path) -> None:
    other = site / "other-1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (other / "RECORD").write_text("runtime/rows.py,sha256=x,1\n")
    (site / "runtime" / "rows.py").write_text("")
    (site / "runtime" / "slab.py").unlink()

    first, second, *_ = printed(SAID, site, folder=tmp_path)

    assert first.startswith(f"{site}/runtime/rows.py was changed by other: pip install --force-reinstall")
    assert second.startswith(f"{site}/runtime/slab.py was changed by something")


def test_a_package_from_elsewhere_is_named_by_a_command_that_fails_for_it(site: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "runtime").mkdir(parents=True)
    (other / "runtime" / "__init__.py").touch()

    done = run("from api.entry import main; raise SystemExit(main())", other, site, folder=tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith(f"perennial: runtime comes from {other}/runtime/__init__.py, not from {site}: ")


def test_a_folder_that_would_take_our_place_where_a_server_is_started_is_named(site: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "api.py").touch()

    (*_, rivals) = printed(SAID, site, folder=tmp_path / "here")

    assert rivals.startswith(f"{tmp_path}/here/api.py takes the place of ours")


def test_files_that_run_from_a_clone_beside_an_installation_are_named(site: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in PACKAGES:
        (clone / name).symlink_to(ROOT / name)

    (*_, rivals) = printed(SAID, clone, site, folder=tmp_path)

    assert rivals.startswith(f"what runs is in {ROOT}, not what is installed in {site}")


BENCH = "import sys; sys.argv[1:] = ['bench', '-h']; from api.entry import main; raise SystemExit(main())"


def test_benchmarks_that_are_not_installed_are_said_to_be_in_the_repository(site: Path, tmp_path: Path) -> None:
    done = run(BENCH, site, folder=tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith("perennial: the benchmarks are part of the repository")
    assert done.stderr.count("\n") == 1


def test_benchmarks_of_a_clone_run_from_any_folder(tmp_path: Path) -> None:
    assert printed(BENCH, ROOT, folder=tmp_path)[0].startswith("usage: perennial bench")
