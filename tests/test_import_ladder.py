"""Imports run one way: a folder uses only what stands below it, and no file another in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
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
        ("vllm_plugin",),
        ("stop",),
        ("config",),
        ("addresses", "client", "errors", "event_loop", "files", "optional", "supervisor"),
    ),
    "espo_rl": (
        ("run",),
        ("train",),
        ("loop", "collect", "probe", "resumption"),
        ("evaluate", "replay", "report", "pretrain_critic", "base_model"),
        ("record", "servers"),
        ("dry_run",),
        ("ppo", "checkpoints"),
        ("tasks", "gate", "rollouts"),
        ("config",),
        ("types", "tags", "unused", "first"),
    ),
}
ASIDE = {"espo_gateway.testing"}
#: The paper's maths can be read, and run, without any of these.
PURE = "espo_gateway.stop"
IMPURE = {"asyncio", "aiohttp", "torch", "httptools", "prometheus_client"}


def test_imports_run_down_the_ladder() -> None:
    assert list(breaches(ROOT)) == []


@pytest.mark.parametrize("package", LADDERS)
def test_the_front_page_lists_the_folders_in_this_order(package: str) -> None:
    table = (ROOT / "README.md").read_text().split(f"| `{package}/` |")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    heights = [
        [height for name in row if (height := rung(f"{package}.{name}")) is not None]
        for row in rows
    ]
    assert all(min(above) >= max(below) for above, below in pairwise(heights))


def breaches(root: Path) -> Iterator[str]:
    """What is wrong in the packages below a folder, and in which line."""
    paths = dict(modules(root))
    trees = {module: ast.parse(path.read_text()) for module, path in paths.items()}
    uses: dict[str, dict[str, str]] = {}  # by module: what it imports, and the line that does
    for module, tree in trees.items():
        where = paths[module].relative_to(root)
        uses[module] = {
            used: f"{where}:{line} imports {used}" for line, used in imports(tree, paths)
        }
        yield from (f"{where}:{line} {what}" for line, what in hidden(tree))
        for used, line in uses[module].items():
            yield from (f"{line}, {why}" for why in misplaced(module, used))
    try:
        TopologicalSorter({module: paths.keys() & uses[module] for module in paths}).prepare()
    except CycleError as circle:
        ring = circle.args[1][::-1]
        yield "; ".join(uses[one][other] for one, other in pairwise(ring))
    reached = {module for module in paths if room(module) == PURE}
    while more := {used for module in reached for used in paths.keys() & uses[module]} - reached:
        reached |= more
    for module in sorted(reached):
        for used, line in uses[module].items():
            if used.split(".")[0] in IMPURE:
                yield f"{line}, and {PURE} is pure"


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    for package in LADDERS:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(tree: ast.AST, paths: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and name of each module that a file imports, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield node.lineno, name if name in paths else origin


def hidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Imports of our own for type checkers only, or inside a function: a circle may be behind.

    But a command may import its work when it has read its arguments: in `main` of a file that is
    run, whose imports are held to the ladder like all others.
    """
    for node in ast.walk(tree):
        if "TYPE_CHECKING" in (getattr(node, "id", None), getattr(node, "attr", None)):
            assert isinstance(node, ast.expr)
            yield node.lineno, "hides an import behind TYPE_CHECKING"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node not in mains(tree):
            for line, used in imports(node, {}):
                if used.split(".")[0] in LADDERS:
                    yield line, f"imports {used} in a function"


def mains(tree: ast.AST) -> list[ast.stmt]:
    """`main` of a file that is run as a command; none in any other."""
    body = getattr(tree, "body", [])
    tests = [ast.unparse(node.test) for node in body if isinstance(node, ast.If)]
    if "__name__ == '__main__'" not in tests:
        return []
    return [node for node in body if getattr(node, "name", None) == "main"]


def misplaced(module: str, used: str) -> Iterator[str]:
    """Why a module may not import another, if it may not."""
    package, other = module.split(".")[0], used.split(".")[0]
    if used.startswith("."):
        yield "which is relative"
    elif package == "espo_gateway" and other == "espo_rl":
        yield "and the gateway knows no trainer"
    elif package == other and room(module) != room(used):
        above, below = rung(module), rung(used)
        if above is None:
            yield f"and {room(module)} has no place on the ladder"
        elif below is None or below >= above:
            yield "which does not stand below it"


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def rung(module: str) -> float | None:
    """Height from the ground, 0; what stands beside the ladder may look down on all of it."""
    package, _, name = room(module).partition(".")
    if room(module) in ASIDE:
        return float("inf")
    for height, rooms in enumerate(reversed(LADDERS[package])):
        if name in rooms:
            return height
    return None


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"front/a": "", "app": "from espo_gateway.front import a"}, None),
        ({"stop/a": "", "stop/b": "from espo_gateway.stop.a import x"}, None),
        ({"testing/a": "import espo_gateway.app", "app": ""}, None),
        (
            {"stop/a": "\nfrom espo_gateway.front.b import x", "front/b": ""},
            "espo_gateway/stop/a.py:2 imports espo_gateway.front.b, which does not stand below it",
        ),
        ({"traces/a": "from espo_gateway import critic", "critic/__init__": ""}, "not stand below"),
        ({"app": "import espo_gateway.testing.a", "testing/a": ""}, "not stand below"),
        ({"attic/a": "import espo_gateway.errors", "errors": ""}, "gateway.attic has no place"),
        ({"app": "import espo_rl.config"}, "app.py:1 imports espo_rl.config, and the gateway"),
        ({"front/a": "from . import b", "front/b": ""}, "a.py:1 imports ., which is relative"),
        (
            {"stop/a": "import espo_gateway.stop.b", "stop/b": "\nimport espo_gateway.stop.a"},
            "stop/b.py:2 imports espo_gateway.stop.a",
        ),
        ({"app": "import typing\nif typing.TYPE_CHECKING: pass"}, "app.py:2 hides an import"),
        (
            {"app": "def f():\n import espo_gateway.errors", "errors": ""},
            "app.py:2 imports espo_gateway.errors in a function",
        ),
        ({"stop/a": "def f():\n import torch.nn"}, "stop/a.py:2 imports torch.nn, and"),
        (
            {"stop/a": "import espo_gateway.errors", "errors": "import aiohttp"},
            "errors.py:1 imports aiohttp, and espo_gateway.stop is pure",
        ),
    ],
)
def test_a_breach_is_named(tmp_path: Path, files: dict[str, str], said: str | None) -> None:
    for name, source in files.items():
        path = tmp_path / "espo_gateway" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    found = list(breaches(tmp_path))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
