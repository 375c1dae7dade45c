"""Imports run one way: a folder uses only what stands below it, and no file another in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Top to bottom. What stands on one rung does not import its neighbours there; a folder's own files
#: may import each other. Beside the ladder, `testing` may import anything of the gateway.
LADDERS = {
    "espo_gateway": (
        ("__main__",),
        ("app",),
        ("startup", "admin"),
        ("front",),
        ("tuning", "telemetry"),
        ("traces", "critic"),
        ("stream",),
        ("upstream",),
        ("stop", "vllm_plugin"),
        ("config",),
        ("addresses", "errors", "files", "optional", "supervisor"),
    ),
    "espo_rl": (
        ("run",),
        ("train",),
        ("loop", "collect"),
        ("evaluate", "replay", "report", "pretrain_critic", "base_model"),
        ("record", "servers"),
        ("dry_run", "ppo", "checkpoints"),
        ("tasks", "gate", "rollouts"),
        ("config", "types"),
    ),
}
ASIDE = {"espo_gateway.testing"}
#: The paper's maths can be read, and run, without any of these.
IMPURE = {"asyncio", "aiohttp", "torch", "httptools", "prometheus_client"}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(found for package in LADDERS for found in modules(package))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each module that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if name in MODULES else str(node.module)


def rung(module: str) -> int | None:
    """0 is the ground; None for what stands beside the ladder."""
    package, _, rest = module.partition(".")
    if ".".join(module.split(".")[:2]) in ASIDE or not rest:
        return None
    ladder = LADDERS[package]
    room = rest.partition(".")[0]
    for height, rooms in enumerate(reversed(ladder)):
        if room in rooms:
            return height
    raise AssertionError(f"{module} has no place on the ladder of {package}")


def folder(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down_the_ladder(module: str) -> None:
    path = MODULES[module]
    for line, used in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {used}"
        if used.split(".")[0] not in LADDERS or folder(used) == folder(module):
            continue
        if module.startswith("espo_gateway"):
            assert not used.startswith("espo_rl"), f"{where}: the gateway knows no trainer"
        if module.split(".")[0] != used.split(".")[0]:
            continue
        above, below = rung(module), rung(used)
        if above is None:
            continue
        assert below is not None, f"{where}, which stands beside the ladder"
        assert above > below, f"{where}, which does not stand below it"


@pytest.mark.parametrize("package", LADDERS)
def test_no_circle(package: str) -> None:
    graph = {
        name: {used for _, used in imports(MODULES[name])} & MODULES.keys() for name in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        raise AssertionError(" -> ".join(circle.args[1])) from None


@pytest.mark.parametrize("module", MODULES)
def test_no_circle_is_hidden(module: str) -> None:
    """By an import for type checkers only, or by one inside a function.

    But a command may import its work when it has read its arguments: in `main` of a file that is
    run, whose imports are held to the ladder like all others.
    """
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    entries = mains(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id != "TYPE_CHECKING", f"{path.relative_to(ROOT)}:{node.lineno}"
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node in entries:
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom):
                own = str(inner.module).split(".")[0] in LADDERS
                assert not own, f"{path.relative_to(ROOT)}:{inner.lineno} imports in a function"


def mains(tree: ast.Module) -> list[ast.stmt]:
    """`main` of a file that is run as a command; none in any other."""
    tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    if "__name__ == '__main__'" not in tests:
        return []
    return [node for node in tree.body if getattr(node, "name", None) == "main"]


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("espo_gateway.stop")])
def test_the_decision_is_pure(module: str) -> None:
    path = MODULES[module]
    for line, used in imports(path):
        assert used.split(".")[0] not in IMPURE, f"{path.relative_to(ROOT)}:{line} imports {used}"
