"""Laws of shipped recipes: a name works wherever a path does, and a local file wins."""

import subprocess
from pathlib import Path

import pytest

from hf_stable import cli
from hf_stable.errors import RecipeError
from hf_stable.recipes import load_recipe, shipped
from hf_stable.sweep.plan import load_plan

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"


def test_every_file_of_the_repository_has_a_name_and_a_summary() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "recipes"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    files = sorted(Path(file).relative_to("recipes") for file in tracked)
    names = [str(file.with_suffix("") if file.suffix == ".yaml" else file) for file in files]
    assert sorted(shipped.names()) == sorted(names)
    for name in names:
        assert shipped.read(name) == shipped.ROOT.joinpath(*_file(name).parts).read_text()
        assert len(shipped.summary(name)) > 4, name


def _file(name: str) -> Path:
    return Path(name if Path(name).suffix else f"{name}.yaml")


@pytest.mark.parametrize(
    "name", ["base/tiny", "base/tiny.yaml", "recipes/base/tiny", "recipes/base/tiny.yaml"]
)
def test_a_name_gives_the_recipe_of_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name) == load_recipe(RECIPES / "base" / "tiny.yaml")


def test_a_local_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tiny.yaml").write_text("extends: recipes/base/tiny.yaml\nname: mine\n")
    assert load_recipe("base/tiny.yaml").name == "mine"
    assert load_recipe("base/tiny").name == "tiny"


def test_extends_takes_names(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: [base/tiny, techniques/qk_norm]\nname: mine\n")
    layered = load_recipe(["base/tiny", "techniques/qk_norm"], ["name=mine"])
    assert load_recipe(mine) == layered


def test_an_error_in_a_shipped_recipe_has_its_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^techniques/qk_norm: tokenizer is missing"):
        load_recipe("techniques/qk_norm")
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: base/tinny\n")
    with pytest.raises(RecipeError, match=r"mine.yaml: extends: .*did you mean base/tiny\?"):
        load_recipe(mine)


def test_plans_take_names_and_ship_with_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plans = [name for name in shipped.names() if name.startswith("sweeps/")]
    assert plans
    for name in plans:
        plan = load_plan(Path(name))
        assert all(shipped.find(recipe) for recipe in (*plan.base, *plan.methods)), name


@pytest.mark.parametrize("name", shipped.names())
def test_a_copied_file_works_in_an_empty_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes", "copy", name]) == 0
    (written,) = [path for path in (tmp_path / "recipes").rglob("*") if path.is_file()]
    assert capsys.readouterr().out == f"written: {written.relative_to(tmp_path)}\n"
    assert written.read_text() == shipped.read(name)
    assert written.stat().st_mode == shipped.ROOT.joinpath(*_file(name).parts).stat().st_mode
    if name.startswith("sweeps/"):
        assert load_plan(written) == load_plan(Path(name))
    elif name.startswith(("base/", "warm_start/")) or name == "quickstart":
        assert load_recipe(written) == load_recipe(name)


def test_a_copy_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("mine")
    assert cli.main(["recipes", "copy", "base/tiny", "--output", "mine.yaml"]) == 2
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    (tmp_path / "recipes" / "slurm").mkdir(parents=True)
    (tmp_path / "recipes" / "slurm" / "train.sh").write_text("mine")
    assert cli.main(["recipes", "copy", "slurm"]) == 2
    assert not (tmp_path / "recipes" / "slurm" / "node.sh").exists()
    assert capsys.readouterr().err.count("exists; remove it") == 2


@pytest.mark.parametrize("action", ["show", "copy"])
def test_an_unknown_name_is_refused(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", action, "base/10"]) == 2
    assert "did you mean base/10m?" in capsys.readouterr().err
    assert cli.main(["recipes", action]) == 2
    assert "needs a NAME" in capsys.readouterr().err
