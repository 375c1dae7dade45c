"""Recipes read from TOML, with overrides; what is wrong is said by key, with what it should be."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from espo_gateway.files import is_folder
from espo_rl.config.recipe import Recipe, nearest
from espo_rl.unused import unused

RECIPES = Path(__file__).parents[1] / "recipes"


class RecipeError(ValueError):
    """The recipe cannot be read or does not hold; the message names the key and the fix."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe: a file, or the name of one that ships with the package.

    Args:
        overrides: `section.key=value`, the value in TOML (bare words are taken as strings), or None
            for a key that may have no value.

    Raises:
        RecipeError: naming the key at fault and what to change.
    """
    file = Path(path)
    if not file.exists() and (RECIPES / f"{path}.toml").exists():
        file = RECIPES / f"{path}.toml"
    try:
        data = tomllib.loads(file.read_text())
    except FileNotFoundError as error:
        shipped = sorted(recipe.stem for recipe in RECIPES.glob("*.toml"))
        close = get_close_matches(str(path), shipped, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise RecipeError(
            f"no recipe {path}: {hint}Give a TOML file or one of: {', '.join(shipped)}"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {file}: {error}") from error
    places = {
        f"{section}.{key}": 0
        for section, keys in data.items()
        for key in (keys if isinstance(keys, dict) else ())
    }
    for place, override in enumerate(overrides, 1):
        key = _override(data, override)
        places[".".join(key.split(".")[:2])] = place
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {file}:\n" + "\n".join(map(_explain, error.errors()))) from error
    if idle := list(unused(recipe, places)):
        raise RecipeError(f"recipe {file}:\n" + "\n".join(f"  {one}" for one in idle))
    return recipe


def check_model_folder(key: str, name: str) -> None:
    """Raise RecipeError, with how it is made, when what can only be meant as a folder is none."""
    if is_folder(name) and not Path(name).is_dir():
        made = _made(key, name)
        raise RecipeError(
            f"{key}: no folder {name}; {made and f'make it: {made}; or '}give a Hugging Face "
            "checkpoint's folder or its whole name on the hub, like openai-community/gpt2"
        )


def _made(key: str, name: str) -> str:
    """What makes a model, as a recipe that ships says it."""
    if key == "model.critic":
        return f"python -m espo_rl.pretrain_critic ROLLOUTS --model MODEL --output {name}"
    command = re.compile(rf"python .*--out {re.escape(name.rstrip('/'))}(?!\S).*")
    found = (command.search(recipe.read_text()) for recipe in RECIPES.glob("*.toml"))
    return next((match.group() for match in found if match), "")


def _override(data: dict[str, Any], override: str) -> str:
    """Lay it over the data; its dotted key."""
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not sections:
        near = nearest(dotted.strip()) if equals else None
        hint = f", perhaps {near}={text}" if near else ""
        raise RecipeError(f"override {override!r}: write it as section.key=value{hint}")
    try:
        found = tomllib.loads(f"value = {text}")
        if len(found) > 1:
            raise RecipeError(f"override {override!r}: give each setting as an argument of its own")
        value = found["value"]
    except tomllib.TOMLDecodeError:  # text, or what Python and `--explain` write
        value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"override {override!r}: {section} is not a section")
    data[key] = value
    return ".".join([*sections, key])


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        *parents, _ = error["loc"]
        section: Any = Recipe
        for parent in parents:
            section = section.model_fields[parent].annotation
        near = nearest(where)
        hint = f"did you mean {near}? " if near else ""
        whole = ".".join(map(str, parents)) or "a recipe"
        return f"  {where}: no such key; {hint}{whole} has: {', '.join(section.model_fields)}"
    return f"  {where}: {error['msg']} (got {error['input']!r})" if where else f"  {error['msg']}"
