"""Run by torchrun: trains the tiny recipe under several shardings, one after another.

torchrun --nproc_per_node N distributed_worker.py FOLDER SETTINGS.json
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import DistributedType, PartialState

from hf_stable.training import train
from tests.training import tiny_recipe


def main() -> None:
    # One process in ten ended with SIGABRT. Tearing down what sharded runs leave behind (torch and
    # gloo) seems to be the cause: nothing is torn down between runs, nor at the end.
    gc.disable()
    folder = Path(sys.argv[1])
    state = PartialState(cpu=True)
    for settings in json.loads(Path(sys.argv[2]).read_text()):
        # accelerate shards by its plugin on accelerators only. Told that these CPUs are some, it
        # takes the way that it takes on GPUs.
        by_plugin = settings.pop("by_plugin", False)
        kind = DistributedType.MULTI_XPU if by_plugin else DistributedType.MULTI_CPU
        state._shared_state["distributed_type"] = kind
        train(tiny_recipe(folder, **settings))
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
