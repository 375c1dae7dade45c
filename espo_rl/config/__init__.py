"""The recipe: every setting of a run, read from TOML, checked before anything starts.

    recipe = load_recipe("arithmetic.toml", ["run.seed=2", "ppo.learning_rate=1e-4"])

Unknown keys fail. `sections` and `stopping` have all keys, with defaults and what they mean.
"""

from espo_rl.config.bounds import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from espo_rl.config.files import RECIPES, RecipeError, check_model_folder, load_recipe
from espo_rl.config.recipe import Recipe, differences
from espo_rl.config.sections import (
    DYNAMIC_ROUNDS,
    RESAMPLES,
    Model,
    Ppo,
    RolloutSection,
    Servers,
    TaskSection,
)
from espo_rl.config.stopping import Stopping

__all__ = [
    "DYNAMIC_ROUNDS",
    "HIGHEST_TEMPERATURE",
    "LOWEST_TEMPERATURE",
    "RECIPES",
    "RESAMPLES",
    "Model",
    "Ppo",
    "Recipe",
    "RecipeError",
    "RolloutSection",
    "Servers",
    "Stopping",
    "TaskSection",
    "check_model_folder",
    "differences",
    "load_recipe",
]
