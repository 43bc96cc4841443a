"""The ownership table of `actors/__init__.py` against the code, by its syntax."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args, get_origin

import pytest

import actors
from actors import messages

DIRECTORY = Path(actors.__file__).parent

# What each word in the table's column "owns" is in the code; whatever else an actor has, it was given at its start.
OWNED: dict[str, dict[str, set[str]]] = {
    "Session": {
        "history": {"_history", "_digest"},
        "slab contents": {"_slab", "_feed", "_lease"},
        "terms": {"_terms"},
        "durable record": {"_durable"},
        "last-used time": {"_last_used", "_turn_began"},
    },
    "ModelExecutor": {
        "engine": {"_engine"},
        "its thread": {"_thread"},
        "rows that wait or run": {"_waiting", "_running"},
        "leases": {"_leases", "_alarm"},
        "pace of forwards": {"_pace"},
    },
    "SessionRegistry": {
        "ids to sessions": {"_entries"},
        "sessions on the way to or from sleep": {"_passing"},
        "slab pools": {"_long_lived", "_completions"},
    },
    "Conversations": {
        "the tree of points": {"points"},
        "which sessions stand where": {"_standing"},
        "reads ahead": {"_reading"},
        "turn reports": {"_reports"},
    },
    "Admission": {"permits": {"_permits"}, "FIFO of waiters": {"_permits", "_line"}},
}
# What an actor has made a part of itself.
PARTS = {"Session": ["Feed"]}
# Calls by which another is asked: through its mailbox, or through a handle.
ASKING = {"ask", "ask_to_the_end", "stream", "rewind", "fork_session"}
# Not state that anyone could want: how a session or the executor came to its end, and what Admission reads from its settings.
INCIDENTAL = {
    "Session": {"_ending"},
    "ModelExecutor": {"_is_open", "_is_quiet", "_error"},
    "Admission": {"_longest_wait_s", "_results"},
}


def table() -> dict[str, dict[str, str]]:
    """Each actor's row, by the names of the columns."""
    assert actors.__doc__
    lines = [line.strip("| ").split(" | ") for line in actors.__doc__.splitlines() if line.startswith("|")]
    head, _, *rows = lines
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def classes() -> dict[str, ast.ClassDef]:
    trees = [ast.parse(path.read_text()) for path in DIRECTORY.glob("*.py")]
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def assigned_in_init(actor: ast.ClassDef) -> dict[str, ast.expr | None]:
    """The attributes that `__init__` gives to `self`, each with its value."""
    init = next(node for node in actor.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    found: dict[str, ast.expr | None] = {}
    for node in ast.walk(init):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute):
                    found[target.attr] = node.value
    return found


def assigned_anywhere(node: ast.AST) -> list[ast.Attribute]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)]


def test_the_table_names_every_actor_and_each_is_a_class() -> None:
    assert table().keys() == OWNED.keys()
    assert OWNED.keys() <= classes().keys()


@pytest.mark.parametrize("name", OWNED)
def test_an_actor_owns_what_the_table_says(name: str) -> None:
    assert table()[name]["owns, nobody else writes or holds it"].split(", ") == list(OWNED[name])
    owned = set().union(*OWNED[name].values())
    assert owned <= assigned_in_init(classes()[name]).keys()


@pytest.mark.parametrize("name", OWNED)
def test_whatever_else_an_actor_has_was_given_to_it_and_is_never_replaced(name: str) -> None:
    actor = classes()[name]
    owned = set().union(*OWNED[name].values()) | INCIDENTAL.get(name, set())
    given = {attribute: value for attribute, value in assigned_in_init(actor).items() if attribute not in owned}
    made = [
        attribute
        for attribute, value in given.items()
        # `x or default` of a parameter is still what was given.
        if not isinstance(value.values[0] if isinstance(value, ast.BoolOp) else value, ast.Name)
    ]
    replaced = [each.attr for each in assigned_anywhere(actor) if each.attr in given]
    assert made == []
    assert sorted(replaced) == sorted(given)


@pytest.mark.parametrize("name", OWNED)
def test_an_actor_gets_all_its_attributes_at_its_start(name: str) -> None:
    actor = classes()[name]
    assert {each.attr for each in assigned_anywhere(actor)} == assigned_in_init(actor).keys()


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.py")), ids=lambda path: path.stem)
def test_nobody_assigns_an_attribute_of_another_object(path: Path) -> None:
    foreign = [
        ast.unparse(each)
        for each in assigned_anywhere(ast.parse(path.read_text()))
        # An error's context is Python's own bookkeeping, and a cancel scope's deadline is there to be set.
        if not (isinstance(each.value, ast.Name) and each.value.id == "self")
        and each.attr not in ("__context__", "deadline")
    ]
    assert foreign == []


@pytest.mark.parametrize("name", OWNED)
def test_only_an_actor_whose_row_says_so_asks_another(name: str) -> None:
    whole = [classes()[each] for each in (name, *PARTS.get(name, []))]
    calls = [node.func for each in whole for node in ast.walk(each) if isinstance(node, ast.Call)]
    asks = {func.attr for func in calls if isinstance(func, ast.Attribute)} & ASKING
    assert bool(asks) == (table()[name]["asks"] != "nobody")


def test_each_message_is_taken_by_one_actor_of_the_table() -> None:
    of_session = [(get_origin(kind) or kind).__name__ for kind in get_args(messages.SessionMessage)]
    tree = ast.parse(Path(messages.__file__).read_text())
    made = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("Message[") for base in node.bases)
    }
    taken: list[str] = []
    for row in table().values():
        if row["takes"] == "its SessionMessages":
            taken += of_session
        elif not row["takes"].startswith("("):
            taken += row["takes"].split(", ")
    assert sorted(taken) == sorted(made)
