"""What the keys of a recipe are: default, what they may be, unit, meaning, the paper's value.

All of it is read from where it stands: types, defaults and comments in `sections`, and the paper's
own recipe, whose values are published unless a comment there says that they are ours.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import tokenize
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from textwrap import indent, wrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from espo_rl.config.files import RECIPES, RecipeError
from espo_rl.config.recipe import Recipe, nearest

#: the paper's set-up, and of which sections it says anything
PAPER, OF_PAPER = "espo-7b", ("rollout", "stopping", "ppo", "evaluation")
_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}


def overview() -> str:
    """The recipes of the package and the sections of any, a line each."""
    recipes = {path.stem: _first_sentence(path) for path in sorted(RECIPES.glob("*.toml"))}
    sections = {name: _about(cls).partition("\n")[0] for name, cls in _sections().items()}
    width = max(map(len, recipes | sections)) + 2
    return "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {name:{width}}{text}" for name, text in lines.items())
        for title, lines in (("recipes", recipes), ("sections of a recipe", sections))
    )


def explained(names: Sequence[str]) -> str:
    """The settings of these sections, or these keys (`section.key`); of none, all there are.

    Raises:
        RecipeError: there is no such thing; with what is meant, perhaps.
    """
    sections = _sections()
    parts = []
    for name in names or sections:
        section, _, key = name.partition(".")
        cls = sections.get(section)
        if cls is None or (key and key not in cls.model_fields):
            near = nearest(name)
            hint = f"did you mean {near}?" if near else f"sections: {', '.join(sections)}"
            raise RecipeError(f"--explain {name}: no such section or key; {hint}")
        if not key:
            parts.append(f"[{section}]\n{indent(_about(cls), '    ')}")
        parts += [text for one, text in _settings(section, cls).items() if one == key or not key]
    return "\n\n".join(parts)


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """The comments of a section's settings, by key: beside it, or right above."""
    source = inspect.getsource(section)
    beside: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else beside)[token.start[0]] = token.string.lstrip("# ")
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in above:
                first -= 1
            lines = [above[line] for line in range(first, node.lineno)]
            lines += [
                beside[at] for at in range(node.lineno, (node.end_lineno or 0) + 1) if at in beside
            ]
            found[node.target.id] = " ".join(lines)
    return found


def paper_values() -> Mapping[str, Any]:
    """What the paper gives, by dotted key."""
    text = (RECIPES / f"{PAPER}.toml").read_text()
    ours, section = set(), ""
    for line in text.splitlines():
        if head := re.match(r"\[(\w+)\]", line):
            section = head[1]
        elif (key := re.match(r"(\w+) *=", line)) and re.search(r"#.*\bours\b", line):
            ours.add(f"{section}.{key[1]}")
    return {
        f"{section}.{key}": value
        for section, keys in tomllib.loads(text).items()
        if section in OF_PAPER
        for key, value in keys.items()
        if f"{section}.{key}" not in ours
    }


def _settings(section: str, cls: type[BaseModel]) -> dict[str, str]:
    hints, comments, paper = get_type_hints(cls, include_extras=True), meanings(cls), paper_values()
    found = {}
    for key, field in cls.model_fields.items():
        name = f"{section}.{key}"
        default = "(must be given)" if field.is_required() else _value(field.get_default())
        lines = [kind(hints[key]), *wrap(comments[key], 92)]
        if name in paper:
            lines.append(f"paper: {_value(paper[name])}")
        found[key] = f"{name} = {default}\n" + indent("\n".join(filter(None, lines)), "    ")
    return found


def kind(hint: Any) -> str:
    """What a value of a type may be, with its unit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join(filter(None, (kind(arguments[0]), *_notes(arguments[1:]))))
    if origin is Literal:
        return "one of " + ", ".join(map(_value, arguments))
    if origin in (Union, UnionType):
        given = [kind(one) for one in arguments if one is not NoneType]
        return " or ".join(given) + (", or left out" if NoneType in arguments else "")
    if origin is list:
        return f"list, each: {kind(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(map(kind, arguments)) + "]"
    return "table" if origin is dict else _NAMES[hint]


def _notes(notes: Sequence[Any]) -> Iterator[str]:
    """Of an annotated type: the bounds that say anything, and the unit."""
    bounds = [one for note in notes if isinstance(note, FieldInfo) for one in note.metadata]
    for name, word in {"gt": "above", "ge": "from", "lt": "below", "le": "to"}.items():
        limits = [getattr(bound, name) for bound in bounds if hasattr(bound, name)]
        yield from (f"{word} {limit:g}" for limit in limits if abs(limit) < 1e5)
    yield from (f"({note})" for note in notes if isinstance(note, str))


def _value(value: Any) -> str:
    """As TOML has it."""
    if value is None:
        return "(left out)"
    return json.dumps(value, ensure_ascii=False, default=str)


def _about(cls: type[BaseModel]) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def _sections() -> dict[str, type[BaseModel]]:
    return {
        name: cls for name, cls in get_type_hints(Recipe).items() if name in Recipe.model_fields
    }


def _first_sentence(path: Path) -> str:
    lines = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return re.split(r"\. ", " ".join(line.lstrip("# ") for line in lines))[0].rstrip(".")
