"""Checkpoints of a run: whole or not there, never loaded damaged, never code.

`directory` is the atomic folder (no torch); `state` what a run's processes hold; `layouts` and
`sharded` the files; `saving` and `loading` what a loop calls.
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
