"""Recipes: layered YAML that refuses unknown keys. `load_recipe` reads one, `dump` writes one."""

from hf_stable.recipes.layers import load_recipe
from hf_stable.recipes.printing import resolved
from hf_stable.recipes.schema import (
    DataRecipe,
    GuardRecipe,
    OptimizerRecipe,
    Recipe,
    ScheduleRecipe,
    SourceRecipe,
    TokenizerRecipe,
    TrainingRecipe,
    deciding_data,
    dump,
    from_dict,
    to_dict,
)

__all__ = [
    "DataRecipe",
    "GuardRecipe",
    "OptimizerRecipe",
    "Recipe",
    "ScheduleRecipe",
    "SourceRecipe",
    "TokenizerRecipe",
    "TrainingRecipe",
    "deciding_data",
    "dump",
    "from_dict",
    "load_recipe",
    "resolved",
    "to_dict",
]
