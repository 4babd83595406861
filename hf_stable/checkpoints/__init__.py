"""Checkpoints of a run: complete or absent, verified before loading, and free of code.

`directory` implements the atomic folder (without torch). `state` holds the state of a run's
processes. `layouts` and `sharded` read and write the files. A training loop calls `saving` and
`loading`.
"""

from .directory import abandon
from .loading import (
    export_model,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
)
from .saving import CheckpointWriter, Keep, save_checkpoint

__all__ = [
    "CheckpointWriter",
    "Keep",
    "abandon",
    "export_model",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_newest",
    "save_checkpoint",
]
