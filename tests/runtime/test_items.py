"""Items of conversations: which are the same, and what the arguments of calls are."""

import pytest

from runtime.items import Call, keys_of, parsed_arguments


@pytest.mark.parametrize("levels", [50, 490, 500, 975, 985, 1_500, 100_000])
def test_arguments_of_many_levels_are_text_and_no_fault(levels: int) -> None:
    arguments = '{"a": ' + "[" * levels + "]" * levels + "}"

    assert (parsed_arguments(arguments) is None) == (levels > 50)
    assert keys_of([Call("f", arguments, "1")]) == keys_of([Call("f", arguments, "2")])
