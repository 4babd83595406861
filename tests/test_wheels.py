"""Laws of `scripts/wheels.py`: what a GPU without network lacks is known before it is there."""

import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from . import bare

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import wheels  # noqa: E402


def dependencies(*extras: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [each for extra in extras for each in project["optional-dependencies"][extra]]
    return [Requirement(each).name for each in [*project["dependencies"], *optional]]


def test_the_list_of_the_study_is_complete() -> None:
    """With a bare environment it covers our dependencies and all that these need."""
    have = bare.closure(set(bare.NAMES) - {"pytest"}, bare.WITHOUT)
    # typer is what the Hub's command line needs.
    need = bare.closure(dependencies("figures"), ("typer",))
    assert set(need) - set(have) <= set(wheels.needed("study"))
    text = bare.closure(dependencies("quickstart"), ("typer",))
    assert set(text) - set(need) - set(have) <= set(wheels.needed("text"))
    assert set(bare.closure(["pytest", "pytest-xdist"], ())) - set(have) <= set(
        wheels.needed("first")
    )


def test_missing_is_what_is_neither_installed_nor_carried(tmp_path: Path) -> None:
    (tmp_path / "made_up_core-1.0-cp312-cp312-any.whl").touch()
    asked = ["torch", "made-up-core", "never-made"]
    assert wheels.missing(asked, None) == ["made-up-core", "never-made"]
    assert wheels.missing(asked, tmp_path) == ["never-made"]


def test_what_is_missing_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheels, "needed", lambda section: {"torch": "1", "never-made": "1"})
    assert wheels.check("study", None) == 1
    error = capsys.readouterr().err
    assert "1 packages are not installed" in error
    assert "wheels.py download study FOLDER --only never-made" in error


def test_a_carried_wheel_is_importable_without_network(tmp_path: Path) -> None:
    about = "never_made-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "never_made-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("never_made.py", "")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: never-made\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    assert wheels.install(tmp_path, tmp_path / "site") == 0
    assert (tmp_path / "site" / "never_made.py").is_file()
