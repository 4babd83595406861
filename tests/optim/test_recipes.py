"""Recipe keys of the optimizer's side: refused without effect, unwritten when off."""

from pathlib import Path

import pytest

from hf_stable.errors import RecipeError
from hf_stable.recipes import dump, from_dict, load_recipe, to_dict

TINY = Path(__file__).parents[2] / "recipes" / "base" / "tiny.yaml"
NEWCOMERS = {"clip_by", "late_max_grad_norm", "late_clip_step", "qk_clip"}
ALL = [
    "optimizer.name=stable_adamw",
    "optimizer.clip_by=group",
    "optimizer.late_max_grad_norm=0.3",
    "optimizer.late_clip_step=5",
    "optimizer.qk_clip=100.0",
]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["late_max_grad_norm=0.3"], "give both or neither"),
        (["late_clip_step=5"], "give both or neither"),
        (["late_max_grad_norm=1.0", "late_clip_step=5"], "1.0 is not below max_grad_norm 1.0"),
        (["late_max_grad_norm=0.3", "late_clip_step=9999999"], "not before the run's end"),
        (["clip_by=group", "max_grad_norm=null"], "clip_by has no effect"),
        (["weight_decay=1.0", "weight_decay_mode=independent"], "takes 1 of every weight"),
        (["weight_decay=4000.0", "learning_rate=1e-3"], "takes 4 of every weight"),
        (["qk_clip=0.0"], "optimizer.qk_clip: found 0"),
    ],
)
def test_what_has_no_effect_is_refused(settings: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe(TINY, [f"optimizer.{setting}" for setting in settings])


def test_records_from_before_these_keys_are_of_the_same_recipe() -> None:
    recipe = load_recipe(TINY)
    content = to_dict(recipe)
    for name in NEWCOMERS:
        del content["optimizer"][name]
    assert from_dict(content) == recipe


def test_keys_that_are_on_are_written_and_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ALL)
    assert to_dict(recipe)["optimizer"].keys() >= NEWCOMERS
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_late_norm_may_follow_none() -> None:
    settings = ["max_grad_norm=null", "late_max_grad_norm=0.3", "late_clip_step=5", "clip_by=group"]
    assert (
        load_recipe(TINY, [f"optimizer.{each}" for each in settings]).optimizer.max_grad_norm
        is None
    )
