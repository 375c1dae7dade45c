"""What the documents name is there: files, images, headings, modules, definitions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("espo_gateway", "espo_rl", "scripts", "tests")
DOCUMENTS = sorted(ROOT.glob("*.md")) + [
    path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))
]
#: Code and settings, which name commands, too.
OTHERS = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh", ".toml")
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:-m|--module)[ \n]+(espo_[\w.]*\w)")
SCRIPT = re.compile(r"(?<![\w/.])scripts/[\w./-]*\w")
OWN = re.compile(r"`((?:espo_gateway|espo_rl|tests)/[\w./-]+)`")
DOTTED = re.compile(r"`((?:espo_gateway|espo_rl)(?:\.\w+)+)\b")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def headings(document: Path) -> Iterator[str]:
    """As a link to them is written."""
    for heading in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def module(dotted: str) -> Path | None:
    path = ROOT / dotted.replace(".", "/")
    found = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in found if file.exists()), None)


def test_the_front_door_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("path", [*DOCUMENTS, *OTHERS], ids=name)
def test_commands_are_there(path: Path) -> None:
    for command in COMMAND.findall(path.read_text()):
        file = module(command)
        assert file is not None, command
        main = file.with_name("__main__.py") if file.name == "__init__.py" else file
        assert main.exists(), command
        assert "__main__" in main.read_text() or main.name == "__main__.py", command


@pytest.mark.parametrize("path", [*DOCUMENTS, *OTHERS, ROOT / "pyproject.toml"], ids=name)
def test_extras_are_installed_from_the_clone(path: Path) -> None:
    """An `espo` that a package index has is somebody else's."""
    assert not re.search(r"pip install\s+(?:-\S+\s+)*['\"]?espo\b", path.read_text()), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_and_definitions_are_there(document: Path) -> None:
    text = document.read_text()
    for path in SCRIPT.findall(text) + OWN.findall(text):
        assert "NAME" in path or (ROOT / path).exists(), path
    for dotted in DOTTED.findall(text):
        owner, _, definition = dotted.rpartition(".")
        if module(dotted) is None:
            file = module(owner)
            assert file is not None, dotted
            assert re.search(
                rf"^(class|def) {definition}\b|^{definition}\b.*=|import.*\b{definition}\b",
                file.read_text(),
                re.MULTILINE,
            ), dotted
