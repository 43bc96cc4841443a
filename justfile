# Each line is what CI runs too; `just` alone lists them.
set shell := ["bash", "-euo", "pipefail", "-c"]
export PATH := env("VIRTUAL_ENV", justfile_directory() / ".venv") / "bin:" + env("PATH")

_list:
    @just --list

# Lints, types and import rules.
lint:
    ruff check . && ruff format --check . && mypy && lint-imports

# What a change should pass before each commit.
check: lint
    pytest -q -m "not door and not soak and not agents"

# Every test; the same as the README's command.
test:
    pytest -q -n 2 --dist loadfile

# The MLX engine on this machine: what it finds, its suite, and both doors' contract tests on it.
mlx:
    PERENNIAL_BACKEND=mlx perennial doctor
    pytest -q -n 2 --dist loadfile tests/runtime/engine -k mlx
    PERENNIAL_BACKEND=mlx PERENNIAL_DEVICE=auto pytest -q -n 2 --dist loadfile tests/contract

# The OpenVINO engine on this machine: what it finds, its suite, and both doors' contract tests on it.
openvino:
    PERENNIAL_BACKEND=openvino perennial doctor
    pytest -q -n 2 --dist loadfile tests/runtime/engine -k openvino
    PERENNIAL_BACKEND=openvino pytest -q -n 2 --dist loadfile tests/contract

# The CUDA engine's kernels by Triton's interpreter, on a machine without a GPU; wants triton, which torch for CUDA brings along.
kernels:
    TRITON_INTERPRET=1 pytest -q tests/runtime/engine/test_step_kernels.py

# The CUDA engine on the card of this machine: its exactness, its speed and its profile, as a table and as JSON.
gpu-check *options:
    python -m tools.gpu_check {{options}}

# Regenerates proto/ from runtime.proto.
proto:
    python -m grpc_tools.protoc -Iproto --python_betterproto2_out=proto --python_betterproto2_opt=client_generation=async,server_generation=async --descriptor_set_out=proto/kakeya/v1/runtime.binpb kakeya/v1/runtime.proto
    # `proto` is the package of another distribution too, so ours is a part of it and not all.
    rm proto/__init__.py && mv proto/py.typed proto/kakeya/

# Trains seedling and its siblings anew, then measures them and writes their card.
seedling:
    python -m tools.seedling.train && python -m tools.seedling.draft && python -m tools.seedling.diffusion && python -m tools.seedling.card

# Every benchmark, and bench/RESULTS.md; `--peers PYTHON` names the interpreter that has the peers. Nothing else should run.
bench *peers:
    python -m bench all {{peers}}

# Adds this machine's digests of logits and tokens to those that machines of its class are held to.
golden:
    python -m tests.runtime.engine.golden

# Takes the README's picture of the page anew; needs Chromium.
picture:
    python -m tests.contract.screenshot docs/page.png

# What recorded agents cost, as a page.
recordings:
    python -m tests.api.recordings_page

# Minutes of load: kills, chaos, 200 streams.
soak:
    pytest -q -s -m soak --timeout 0 tests/soak tests/api

# The deployment on a local cluster of Ray's: its contract, ten minutes of kills, a crowd; wants the extra `ray`, and a wheel of ours.
ray:
    pytest -q tests/contract/test_ray_serve.py
    pytest -q -s -m soak --timeout 0 tests/soak/test_ray_serve.py tests/soak/test_ray_scaling.py

# Agents from npm and PyPI against a model with a script, and what each turn cost them; skipped where no registry is reached.
agents:
    pytest -q -s -m agents --timeout 0 tests/agents

# UV_TORCH_BACKEND=cpu leaves out the libraries for CUDA, where uv reaches PyTorch's index. Fails if a Python is missing, after the others.
# The fast tests on each Python, and on 3.11 with the oldest versions that pyproject.toml allows; wants the extra `habits`.
matrix *pythons="3.11 3.12 3.13 3.14":
    missing=; for python in {{pythons}}; do \
        if uv python find -q $python; then just _on $python highest; else missing+=" $python"; fi; \
    done; just _on 3.11 lowest-direct; [ -z "$missing" ] || { echo "not found, and so not tried: Python$missing"; exit 1; }

_on python resolution:
    uv venv -q --clear --seed --python {{python}} build/matrix/{{python}}-{{resolution}}
    uv pip install -q --python build/matrix/{{python}}-{{resolution}} --resolution {{resolution}} -e ".[dev]"
    build/matrix/{{python}}-{{resolution}}/bin/python -m pytest -q -n 2 --dist loadfile -m "not door and not soak and not agents"

# Which lines no fast test runs; wants the extra `habits`.
coverage:
    coverage erase
    coverage run -m pytest -q -n 2 --dist loadfile -m "not door and not soak and not agents"
    coverage combine -q && coverage report

# Moves the fragments of changelog.d to CHANGELOG.md; wants the extra `habits`.
changelog version:
    towncrier build --yes --version {{version}}

# The documentation as a site in build/site, with a reference made from the code; wants the extra `site`.
site:
    python -m tools.site
