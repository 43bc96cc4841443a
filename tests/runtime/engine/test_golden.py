"""This machine gives the bits that others of its kernel class gave."""

from pathlib import Path

import pytest

from tests.runtime.engine import golden


@pytest.fixture(scope="module", params=golden.MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = str(request.param)
    return name, golden.directory_of(name, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("form", golden.FORMS, ids=" ".join)
def test_machines_of_one_kernel_class_give_the_same_bits(model: tuple[str, Path], form: tuple[str, str]) -> None:
    expected = golden.known().get(golden.here())
    if expected is None:
        pytest.skip(f"golden.json knows nothing of {golden.here()}: run `just golden` and commit the file")
    name, directory = model

    assert golden.digests(directory, *form) == expected[golden.name_of(name, *form)]
