"""Run by torchrun: trains the tiny recipe under several shardings, one after another.

torchrun --nproc_per_node N distributed_worker.py FOLDER SETTINGS.json
"""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from hf_stable.training import train
from tests.guard.faults import Fault, faulty
from tests.training import tiny_recipe


def main() -> None:
    # One process in ten ended with SIGABRT. Tearing down what sharded runs leave behind (torch and
    # gloo) seems to be the cause: nothing is torn down between runs, nor at the end.
    gc.disable()
    folder = Path(sys.argv[1])
    for settings in json.loads(Path(sys.argv[2]).read_text()):
        launcher = settings.pop("launcher", {})  # what `accelerate launch` makes of a config file
        os.environ.update(launcher)
        fault = settings.pop("fault", None)
        with contextlib.nullcontext() if fault is None else faulty(Fault(**fault)):
            train(tiny_recipe(folder, **settings))
        for name in launcher:
            del os.environ[name]
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
