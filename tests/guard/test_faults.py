"""What goes wrong on one rank, or in one number, is met by all ranks alike, in real runs."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_stable import records
from hf_stable.checkpoints import CheckpointWriter, list_checkpoints
from hf_stable.checkpoints.directory import step_of
from hf_stable.errors import DivergedError
from hf_stable.guard import read_rollbacks
from hf_stable.training import train

from ..test_parallel import SHARDINGS, launch
from ..test_survival import GUARDED
from ..training import tiny_recipe
from .faults import Fault, faulty

BAD_STEP, TROUBLE = 4, 90
SHORT = {"training__steps": 8, "training__log_every": 1, "training__evaluate_every": 0}
LONG = {
    **GUARDED,
    "training__steps": 100,
    "training__checkpoint_every": 15,
    "guard.actions": "[skip, rollback]",
    "data.sequence_length": 16,
    "model.num_hidden_layers": 1,
}
REFUSED = [(kind, sharding) for kind in ("batch", "gradient") for sharding in SHARDINGS]
# What is wrong in a shard is in the weights of all ranks; in a copy it is in one rank's.
SET_BACK = [("labels", "fsdp2"), ("flip", "ddp"), ("moment", "ddp")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, named by fault, sharding and the ranks at fault or the trial."""
    folder, settings = tmp_path_factory.mktemp("faults"), []

    def add(
        name: str, kind: str, sharding: str, step: int, ranks: list[int], options: dict[str, Any]
    ) -> None:
        fault = {"kind": kind, "step": step, "ranks": ranks}
        held = {"training__sharding": sharding, "training__hang_timeout": 60}
        settings.append({**options, **held, "output": str(folder / name), "fault": fault})

    for kind, sharding in REFUSED:
        for who, ranks in (("one", [1]), ("all", [0, 1])):
            add(f"{kind}-{sharding}-{who}", kind, sharding, BAD_STEP, ranks, SHORT)
    for kind, sharding in SET_BACK:
        for trial in ("first", "second"):
            add(f"{kind}-{sharding}-{trial}", kind, sharding, TROUBLE, [1], LONG)
    launch(folder, 2, settings)
    return folder


def assert_same(one: tuple[Path, int], other: tuple[Path, int], tensors: bool = True) -> None:
    """What a rank of a run decided and remembers, and the tensors that it holds, are another's."""
    (left, first), (right, second) = one, other
    judged = [run / f"rank-{rank}.json" for run, rank in (one, other)]
    assert judged[0].read_text() == judged[1].read_text()
    weights = load_file(left / f"rank-{first}.safetensors")
    others = load_file(right / f"rank-{second}.safetensors")
    for name, weight in weights.items():
        assert weight.isfinite().all(), name
        assert not tensors or torch.equal(weight, others[name]), name


def assert_ranks_agree(run: Path) -> None:
    record = records.read_run(run)
    assert record["processes"] == 2
    assert_same((run, 0), (run, 1), tensors=record["sharding"]["kind"] == "ddp")


@pytest.mark.parametrize(("kind", "sharding"), REFUSED)
def test_what_is_not_finite_on_one_rank_is_refused_by_all(
    folder: Path, kind: str, sharding: str
) -> None:
    run = folder / f"{kind}-{sharding}-one"
    (event,) = records.read_metrics(run, "non_finite")
    assert (event["step"], event["action"]) == (BAD_STEP, "skip")
    assert [row["step"] for row in records.read_metrics(run, "train")] == [*range(1, 9)]
    assert_ranks_agree(run)
    for rank in range(2):  # a shard that one rank had moved would show
        assert_same((run, rank), (folder / f"{kind}-{sharding}-all", rank))


@pytest.mark.parametrize(("kind", "sharding"), SET_BACK)
def test_trouble_on_one_rank_sets_all_back_together_and_the_same_way_again(
    folder: Path, kind: str, sharding: str
) -> None:
    run = folder / f"{kind}-{sharding}-first"
    (rollback,) = read_rollbacks(run)
    assert rollback.to_step < TROUBLE < rollback.at_step
    decisions = json.loads((run / "rank-1.json").read_text())["decisions"]
    assert [each["action"] for each in decisions].count("rollback") == 1
    assert decisions[-1]["step"] == LONG["training__steps"]
    assert_ranks_agree(run)
    again = folder / f"{kind}-{sharding}-second"
    assert [each.skipped for each in read_rollbacks(again)] == [rollback.skipped]
    for rank in range(2):
        assert_same((run, rank), (again, rank))


_save = CheckpointWriter.save


def save_and_look(writer: CheckpointWriter, *arguments: Any, **options: Any) -> Path:
    checkpoint = _save(writer, *arguments, **options)
    for file in checkpoint.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), (file, name)
    return checkpoint


@pytest.mark.parametrize("actions", ["[]", "[rollback]"])
@pytest.mark.parametrize("kind", ["infinite_gradient", "weight", "moment", "unused_weight"])
def test_what_is_not_finite_is_in_no_checkpoint_and_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, actions: str
) -> None:
    """Not in the checkpoint either that is due after the very step."""
    options = {**SHORT, "training__steps": 40, "guard.actions": actions, "guard.rollback_steps": 2}
    every = {
        "training__checkpoint_every": 4,
        "training__asynchronous_checkpoints": "false",
        "training__keep_checkpoints": 100,
    }
    recipe = tiny_recipe(tmp_path, **options, **every)
    monkeypatch.setattr(CheckpointWriter, "save", save_and_look)
    with faulty(Fault(kind, step=12)), suppress(DivergedError):
        train(recipe)
    run, recovers = Path(recipe.output), kind == "infinite_gradient" or actions != "[]"
    assert step_of(list_checkpoints(run)[-1]) == (40 if recovers else 8)
    assert (run / "model").exists() == recovers
