"""A run survives signals, rollbacks and deaths: what comes out is what would have come out."""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_stable import cli, records, resuming, runs, stepping, training
from hf_stable.checkpoints import list_checkpoints
from hf_stable.checkpoints.directory import step_of
from hf_stable.corpus import prepare_corpus
from hf_stable.errors import CheckpointError, DivergedError
from hf_stable.guard import Observation, read_rollbacks, replay
from hf_stable.preemption import EXIT_INTERRUPTED, EXIT_PREEMPTED, MARKER
from hf_stable.recipes import Recipe, dump
from hf_stable.telemetry.reading.history import read_history
from hf_stable.training import TrainResult, train

from .training import tiny_recipe
from .warm import python

DROPOUT = {"model.attention_dropout": 0.1, "training__log_every": 1, "telemetry__every": 4}
GUARDED = {
    "training__steps": 240,
    "training__log_every": 1,
    "training__evaluate_every": 0,
    "training__checkpoint_every": 20,
    "training__keep_checkpoints": 20,
    "telemetry__every": 0,
    "guard.actions": "[rollback]",
    "guard.window": 64,
    "guard.rollback_steps": 10,
    "guard.skip_batches": 40,
    "guard.lower_steps": 5,
    "guard.max_skips": 2,
    "guard.drift_steps": 8,
}


def state(run: Path) -> dict[str, Any]:
    """All that a run has left, but for clocks: tensors of the newest checkpoint, and the log."""
    newest = list_checkpoints(run)[-1]
    found: dict[str, Any] = {
        f"{file.relative_to(newest)}/{name}": tensor
        for file in newest.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    history = read_history(run)
    clocks = {"tokens_per_second"}
    found |= {name: history.train[name] for name in history.train.keys() - clocks}
    validated = [row for row in history.events if row["event"] == "validation"]
    found["validation"] = np.array([(row["step"], row["loss"]) for row in validated])
    return found | history.telemetry


def assert_same(one: Path, other: Path) -> None:
    left, right = state(one), state(other)
    assert left.keys() == right.keys() and len(left) > 20
    for name in left:
        same = np.array_equal(np.asarray(left[name]), np.asarray(right[name]), equal_nan=True)
        assert same, name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_and_it_goes_on_as_if_never_stopped(
    tmp_path: Path, number: signal.Signals
) -> None:
    whole = train(tiny_recipe(tmp_path, **DROPOUT, output=tmp_path / "whole"))
    recipe = tiny_recipe(tmp_path, **DROPOUT)

    def send(step: int, loss: float, norm: float) -> None:
        if step == 6:
            os.kill(os.getpid(), number)

    ended = train(recipe, stop=send)
    assert ended.preempted and 6 <= ended.steps < 16
    assert (ended.folder / MARKER).is_file() and not (ended.folder / "model").exists()
    assert [step_of(path) for path in list_checkpoints(ended.folder)] == [ended.steps]
    again = train(recipe)
    assert not again.preempted and not (ended.folder / MARKER).exists()
    assert again.validation_perplexity == whole.validation_perplexity
    assert_same(whole.folder, again.folder)


def test_the_command_says_that_it_was_preempted(tmp_path: Path, monkeypatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(tiny_recipe(tmp_path)))
    result = TrainResult(tmp_path, 3, math.nan, preempted=True)
    monkeypatch.setattr(training, "train", lambda *_, **__: result)
    assert cli.main(["train", str(recipe)]) == EXIT_PREEMPTED
    result = replace(result, signal=signal.SIGINT)
    assert cli.main(["train", str(recipe)]) == EXIT_INTERRUPTED == 128 + signal.SIGINT


class Died(BaseException):
    """In the place of SIGKILL, which a test would not survive."""


def _die_at(step: int) -> Callable[[int, float, float], None]:
    def stop(done: int, loss: float, norm: float) -> None:
        if done == step:
            raise Died

    return stop


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_death_at_any_step_changes_nothing(tmp_path: Path, asynchronous: str) -> None:
    options = {**DROPOUT, "training__checkpoint_every": 4}
    options["training__asynchronous_checkpoints"] = asynchronous
    whole = train(tiny_recipe(tmp_path, **options, output=tmp_path / "whole"))
    recipe = tiny_recipe(tmp_path, **options)
    for step in (2, 3, 5, 9, 15, 19):
        with pytest.raises(Died):
            train(recipe, stop=_die_at(step))
    assert_same(whole.folder, train(recipe).folder)


def _text_of(folder: Path, blocks: int) -> dict[str, Any]:
    """Settings for text of so many blocks; without merges a byte is a token, whatever the library.

    A step is 8 blocks, so the 20 steps of a run read it 160 / `blocks` times.
    """
    draw, files = random.Random(0), (folder / "train.txt", folder / "validation.txt")
    for file in files:
        file.write_text("".join(draw.choices("some words to train on ", k=16 * blocks)))
    sizes = {"tokenizer__vocab_size": 258, "data__sequence_length": 16}
    return {**sizes, "data__train": f"[{files[0]}]", "data__validation": f"[{files[1]}]"}


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"data__num_workers": 2}, 0),
        ({"training__precision": "bf16"}, 0),
        ({"training__micro_batch_size": 2}, 0),
        ({}, 56),  # epochs end with the steps 7 and 14
        ({"data__num_workers": 2}, 52),  # and here in the middle of step 7, and with step 13
    ],
    ids=["loader-workers", "bf16", "four-microbatches", "epochs", "epochs-inside-steps"],
)
def test_a_death_changes_nothing_however_data_are_read_and_summed(
    tmp_path: Path, options: dict[str, Any], blocks: int
) -> None:
    options = {**DROPOUT, **options, "training__checkpoint_every": 1}
    options |= _text_of(tmp_path, blocks) if blocks else {}
    recipe = tiny_recipe(tmp_path, **options)
    _, corpus = prepare_corpus(recipe, progress=False)
    assert blocks in (0, len(corpus.train))
    whole = train(tiny_recipe(tmp_path, **options, output=tmp_path / "whole"))
    for step in (7, 8, 11, 15):  # before the checkpoint of this step
        with pytest.raises(Died):
            train(recipe, stop=_die_at(step))
    again = train(recipe).folder
    assert [row["step"] for row in records.read_metrics(again, "resumed")] == [6, 7, 10, 14]
    assert_same(whole.folder, again)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)

    def second(step: int, loss: float, norm: float) -> None:
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
            train(recipe)

    train(recipe, stop=second)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 32 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=32m tmpfs {disk}"
    if subprocess.run(mount, shell=True, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("log_every", [1, 16], ids=["log", "checkpoint"])
def test_a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint(
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    log_every: int,
) -> None:
    options = {"model.attention_dropout": 0.1, "training__checkpoint_every": 4}
    options |= {"training__log_every": log_every, "telemetry__every": 0}
    whole = train(tiny_recipe(tmp_path, **options, output=tmp_path / "whole"))
    recipe = tiny_recipe(tmp_path, **options, output=small_disk / "run")
    filler = small_disk / "filler"

    def fill(done: int, loss: float, norm: float) -> None:
        if done == 5:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(512))

    file = tmp_path / "recipe.yaml"
    file.write_text(dump(recipe))
    with monkeypatch.context() as inside:
        inside.setattr(training, "train", partial(train, stop=fill))
        assert cli.main(["train", str(file)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [step_of(path) for path in list_checkpoints(Path(recipe.output))] == [4]
    filler.unlink()
    again = train(recipe)
    assert records.read_metrics(again.folder, "resumed")[0]["step"] == 4
    assert_same(whole.folder, again.folder)


def corrupt(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Random targets at the absolute positions of these steps' samples, wherever they come."""
    loader = runs.Run.loader

    def corrupted(self: runs.Run, first_step: int, num_steps: int) -> Iterator[Any]:
        size, processes = self.recipe.training.micro_batch_size, self.accelerator.num_processes
        start = first_step * self.recipe.training.global_batch_size
        start += self.accelerator.process_index * size
        draw = torch.Generator().manual_seed(0)
        for index, batch in enumerate(loader(self, first_step, num_steps)):
            absolute = self.order.absolute(np.arange(size) + start + index * processes * size)
            bad = (absolute >= (first - 1) * 8) & (absolute < last * 8)
            labels = batch["shift_labels"]
            noise = torch.randint(0, 512, labels.shape, generator=draw)
            yield {**batch, "shift_labels": torch.where(torch.tensor(bad)[:, None], noise, labels)}

    monkeypatch.setattr(runs.Run, "loader", corrupted)


def test_bad_data_are_left_out_and_the_run_is_one_that_never_met_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, **GUARDED)
    with monkeypatch.context() as inside:
        corrupt(inside, 150, 170)
        found = train(recipe)
    (rollback,) = read_rollbacks(found.folder)
    assert rollback.to_step <= 150 < rollback.at_step
    start, stop = rollback.skipped
    assert start <= 149 * 8 and stop >= 170 * 8
    (event,) = records.read_metrics(found.folder, "rolled_back")
    assert event["step"] == rollback.to_step and event["at_step"] == rollback.at_step
    seen = map(Observation.from_row, records.read_metrics(found.folder, "train"))
    again = [(each.step, each.action) for each in replay(seen, recipe.guard) if each.reason]
    told = records.read_metrics(found.folder, "guard")
    assert again == [(row["step"], row["action"]) for row in told]
    clean = Path(tiny_recipe(tmp_path, **GUARDED, output=tmp_path / "clean").output)
    clean.mkdir()
    shutil.copy(found.folder / "rollbacks.json", clean)
    other = train(tiny_recipe(tmp_path, **GUARDED, output=clean))
    assert_same(found.folder, other.folder)


@pytest.mark.parametrize(
    ("module", "moment"),
    [(resuming, "append_rollback"), (resuming, "abandon"), (runs, "roll_back")],
    ids=["written", "abandoned", "loaded"],
)
def test_a_death_in_the_middle_of_a_rollback_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, moment: str
) -> None:
    corrupt(monkeypatch, 150, 170)
    options = {**GUARDED, "training__checkpoint_every": 5, "training__steps": 190}
    options["training__keep_checkpoints"] = 40
    whole = train(tiny_recipe(tmp_path, **options, output=tmp_path / "whole"))
    recipe, act = tiny_recipe(tmp_path, **options), getattr(module, moment)

    def die_after(*arguments: Any) -> None:
        act(*arguments)
        raise Died

    with monkeypatch.context() as inside:
        inside.setattr(module, moment, die_after)
        with pytest.raises(Died):
            train(recipe)
    assert_same(whole.folder, train(recipe).folder)
    assert len(read_rollbacks(Path(recipe.output))) == 1


def test_trouble_that_other_data_do_not_mend_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, 150, 10**6)
    recipe: Recipe = tiny_recipe(tmp_path, **GUARDED, guard__max_rollbacks=2)
    with pytest.raises(DivergedError, match="giving up; trouble since step"):
        train(recipe)
    assert len(read_rollbacks(Path(recipe.output))) == 2
    assert records.read_metrics(Path(recipe.output), "diverged")


@pytest.mark.parametrize("preset", ["baseline", "sigma_reparam"])
def test_a_guard_that_finds_nothing_changes_nothing(tmp_path: Path, preset: str) -> None:
    options = {"model.preset": preset, "training__log_every": 1}
    plain = train(tiny_recipe(tmp_path, **options, output=tmp_path / "plain"))
    more = {"guard.actions": "[skip, lower, rollback]", "training__checkpoint_every": 1}
    guarded = train(tiny_recipe(tmp_path, **options, **more, training__keep_checkpoints=300))
    assert step_of(list_checkpoints(guarded.folder)[0]) == 0
    left, right = state(plain.folder), state(guarded.folder)
    for name in left:
        assert np.array_equal(np.asarray(left[name]), np.asarray(right[name])), name


def test_a_death_after_a_refused_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model.preset": "sigma_reparam", "training__checkpoint_every": 5}
    recipe = tiny_recipe(tmp_path, **options)
    corrupt_once = stepping.optim.clip_gradients

    def poisoned(model: Any, *others: Any) -> torch.Tensor:
        if poisoned.step == 5:  # pyright: ignore[reportFunctionMemberAccess]
            next(model.parameters()).grad.view(-1)[0] = math.nan
        poisoned.step += 1  # pyright: ignore[reportFunctionMemberAccess]
        return corrupt_once(model, *others)

    monkeypatch.setattr(stepping.optim, "clip_gradients", poisoned)
    monkeypatch.setattr(training._Course, "_is_worth_keeping", lambda *_: True)
    poisoned.step = 1  # pyright: ignore[reportFunctionMemberAccess]
    whole = train(tiny_recipe(tmp_path, **options, output=tmp_path / "whole"))
    poisoned.step = 1  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(Died):
        train(recipe, stop=_die_at(7))
    again = train(recipe)
    assert records.read_metrics(again.folder, "resumed")[0]["step"] == 5
    assert_same(whole.folder, again.folder)


def test_weights_at_fault_never_push_out_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"training__checkpoint_every": 2, "training__steps": 40}
    whole = train(tiny_recipe(tmp_path, **options, output=tmp_path / "whole"))
    clip, calls = stepping.optim.clip_gradients, itertools.count(1)

    def flip(model: Any, *others: Any) -> torch.Tensor:
        if next(calls) == 8:  # seen by no number of this step, which is accepted
            [*model.parameters()][-1].data.view(-1)[0] = math.inf
        return clip(model, *others)

    monkeypatch.setattr(stepping.optim, "clip_gradients", flip)
    recipe = tiny_recipe(tmp_path, **options)
    with pytest.raises(DivergedError, match="no finite loss and gradient in 20 steps"):
        train(recipe)
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [4, 6]
    assert records.read_metrics(tmp_path / "run", "no_checkpoint")
    assert_same(whole.folder, train(recipe).folder)


def test_a_model_that_is_not_finite_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, calls = stepping.optim.clip_gradients, itertools.count(1)

    def flip(model: Any, *others: Any) -> torch.Tensor:
        if next(calls) == 20:
            next(model.parameters()).data.view(-1)[0] = math.nan
        return clip(model, *others)

    monkeypatch.setattr(stepping.optim, "clip_gradients", flip)
    with pytest.raises(DivergedError, match="not finite after the last step"):
        train(tiny_recipe(tmp_path))
    assert not (tmp_path / "run" / "model").exists()


SCRIPT = Path(__file__).parents[1] / "scripts" / "survival" / "kill.py"


def killed(folder: Path, *options: str) -> dict[str, Any]:
    """What scripts/survival/kill.py found; it fails when a run came out differently."""
    output = folder / "killed.json"
    command = [python(), str(SCRIPT), "--output", str(output), *options]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(output.read_text())


def test_runs_killed_at_random_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    found = killed(tmp_path, "--trials", "3", "--seed", "1")
    assert found["kills"] >= 3 and found["compared"] > 50 and found["asynchronous"] == 1


@pytest.mark.slow
def test_two_processes_killed_at_random_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    found = killed(tmp_path, "--trials", "5", "--processes", "2")
    assert found["kills"] >= 5 and found["longest_peer_seconds"] < 60
