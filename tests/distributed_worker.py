"""Run by torchrun: trains the tiny recipe under several shardings, one after another.

torchrun --nproc_per_node N distributed_worker.py FOLDER SETTINGS.json
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from hf_stable.training import train
from tests.training import tiny_recipe


def main() -> None:
    folder = Path(sys.argv[1])
    for settings in json.loads(Path(sys.argv[2]).read_text()):
        train(tiny_recipe(folder, **settings))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
