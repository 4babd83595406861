"""A run's state in one process: whole after any kill, full disk or damage, and never code."""

import contextlib
import io
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.state_dict_saver import save

from hf_stable.checkpoints import (
    CheckpointWriter,
    Keep,
    directory,
    export_model,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    sharded,
)
from hf_stable.checkpoints.layouts import write_files
from hf_stable.checkpoints.state import take_state
from hf_stable.errors import CheckpointError

from ..poison import Poison
from .faults import WRITES, calls_of, die_at, fail_at
from .models import differences, make_model, make_optimizer, train, whole_state


class Training:
    """A model in training, and the checkpoints of its run."""

    def __init__(self, run: Path, seed: int = 0, **fields: Any) -> None:
        self.run, self.accelerator = run, Accelerator(cpu=True)
        self.model = make_model(seed, **fields)
        self.optimizer = make_optimizer(self.model)
        self.parts = self.model, self.optimizer, self.accelerator

    def step(self, *steps: int) -> dict[str, torch.Tensor]:
        train(self.model, self.optimizer, steps)
        return self.state()

    def state(self) -> dict[str, torch.Tensor]:
        return {**whole_state(self.model, self.optimizer), "random": torch.get_rng_state()}

    def save(self, step: int, keep: Keep = Keep(), **scalars: Any) -> Path:  # noqa: B008 (frozen)
        return save_checkpoint(self.run, step, *self.parts, scalars, keep)

    def load(self, told: list[str] | None = None) -> dict[str, Any] | None:
        report = pytest.fail if told is None else told.append
        return load_newest(self.run, *self.parts, report=report)


def test_what_is_saved_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    scalars = {"tokens": 3, "guard": {"losses": [0.1, 1e-300]}, "skipped": [[4, 9]], "id": "a/b"}
    one, other = Training(tmp_path), Training(tmp_path, seed=1)
    one.step(1, 2)
    one.optimizer.param_groups[0]["lr"] = 0.1 + 0.2
    one.save(2, norm=float("inf"), **scalars)
    straight = one.step(3)
    assert other.load() == {**scalars, "norm": float("inf"), "step": 2}
    # What the recipe decides is not the checkpoint's.
    assert other.optimizer.param_groups[0]["lr"] == 0.01
    other.optimizer.param_groups[0]["lr"] = 0.1 + 0.2
    assert differences(other.step(3), straight) == []


def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    assert Training(tmp_path).load() is None


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Training, dict[int, dict[str, torch.Tensor]]]:
    """Checkpoints of steps 1 and 2, and what they hold."""
    training, states = Training(tmp_path / "run"), {}
    for step in (1, 2):
        states[step] = training.step(step)
        training.save(step)
    return training, states


def test_a_kill_at_every_call_of_a_save_leaves_a_state_of_the_run(tmp_path: Path) -> None:
    """As the same law of the directory, with everything that a run writes, pruning included."""
    training, again = Training(tmp_path / "first"), Training(tmp_path, seed=1)
    states = {1: training.step(1)}
    training.save(1)
    states[2] = training.step(2)
    shutil.copytree(training.run, tmp_path / "whole")
    training.run = tmp_path / "whole"
    total = len(calls_of(partial(training.save, 2, Keep(last=1))))
    assert total > 60
    found = []
    for number in range(1, total + 1):
        training.run = again.run = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", training.run)
        torch.set_rng_state(states[2]["random"])
        assert die_at(partial(training.save, 2, Keep(last=1)), number)
        content = again.load()
        assert content is not None
        assert differences(again.state(), states[content["step"]]) == [], number
        assert not list(again.run.glob("checkpoints/.tmp-*"))
        found.append(content["step"])
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_full_disk_at_every_call_is_one_message_and_costs_nothing_else(tmp_path: Path) -> None:
    training, again = Training(tmp_path), Training(tmp_path, seed=1)
    states = {1: training.step(1)}
    training.save(1)
    states[2] = training.step(2)
    total = len(calls_of(partial(training.save, 2), WRITES))
    messages = []
    for number in range(1, total + 1):
        directory.abandon(tmp_path / "checkpoints", after=1)
        torch.set_rng_state(states[2]["random"])
        error = fail_at(partial(training.save, 2), number)
        assert error is None or isinstance(error, CheckpointError), error
        messages += [] if error is None else [str(error)]
        content = again.load()
        assert content is not None
        assert differences(again.state(), states[content["step"]]) == []
        assert not list(tmp_path.glob("checkpoints/.tmp-*"))
    assert len(messages) > 20
    assert all("step-00000002 could not be written" in message for message in messages)
    assert all(message.endswith("No space left on device") for message in messages)


def test_damage_of_each_file_falls_back_and_of_all_is_an_error(saved, tmp_path: Path) -> None:
    training, states = saved
    names = [*directory.file_names(list_checkpoints(training.run)[-1]), "manifest.json"]
    assert {"state.json", "optimizer.safetensors", "random.safetensors"} < set(names)
    for name in names:
        place = list_checkpoints(training.run)[-1] / name
        content = bytearray(place.read_bytes())
        content[len(content) // 2] ^= 4
        place.write_bytes(content)
        told: list[str] = []
        assert training.load(told) == {"step": 1}
        assert len(told) == 1
        # A bit of the manifest may be one of another file's SHA-256.
        assert Path(name).name in told[0] or name == "manifest.json"
        assert differences(training.state(), states[1]) == []
        training.step(2)
        assert directory.verify(training.save(2)) is None
    for folder in list_checkpoints(training.run):
        (folder / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no good checkpoint"):
            training.load([])


def test_another_model_is_refused_with_the_difference_and_nothing_is_renamed(saved) -> None:
    training, _ = saved
    other = Training(training.run, num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"model/model\.layers\.1\S+: \(32,\) there, nothing here"
    ):
        other.load()
    other = Training(training.run, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"\(48, 32\) there, \(64, 32\) here"):
        other.load()
    assert len(list_checkpoints(training.run)) == 2


def test_the_background_writes_what_was_and_tells_what_failed(tmp_path: Path) -> None:
    training = Training(tmp_path)
    writer = CheckpointWriter(tmp_path, training.accelerator, Keep(), asynchronous=True)
    state = training.step(1)
    writer.save(1, training.model, training.optimizer, {})
    training.step(2)
    writer.wait()
    again = Training(tmp_path, seed=1)
    assert again.load() == {"step": 1}
    assert differences(again.state(), state) == []
    (tmp_path / "checkpoints" / ".tmp-step-00000002").mkdir()
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "checkpoints").write_text("in the way")
    writer.save(2, training.model, training.optimizer, {})
    with pytest.raises(CheckpointError, match="step-00000002 could not be written"):
        writer.save(3, training.model, training.optimizer, {})
    writer.wait()  # told once


def _sharded(folder: Path) -> None:
    """A checkpoint in the sharded layout, of one process."""
    training = Training(folder.parent.parent)
    training.step(1)

    def write(place: Path) -> None:
        state = take_state(*training.parts, {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(state), "sharded", property(lambda _: True))
            write_files(place, 1, state, None, 0)

    directory.commit(folder.parent, 1, write)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_file_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    """Poisoned by someone who can write a manifest too, in every file that is read."""
    mark = tmp_path / "mark"
    makers = {"whole": lambda folder: Training(folder.parent.parent).save(1), "sharded": _sharded}
    seen = set()
    for layout, make in makers.items():
        first = directory.folder_of(tmp_path / layout / "checkpoints", 1)
        make(first)
        for name in [*directory.file_names(first), "manifest.json"]:
            seen.add(name)
            run = tmp_path / f"{layout}-{name.replace('/', '-')}"
            folder = directory.folder_of(run / "checkpoints", 1)
            make(folder)
            (folder / name).write_bytes(pickle.dumps(Poison(mark)))
            if name != "manifest.json":
                files = directory.sync_files(folder, directory.file_names(folder))
                (folder / "manifest.json").unlink()
                folder.rename(temporary := folder.with_name(".tmp-poisoned"))
                directory.finish(temporary, 1, files)
            training = Training(run)
            if not name.startswith("model/") or name.endswith(".safetensors"):
                with pytest.raises(CheckpointError):
                    training.load([])
            if not name.startswith("model/"):
                with pytest.raises(CheckpointError):
                    load_checkpoint(folder, *training.parts)
            with contextlib.suppress(CheckpointError):
                export_model(folder, run / "model")
            assert not mark.exists(), name
    assert {"shards/.metadata", "shards/__0_0.distcp", "optimizer.safetensors"} < seen
    pickle.loads(pickle.dumps(Poison(mark)))
    assert mark.exists()  # the poison works


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_may_name_tensors_in_listed_files_and_nothing_else(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    sharded.write_shards(tmp_path / "good", tensors, None)
    files = {path.name for path in (tmp_path / "good").iterdir()}
    assert sharded.shapes_in(tmp_path / "good", files) == {"a": (3,)}
    with pytest.raises(CheckpointError, match="no file of the checkpoint"):
        sharded.read_metadata(tmp_path / "good", {".metadata"})
    save(tensors, storage_writer=FileSystemWriter(tmp_path / "path"))
    with pytest.raises(CheckpointError, match="StorageMeta is not allowed"):
        sharded.read_metadata(tmp_path / "path", files)
    save({**tensors, "b": "text"}, storage_writer=FileSystemWriter(tmp_path / "text"))
    with pytest.raises(CheckpointError, match="BytesStorageMetadata is not allowed"):
        sharded.read_metadata(tmp_path / "text", files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "_ALLOWED", _Everything())
        with pytest.raises(CheckpointError, match="b is no tensor"):
            sharded.read_metadata(tmp_path / "text", files)
    for content in (b"", pickle.dumps([1]), b"\x80\x04\x95", os.urandom(100)):
        (tmp_path / "good" / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
            sharded.read_metadata(tmp_path / "good", files)


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


def test_the_list_of_allowed_classes_runs_nothing() -> None:
    """None of them is a function but torch's own, which looks up a layout by its name."""
    for module, name in sorted(sharded._ALLOWED):
        found = sharded._Unpickler(io.BytesIO(b"")).find_class(module, name)
        assert isinstance(found, (type, torch.dtype)) or name == "_get_layout"


@pytest.mark.parametrize("owner", [torch.Size, "text"])
def test_attributes_in_metadata_are_members_of_enumerations_only(owner: Any) -> None:
    """Python 3.11.0 to 3.11.3 pickles a member as `getattr(enumeration, name)`."""

    class Of:
        def __init__(self, owner: Any, name: str) -> None:
            self.arguments = owner, name

        def __reduce__(self) -> Any:
            return getattr, self.arguments

    member = next(iter(_MEM_FORMAT_ENCODING))
    content = pickle.dumps(Of(_MEM_FORMAT_ENCODING, member.name))
    assert sharded._Unpickler(io.BytesIO(content)).load() is member
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        sharded._Unpickler(io.BytesIO(pickle.dumps(Of(owner, "count")))).load()
