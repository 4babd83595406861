"""The guard's section of a recipe."""

from pathlib import Path

import pytest

from hf_stable.errors import RecipeError
from hf_stable.recipes import GuardRecipe, load_recipe
from hf_stable.sweep.plan import load_plan, planned_runs

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = RECIPES / "base" / "tiny.yaml"
ROLLBACK = "guard.actions=[skip, lower, rollback]"


def test_a_recipe_without_it_only_refuses_what_is_not_finite() -> None:
    assert load_recipe(TINY).guard == GuardRecipe(actions=[])


@pytest.mark.parametrize("every", [0, 100])
def test_rollbacks_need_checkpoints_that_are_old_enough(every: int) -> None:
    settings = [ROLLBACK, f"training.checkpoint_every={every}", "training.keep_checkpoints=2"]
    with pytest.raises(RecipeError, match=f"checkpoint_every {every} and keep_checkpoints 2"):
        load_recipe(TINY, settings)
    settings[1] = f"training.checkpoint_every={GuardRecipe().reach}"
    assert "rollback" in load_recipe(TINY, settings).guard.actions


def test_a_study_sees_what_diverges(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"name: p\nbase: [{TINY}]\nmethods: [{RECIPES}/techniques/baseline.yaml]\n"
        "learning_rates: [1e-2]\nseeds: [0]\nsettings: ['guard.actions=[skip]']\n"
    )
    assert planned_runs(load_plan(plan))[0].recipe.guard.actions == []
