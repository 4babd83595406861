"""What Transformers' tensor-parallel tests start their processes by."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, function: Callable[..., None], size: int, port: int, arguments: Any) -> None:
    import hf_stable  # noqa: F401, PLC0415 (registers the model in the new process)

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(rank, *arguments)
    dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[..., Callable[..., None]]:
    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            mp.spawn(_enter, args=(function, world_size, port, arguments), nprocs=world_size)

        return run

    return decorate
