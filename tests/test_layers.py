"""Imports go strictly downwards, and only one package knows aio-pika."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import aioworkq

PACKAGE = Path(aioworkq.__file__).parent

LAYERS: dict[str, int] = {
    "errors": 0,
    "changes": 0,
    "background": 1,
    "message": 1,
    "codec": 1,
    "retry": 1,
    "lifecycle": 1,
    "versions": 1,
    "redelivery": 2,
    "topology": 2,
    "outcome": 2,
    "statistics": 2,
    "pace": 2,
    "delay": 3,
    "broker": 3,
    "options": 3,
    "amqp": 4,
    "handler": 4,
    "delays": 4,
    "memory": 5,
    "outbox": 5,
    "connect": 6,
    "settle": 6,
    "batch": 6,
    "producer": 7,
    "run_state": 7,
    "trials": 7,
    "orphans": 7,
    "handler_tasks": 7,
    "slots": 8,
    "calls": 8,
    "duplicates": 8,
    "admission": 9,
    "runs": 10,
    "batches": 11,
    "consumer": 12,
    "worker": 13,
    "dead_letters": 13,
    "script": 14,
    "testing": 14,
    "_testing_kit": 14,
    "pytest_plugin": 14,
    "_cluster": 14,
    "_lifetime": 14,
    "_node": 14,
    "_node_parts": 14,
    "_watchdog": 14,
}
"""The layer of each module; imports go from higher numbers to lower ones."""

DOOR = {"aio_pika", "aiormq", "pamqp"}
STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path, *, at_run_time: bool) -> set[str]:
    """Return the modules that a file imports; those for type checkers only unless asked not to."""
    found: set[str] = set()
    pending: list[ast.AST] = [parsed(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and is_type_checking(node) and at_run_time:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        # An import is a statement: there is none within expressions, which are most of a file.
        children = ast.iter_child_nodes(node)
        pending.extend(child for child in children if isinstance(child, STATEMENTS))
    return found


def layer_of(module: str) -> int:
    return LAYERS[module.split(".")[1]]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    """No module imports one of its own layer or of a higher one, run time and typing alike."""
    relative = path.relative_to(PACKAGE)
    if str(relative) == "__init__.py":
        return
    package = relative.parts[0].removesuffix(".py")
    own = LAYERS[package]
    for module in imports(path, at_run_time=True):
        if not module.startswith("aioworkq.") or module.split(".")[1] == package:
            continue
        target = module.split(".")[1]
        is_same_edge = own == LAYERS[target] == LAYERS["testing"]
        assert layer_of(module) < own or is_same_edge, f"{relative} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_door_knows_aio_pika(path: Path) -> None:
    """aio-pika, aiormq and pamqp are imported in amqp/ and nowhere else."""
    known = {module.split(".")[0] for module in imports(path, at_run_time=False)} & DOOR
    assert not known or path.relative_to(PACKAGE).parts[0] == "amqp"


def test_every_module_has_a_layer() -> None:
    """A new module must be given its place."""
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert names - {"__init__"} == set(LAYERS)


def test_the_core_is_pure() -> None:
    """The layers under broker.py wait for nothing, and ask neither a clock nor chance."""
    for path in modules():
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if (
            name == "__init__"
            or LAYERS[name] > LAYERS["delay"]
            or name in {"changes", "background", "broker"}
        ):
            continue
        source = parsed(path)
        assert not [node for node in ast.walk(source) if isinstance(node, ast.AsyncFunctionDef)]
        assert not imports(path, at_run_time=True) & {"asyncio", "anyio", "time", "random"}


def test_all_is_what_is_public() -> None:
    """`__all__` is sorted, complete and importable."""
    names = aioworkq.__all__
    assert len(names) == len(set(names))
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("aioworkq.")
        for alias in node.names
    }
    assert set(names) == imported
    for name in names:
        assert getattr(aioworkq, name).__doc__
    assert set(names) <= set(dir(aioworkq))


def test_what_few_programs_need_is_imported_when_it_is_needed() -> None:
    """Every program pays for an import."""
    seldom = ("memory", "dead_letters", "testing", "amqp.documented")
    program = f"""
import sys
before = set(sys.modules)  # what measures the coverage of tests is there already
import aioworkq
early = [name for name in {seldom} if "aioworkq." + name in sys.modules]
early += [name for name in ("hashlib", "anyio.to_thread") if name in set(sys.modules) - before]
assert not early, early
assert aioworkq.DeadLetters is not None and "aioworkq.dead_letters" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
