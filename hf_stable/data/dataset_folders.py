"""Folders written by `datasets` or downloaded from the Hub.

`datasets` resolves which files belong to a split. The files are then read like any other file, so
the fingerprint covers their content.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import metadata_load

from hf_stable.data.sources import Source
from hf_stable.data.streams import DEFAULT_SPLIT
from hf_stable.errors import DataError

Kind = Literal["repository", "saved splits", "saved table"]

_DIGITS = "[0-9]" * 5
_SHARDS = tuple(
    f"{split}-{_DIGITS}-of-{_DIGITS}*.*" for split in ("data/*", "train", "validation", "test")
)
_CARD_KEYS = {"configs", "dataset_info"}


@dataclass(frozen=True)
class DatasetFolder:
    """A folder that `datasets` reads as a dataset.

    Attributes:
        path: Path of the folder.
        kind: "repository" for data files with splits; "saved splits" or "saved table" for the
            output of `save_to_disk`.
    """

    path: Path
    kind: Kind

    def files(self, source: Source) -> list[Path]:
        """Return the files of the source's split and configuration, in order.

        Raises:
            DataError: If `datasets` cannot load the folder, or if it lacks the split.
        """
        # Imported here: it takes half a second, which readers of other files need not wait.
        from datasets.exceptions import DatasetsError  # noqa: PLC0415

        try:
            splits = _repository(source) if self.kind == "repository" else _saved(source)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"{self.path} is a folder of a dataset, which `datasets` failed to load "
                f"(name={source.name}): {error}"
            ) from error
        split = source.split or DEFAULT_SPLIT
        if self.kind == "saved table":
            (split,) = splits
        if split not in splits:
            raise DataError(
                f"{self.path} is a folder of a dataset without a split {split!r}; it has "
                f"{sorted(splits)}: set split to one of them"
            )
        here = os.path.abspath(self.path)
        return [self.path / os.path.relpath(file, here) for file in splits[split]]


def dataset_folder(path: Path) -> DatasetFolder | None:
    """Return the dataset in a folder, or None for a folder of plain files."""
    if (path / "dataset_dict.json").is_file():
        return DatasetFolder(path, "saved splits")
    described = (path / "dataset_info.json").is_file()
    if described and (path / "state.json").is_file():
        return DatasetFolder(path, "saved table")
    described = described or (path / "dataset_infos.json").is_file() or _has_card(path)
    if described or any(any(path.glob(shards)) for shards in _SHARDS):
        return DatasetFolder(path, "repository")
    return None


def _has_card(path: Path) -> bool:
    try:
        front_matter = metadata_load(path / "README.md")
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return bool(front_matter) and bool(_CARD_KEYS & front_matter.keys())


def _repository(source: Source) -> dict[str, list[str]]:
    import datasets  # noqa: PLC0415 (as above)

    builder: Any = datasets.load_dataset_builder(source.path, source.name)
    return {str(split): list(files) for split, files in builder.config.data_files.items()}


def _saved(source: Source) -> dict[str, list[str]]:
    import datasets  # noqa: PLC0415 (as above)

    found: Any = datasets.load_from_disk(source.path)
    tables = found.items() if isinstance(found, datasets.DatasetDict) else [("", found)]
    return {str(split): [file["filename"] for file in table.cache_files] for split, table in tables}
