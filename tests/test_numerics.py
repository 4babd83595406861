"""A run says on which settings its bits depend, and a resumed run whether they have changed."""

from pathlib import Path

import pytest
import torch

from hf_stable import records
from hf_stable.resuming import warn_of_numerics
from hf_stable.training import train

from .training import tiny_recipe, unfinish


def _warnings(folder: Path) -> list[str]:
    lines: list[str] = []
    warn_of_numerics(folder, lines.append)
    return lines


@pytest.mark.parametrize(("now", "words"), [("AUTO", []), ("AVX2", ["was AUTO, is AVX2"])])
def test_another_setting_than_the_runs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: str, words: list[str]
) -> None:
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    records.write_json(tmp_path / "run.json", {"numerics": records.numerics()})
    monkeypatch.setenv("MKL_CBWR", now)
    lines = _warnings(tmp_path)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch without MKL")
@pytest.mark.parametrize("value", [None, ""])
def test_resuming_without_mkl_cbwr_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """An empty value is no value, to MKL too."""
    monkeypatch.delenv("MKL_CBWR")
    if value is not None:
        monkeypatch.setenv("MKL_CBWR", value)
    records.write_json(tmp_path / "run.json", {"numerics": records.numerics()})
    (line,) = _warnings(tmp_path)
    assert "MKL_CBWR=AUTO before Python starts" in line


def test_run_json_has_the_settings_and_resuming_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    recipe = tiny_recipe(tmp_path, training__steps=2, training__checkpoint_every=1)
    folder = train(recipe).folder
    assert records.read_run(folder)["numerics"]["MKL_CBWR"] == "AUTO"
    assert "MKL_CBWR" not in capfd.readouterr().err
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    unfinish(folder)
    train(recipe)
    assert "MKL_CBWR was AUTO, is COMPATIBLE" in capfd.readouterr().err
