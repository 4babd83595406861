"""Run by torchrun on two processes: saves, loads and fails under FSDP2 and DDP.

torchrun --nproc_per_node 2 sharded_worker.py FOLDER

FOLDER/alone holds checkpoints of one process. Every law that does not hold is a line of
FOLDER/broken-RANK.txt; a file that is there and empty means that all hold.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_stable.checkpoints import (
    CheckpointWriter,
    Keep,
    layouts,
    list_checkpoints,
    load_newest,
    save_checkpoint,
    saving,
)
from hf_stable.errors import CheckpointError
from tests.checkpoints.models import differences, make_model, make_optimizer, train, whole_state


def sharded(seed: int) -> tuple[Any, torch.optim.Optimizer]:
    model = make_model(seed)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, make_optimizer(model)


def replicated(seed: int) -> tuple[Any, torch.optim.Optimizer]:
    model = DistributedDataParallel(make_model(seed))
    return model, make_optimizer(model)


class Laws:
    def __init__(self, folder: Path) -> None:
        self.folder, self.accelerator = folder, Accelerator(cpu=True)
        self.broken: list[str] = []

    def same(self, what: str, one: dict[str, Any], other: dict[str, Any]) -> None:
        self.hold(f"{what}: {differences(one, other)}", not differences(one, other))

    def hold(self, what: str, truth: bool) -> None:
        if not truth:
            self.broken.append(what)

    def resumes_exactly(self, make: Any, name: str) -> None:
        """Steps 1-3, save, steps 4-5 equal load, steps 4-5; also what dropout draws."""
        run, (model, optimizer) = self.folder / name, make(0)
        torch.manual_seed(100 + dist.get_rank())
        train(model, optimizer, range(3))
        save_checkpoint(run, 3, model, optimizer, self.accelerator, {"tokens": 7}, Keep())
        saved = whole_state(model, optimizer)
        if dist.get_rank() == 0:
            save_file(saved, self.folder / f"{name}.safetensors")
        train(model, optimizer, range(3, 5))
        straight, drawn = whole_state(model, optimizer), torch.rand(4)
        model, optimizer = make(1)
        scalars = load_newest(run, model, optimizer, self.accelerator)
        self.hold(f"{name}: scalars {scalars}", scalars == {"tokens": 7, "step": 3})
        self.same(f"{name}: loaded", whole_state(model, optimizer), saved)
        train(model, optimizer, range(3, 5))
        self.same(f"{name}: resumed", whole_state(model, optimizer), straight)
        self.hold(f"{name}: random state", torch.equal(torch.rand(4), drawn))

    def loads(self, make: Any, name: str) -> None:
        model, optimizer = make(1)
        load_newest(self.folder / name, model, optimizer, self.accelerator)
        expected = load_file(self.folder / f"{name}.safetensors")
        self.same(f"{name} into {make.__name__}", whole_state(model, optimizer), expected)

    def saves_in_the_background(self, make: Any, name: str) -> None:
        run, (model, optimizer) = self.folder / name, make(2)
        writer = CheckpointWriter(run, self.accelerator, Keep(last=3), asynchronous=True)
        train(model, optimizer, range(2))
        for step in (2, 3):
            saved = whole_state(model, optimizer)
            writer.save(step, model, optimizer, {})
            train(model, optimizer, range(step, step + 1))
        writer.wait()
        self.hold(f"{name}: two checkpoints", len(list_checkpoints(run)) == 2)
        state = make(1)
        load_newest(run, *state, self.accelerator)
        self.same(f"{name}: saved in the background", whole_state(*state), saved)
        self.fails_in_the_background(writer, model, optimizer, run)

    def fails_in_the_background(
        self, writer: CheckpointWriter, model: Any, optimizer: Any, run: Path
    ) -> None:
        """One process's failure is everybody's, by the next save, and leaves nothing behind."""

        def fail(*arguments: Any) -> Any:
            if dist.get_rank() == 1:
                layouts.write_files(*arguments)
                raise OSError(28, "No space left on device")
            return layouts.write_files(*arguments)

        saving.write_files = fail
        writer.save(4, model, optimizer, {})
        try:
            writer.save(5, model, optimizer, {})
            self.hold(f"{run.name}: the failure came out", False)
        except CheckpointError as error:
            self.hold(f"{run.name}: {error}", "process 1: [Errno 28] No space" in str(error))
        saving.write_files = layouts.write_files
        dist.barrier()
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        self.hold(f"{run.name}: {names}", names == ["step-00000002", "step-00000003"])
        writer.save(5, model, optimizer, {})
        writer.wait()
        self.hold(f"{run.name}: step 5", len(list_checkpoints(run)) == 3)

    def falls_back(self, name: str) -> None:
        """Damage that one process finds in its share is found by all."""
        run, (model, optimizer) = self.folder / name, sharded(0)
        for step in (1, 2):
            train(model, optimizer, range(step, step + 1))
            save_checkpoint(run, step, model, optimizer, self.accelerator, {}, Keep())
        if dist.get_rank() == 0:
            shard = list_checkpoints(run)[-1] / "shards" / "__1_0.distcp"
            content = bytearray(shard.read_bytes())
            content[-1000] ^= 1
            shard.write_bytes(content)
        dist.barrier()
        told: list[str] = []
        scalars = load_newest(run, model, optimizer, self.accelerator, report=told.append)
        self.hold(f"{name}: {told}", scalars == {"step": 1} and "__1_0.distcp" in told[0])


def main() -> None:
    gc.disable()
    laws = Laws(Path(sys.argv[1]))
    laws.resumes_exactly(sharded, "fsdp2")
    laws.resumes_exactly(replicated, "ddp")
    for make in (sharded, replicated):
        for name in ("alone", "fsdp2", "ddp"):
            laws.loads(make, name)
    laws.saves_in_the_background(sharded, "background-fsdp2")
    laws.saves_in_the_background(replicated, "background-ddp")
    laws.falls_back("damaged")
    place = laws.folder / f"broken-{dist.get_rank()}.txt"
    place.write_text("".join(line + "\n" for line in laws.broken))
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
