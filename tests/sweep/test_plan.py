"""A plan is pure: the same file gives the same runs, and what cannot work is named."""

import json
import subprocess
from pathlib import Path

import pytest

from hf_stable.errors import RecipeError
from hf_stable.records import last_change
from hf_stable.sweep import plan as plan_module
from hf_stable.sweep.plan import load_plan, planned_runs, read_plan, write_plan
from hf_stable.sweep.rule import Thresholds

RECIPES = Path(__file__).parents[2] / "recipes"
PLAN = """\
name: p
base: [{recipes}/base/tiny.yaml]
methods: [{recipes}/techniques/baseline.yaml, {recipes}/techniques/qk_norm.yaml]
learning_rates: {rates}
seeds: [0, 1]
variants:
  small: [model.embedding_std=0.02]
  large: [model.embedding_std=0.63, training.steps=7]
"""


def write(folder: Path, text: str = PLAN, rates: str = "[1e-2, 1e-1]") -> Path:
    file = folder / "plan.yaml"
    file.write_text(text.format(recipes=RECIPES, rates=rates))
    return file


@pytest.mark.parametrize("file", sorted((RECIPES / "sweeps").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_committed_plan_works(file: Path) -> None:
    runs = planned_runs(load_plan(file))
    assert len({run.id for run in runs}) == len({run.recipe.output for run in runs}) == len(runs)


def test_every_combination_is_there_once_and_is_what_its_id_says(tmp_path: Path) -> None:
    runs = planned_runs(load_plan(write(tmp_path)))
    cells = {(run.method, run.variant, run.learning_rate, run.seed) for run in runs}
    assert len(runs) == len(cells) == 2 * 2 * 2 * 2
    for run in runs:
        assert run.recipe.optimizer.learning_rate == run.learning_rate
        assert run.recipe.seed == run.seed
        assert run.recipe.model["preset"] == run.method
        assert run.recipe.model["embedding_std"] == {"small": 0.02, "large": 0.63}[run.variant]
        assert run.recipe.training.steps == (7 if run.variant == "large" else 20)
        assert run.recipe.training.log_every == 1
        assert Path(run.recipe.output) == Path("runs/sweeps/p/runs") / run.id
    assert [run.learning_rate for run in runs] == sorted(
        (run.learning_rate for run in runs), reverse=True
    )


def test_ids_do_not_depend_on_what_else_is_planned(tmp_path: Path) -> None:
    few = {run.id: run.recipe for run in planned_runs(load_plan(write(tmp_path, rates="[1e-2]")))}
    many = {run.id: run.recipe for run in planned_runs(load_plan(write(tmp_path)))}
    assert few.keys() < many.keys()
    assert all(many[name] == recipe for name, recipe in few.items())


def test_rates_of_another_width_are_scaled_by_one_over_width(tmp_path: Path) -> None:
    scaled = "{reference_width: 1024, values: [8e-3, 2e-2]}"  # tiny is 64 wide
    rates = {run.learning_rate for run in planned_runs(load_plan(write(tmp_path, rates=scaled)))}
    assert rates == {0.13, 0.32}  # two digits


def test_settings_of_the_command_line_win(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path), ["optimizer.beta2=0.5"], str(tmp_path / "out"))
    runs = planned_runs(plan)
    assert all(run.recipe.optimizer.beta2 == 0.5 for run in runs)
    assert all(Path(run.recipe.output).parent == tmp_path / "out" / "runs" for run in runs)


def test_a_plan_may_have_thresholds_of_its_own(tmp_path: Path) -> None:
    text = PLAN + "thresholds: {{collapse: unigram-0.2, hopeless_steps: 20}}\n"
    plan = load_plan(write(tmp_path, text))
    assert plan.rule == Thresholds(collapse="unigram-0.2", hopeless_steps=20)
    assert load_plan(write(tmp_path)).rule == Thresholds()


def test_workers_read_the_plan_that_was_written(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path), None, str(tmp_path / "out"))
    thresholds = Thresholds(collapse="bigram")
    study = write_plan(plan, planned_runs(plan), thresholds)
    again, same = read_plan(study)
    assert planned_runs(again) == planned_runs(plan)
    assert same == thresholds


def test_the_commit_of_the_claims_is_that_of_the_studys_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def revision(text: str, output: str) -> object:
        plan = load_plan(write(tmp_path, text), None, str(tmp_path / output))
        folder = write_plan(plan, planned_runs(plan), Thresholds())
        return json.loads((folder / "plan.json").read_text(encoding="utf-8"))["claims_revision"]

    reproducing = PLAN + "reproduces: [table_3]\n"
    monkeypatch.setattr(plan_module, "last_change", lambda _: "first")
    assert revision(PLAN, "plain") is None
    assert revision(reproducing, "claiming") == "first"
    monkeypatch.setattr(plan_module, "last_change", lambda _: "later")
    assert revision(reproducing, "claiming") == "first"
    # What was not recorded before the first run is not recorded after it.
    assert revision(reproducing, "plain") is None


def test_the_last_change_of_a_file_is_its_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        name = ["-c", "user.name=n", "-c", "user.email=e@f"]
        command = ["git", "-C", str(tmp_path), *name, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("claims", "other"):
        (tmp_path / name).write_text("one")
    assert last_change(tmp_path / "claims") is None  # no checkout
    git("init", "-q")
    git("add", "claims")
    git("commit", "-qm", "claims")
    committed = git("rev-parse", "HEAD")
    git("add", "other")
    git("commit", "-qm", "other")
    assert last_change(tmp_path / "claims") == committed != git("rev-parse", "HEAD")
    (tmp_path / "claims").write_text("two")
    assert last_change(tmp_path / "claims") == f"{committed}-dirty"
    (tmp_path / "new").write_text("")
    assert last_change(tmp_path / "new") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: [0, 1]", "seeds: [0, 0]"), "seeds has 0 twice"),
        (("seeds: [0, 1]", "seeds: []"), "seeds"),
        (("seeds:", "sedes:"), "sedes is not a key of a plan; known are .*seeds"),
        (
            ("qk_norm.yaml", "qk_nrom.yaml"),
            "qk_nrom.yaml: there is no such file.*did you mean techniques/qk_norm",
        ),
        (("name: p", "name: a/b"), "name: found 'a/b'"),
        (("name: p", "name: p\nreproduces: [table_5]"), "reproduces.0: found 'table_5'"),
        (("name: p", "name: p\nthresholds: {{colapse: middle}}"), "plan.yaml: .*colapse unknown"),
    ],
)
def test_bad_plans_are_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_plan(write(tmp_path, PLAN.replace(*change)))


def test_a_setting_that_no_recipe_has_is_named(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path), ["optimizer.beta3=1"])
    with pytest.raises(RecipeError, match="beta3"):
        planned_runs(plan)
