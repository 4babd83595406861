"""What must never get out of a machine, or into one: secrets, and code in what is read."""

import io
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from hf_stable.card import write_card
from hf_stable.cli import main
from hf_stable.hub import checking
from hf_stable.training import train

from .poison import Poison
from .training import tiny_recipe, write_text
from .warm import warm

SECRETS = {
    "HF_TOKEN": "hf_plantedPlantedPlantedPlantedPlanted",
    "HUGGING_FACE_HUB_TOKEN": "hf_anotherAnotherAnotherAnotherAnoth",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}


def holders(folder: Path) -> list[str]:
    """Files below a folder with one of the secrets in them."""
    planted = [secret.encode() for secret in SECRETS.values()]
    return [
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and any(secret in file.read_bytes() for secret in planted)
    ]


def test_tokens_of_the_environment_are_in_no_file_that_a_run_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    warm(monkeypatch, checking)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    run = train(tiny_recipe(tmp_path, training__checkpoint_every=10)).folder
    assert main(["evaluate", str(run), "--output", str(run / "evaluation.json")]) == 0
    assert main(["export", str(run), "--output", str(tmp_path / "export")]) == 0
    write_card(run, tmp_path / "card" / "README.md")
    assert (tmp_path / "card" / "README.md").is_file() and (run / "metrics.jsonl").is_file()
    assert holders(tmp_path) == []
    printed = capfd.readouterr()
    assert not any(secret in printed.out + printed.err for secret in SECRETS.values())
    (tmp_path / "planted.json").write_text(json.dumps(SECRETS))
    assert holders(tmp_path) == ["planted.json"]  # the search itself finds one


@pytest.mark.parametrize("name", ["../outside", "/", "a/../../b", "..", "x" * 81])
def test_a_run_is_not_named_like_a_path(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: {json.dumps(name)}\ntokenizer: {{vocab_size: 300}}\n"
        "data: {train: [a.txt], sequence_length: 16}\n"
        "training: {steps: 1, global_batch_size: 1, micro_batch_size: 1}\n"
    )
    assert main(["check", str(recipe)]) == 2
    assert "name: found" in capsys.readouterr().err


def test_a_poisoned_pickle_in_the_place_of_any_file_of_a_run_or_its_cache_runs_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A part of the text, and few steps: it is tokenized, trained on and evaluated for every file.
    text = write_text(tmp_path)
    for file in sorted(text.iterdir())[40:]:
        file.unlink()
    recipe = tiny_recipe(
        tmp_path,
        training__steps=4,
        training__checkpoint_every=2,
        training__evaluate_every=2,
        training__log_every=2,
        training__evaluate_blocks=2,
        telemetry__every=2,
        model__num_hidden_layers=1,
    )
    run, trace, whole = train(recipe).folder, tmp_path / "trace", tmp_path / "whole"
    places = [run, tmp_path / "cache"]
    for place in places:
        shutil.copytree(place, whole / place.name)
    payload, array = pickle.dumps(Poison(trace)), io.BytesIO()
    np.save(array, np.array([Poison(trace)], dtype=object), allow_pickle=True)
    files = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file()]
    assert len(files) > 20

    def restore() -> None:
        for place in places:
            shutil.rmtree(place)
            shutil.copytree(whole / place.name, place)

    restore()
    train(recipe)  # what is restored is read
    for name in files:
        restore()
        (tmp_path / name).write_bytes(array.getvalue() if name.suffix == ".npy" else payload)
        with suppress(Exception):
            train(recipe)
        for command in (
            ["evaluate", str(run), "--limit-documents", "2"],
            ["watch", "--once", str(run)],
        ):
            with suppress(Exception):
                main(command)
        assert not trace.exists(), name
    pickle.loads(payload)
    assert trace.exists()  # the poison works


def test_nothing_of_ours_unpickles() -> None:
    package = Path(__file__).parents[1] / "hf_stable"
    sources = {file: file.read_text(encoding="utf-8") for file in package.rglob("*.py")}
    for file, text in sources.items():
        assert "weights_only=False" not in text, file
        assert "register_for_checkpointing" not in text, file
        assert "yaml.unsafe_load" not in text and "UnsafeLoader" not in text, file
    assert len(sources) > 100
