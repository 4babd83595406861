"""Shards written with `torch.distributed.checkpoint`, and read without trusting them.

torch writes `.metadata` as a pickle and reads it with `pickle.load`, which runs any code in the
file. It reads tensors with `torch.load(weights_only=True)`, but other values without that. Here
only tensors are written, and `.metadata` is read with an unpickler that allows only the classes in
`_ALLOWED`.
"""

import io
import pickle
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hf_stable.errors import CheckpointError

from .together import words_of

METADATA = ".metadata"

_ALLOWED = {
    *(("torch", name) for name in ("Size", "float64", "float32", "float16", "bfloat16")),
    *(("torch", name) for name in ("int64", "int32", "int16", "int8", "uint8", "bool")),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta | None:
        return None  # it would contain a local path, as a class to be unpickled


def _member(enumeration: Any, name: str) -> Any:
    """Replace `getattr`, with which Python 3.11.0 to 3.11.3 pickles members of enumerations."""
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum)):
        raise pickle.UnpicklingError(f"getattr of {enumeration!r} is not allowed in it")
    return enumeration[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _member
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed in it")
        return super().find_class(module_name, global_name)


class _Reader(FileSystemReader):
    """Reader that accepts only the files of `folder` that are named in `files`."""

    def __init__(self, folder: Path, files: set[str]) -> None:
        super().__init__(folder)
        self._files = files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path), self._files)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_metadata(folder: Path, files: set[str]) -> Metadata:
    """Read `.metadata` of a folder of shards.

    Args:
        folder: Folder of the shards.
        files: Names in `folder` that may be read.

    Raises:
        CheckpointError: If it holds anything but tensors in these files.
    """
    place = folder / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(place.read_bytes())).load()
    except Exception as error:  # unpickling untrusted bytes can raise anything
        raise CheckpointError(f"{place} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{place} cannot be read: it holds no metadata of tensors")
    for name, about in metadata.state_dict_metadata.items():
        # torch.load would run code from other values.
        if not isinstance(about, TensorStorageMetadata):
            raise CheckpointError(f"{place} cannot be read: {name} is no tensor")
    for info in metadata.storage_data.values():
        if not isinstance(info, _StorageInfo) or info.relative_path not in files:
            raise CheckpointError(f"{place} cannot be read: {info} is no file of the checkpoint")
    return metadata


def shapes_in(folder: Path, files: set[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the whole tensors in the shards, by name."""
    tensors = read_metadata(folder, files).state_dict_metadata
    return {
        name: tuple(about.size)
        for name, about in tensors.items()
        if isinstance(about, TensorStorageMetadata)
    }


def write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Write this process's shards; collective. No process ever holds a whole tensor."""
    save(tensors, storage_writer=_Writer(folder, overwrite=False), process_group=group)


def read_shards(folder: Path, files: set[str], tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors` in place; every process reads for itself.

    Args:
        folder: Folder of the shards.
        files: Names in `folder` that may be read.
        tensors: Whole tensors, or any shards of them, by name.

    Raises:
        CheckpointError: If a tensor is missing or has another shape, or a file is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=_Reader(folder, files), no_dist=True)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        raise CheckpointError(f"{folder} cannot be read: {words_of(error)}") from error


def empty_tensors(folder: Path, files: set[str], prefix: str) -> dict[str, torch.Tensor]:
    """Return unfilled whole tensors for all names with this prefix, for `read_shards`."""
    return {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in read_metadata(folder, files).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(about, TensorStorageMetadata)
    }
