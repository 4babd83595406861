"""Run by torchrun: split models against whole ones, case after case.

torchrun --nproc_per_node 2 -m tests.host.parallel_worker FOLDER

FOLDER holds a model of each case, and splits.json with how it is split; what rank 0 finds is in
result.json of the case's folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hf_stable import StableGPTForCausalLM

from ..techniques import relative_error, tokens


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _load(folder: Path, **split: int) -> StableGPTForCausalLM:
    options = {"distributed_config": DistributedConfig(**split)} if split else {}
    return StableGPTForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)


def _train(model: StableGPTForCausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model.train()(tokens(), labels=tokens()).loss
    loss.backward()
    gradients = {
        name: _whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss, gradients


def _generate(model: StableGPTForCausalLM, **options: Any) -> torch.Tensor:
    ids = tokens(length=5).clamp(min=1)
    return model.eval().generate(ids, max_new_tokens=5, do_sample=False, **options)


def _compare(folder: Path, split: dict[str, int]) -> dict[str, Any]:
    """Errors of a split model against the whole one, relative, and what is held where."""
    whole, parts = _load(folder), _load(folder, **split)
    held = {
        name: parameter.to_local().numel() / parameter.numel()
        for name, parameter in parts.named_parameters()
        if isinstance(parameter, DTensor)
    }
    result: dict[str, Any] = {"held": held}
    with torch.no_grad():
        expected = whole.eval()(tokens(), labels=tokens())
        output = parts.eval()(tokens(), labels=tokens())
    result["logits"] = relative_error(output.logits, expected.logits)
    result["generated"] = torch.equal(_generate(parts), _generate(whole))
    if "pp_size" not in split:
        static = _generate(parts, cache_implementation="static")
        result["static"] = torch.equal(static, _generate(whole))
        result["evaluated"] = relative_error(output.loss, expected.loss)
        (loss, gradients), (exact, others) = _train(parts), _train(whole)
        result["loss"] = relative_error(loss, exact)
        result["gradients"] = {
            name: relative_error(gradients[name], other) for name, other in others.items()
        }
        parts.save_pretrained(folder / "saved")
        dist.barrier()
        saved = _load(folder / "saved").state_dict()
        result["saved"] = max(
            relative_error(saved[name], each) for name, each in whole.state_dict().items()
        )
    return result


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, split in json.loads((root / "splits.json").read_text()).items():
        folder = root / name
        try:
            result = _compare(folder, split)
        except ValueError as error:  # refused by both, before anything is sent
            result = {"refused": str(error)}
        if dist.get_rank() == 0:
            (folder / "result.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
