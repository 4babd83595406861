"""Expand the sources of a recipe into single files and `datasets` names."""

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from hf_stable.data.dataset_folders import DatasetFolder, dataset_folder
from hf_stable.data.files import folder_files, glob_files
from hf_stable.data.formats import READABLE, file_format
from hf_stable.data.opening import is_pipe
from hf_stable.data.report import ReadReport
from hf_stable.data.sources import Source
from hf_stable.errors import DataError

_DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SPLITS = {"dataset", "repository", "saved splits"}
# For each option: the kinds of source it affects, and the advice for all other kinds.
_OPTIONS = {
    "split": (_SPLITS, "name the files of the split instead"),
    "name": (_SPLITS - {"saved splits"}, "name the files of the configuration instead"),
    "streaming": ({"dataset"}, "remove it, files are always read as a stream"),
    "column": ({"dataset", "json", "table", "pipe"}, "remove it, text files have no columns"),
    "sample_by": ({"text", "pipe"}, "remove it, each record is one document"),
}
_DEFAULTS = {field.name: field.default for field in fields(Source)}
# The sources that one source expands to, and their kinds.
_Expanded = tuple[list[Source], set[str]]


def expand(
    sources: Sequence[Source], report: ReadReport | None = None, *, shared_options: bool = False
) -> list[Source]:
    """Replace folders and globs with one source per file, sorted by name.

    `datasets` names are returned unchanged.

    Args:
        sources: Sources with files, folders, globs or `datasets` names as paths.
        report: Receives the files that are found but not read, with the reasons.
        shared_options: True if the options were given once for all sources. Each option then needs
            to affect only one of them.

    Raises:
        DataError: If a path matches no readable file, an option has no effect, or no source was
            given.
    """
    if not sources:
        raise DataError("no data sources given: name at least one file, folder or `datasets` name")
    report = ReadReport() if report is None else report
    expanded = [_expand_one(source, report) for source in sources]
    kinds = [kinds for _, kinds in expanded]
    groups = [range(len(sources))] if shared_options else [[i] for i in range(len(sources))]
    for group in groups:
        _refuse_idle_options([sources[i] for i in group], set().union(*(kinds[i] for i in group)))
    return [found for files, _ in expanded for found in files]


def _refuse_idle_options(sources: Sequence[Source], kinds: set[str]) -> None:
    for option, (useful, remedy) in _OPTIONS.items():
        stated = [source for source in sources if getattr(source, option) != _DEFAULTS[option]]
        if stated and not kinds & useful:
            value = getattr(stated[0], option)
            raise DataError(
                f"{stated[0].path}: {option} {value!r} has no effect on this source: {remedy}"
            )


def _expand_one(source: Source, report: ReadReport) -> _Expanded:
    path = Path(source.path)
    if "://" in source.path:
        raise DataError(
            f"{source.path} is a URL, which is not read: download it and give the file, or give "
            "the name of a dataset on the Hub"
        )
    if path.is_dir():
        dataset = dataset_folder(path)
        return _dataset_files(source, dataset, report) if dataset else _folder(source, report)
    if is_pipe(path):
        return [source], {"pipe"}
    if path.is_file():
        return [source], {_format(path)}
    if _is_glob(source.path):
        return _readable(source, glob_files(source.path, report), report)
    _check_dataset_name(source)
    return [source], {"dataset"}


def _is_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def has_splits(path: str) -> bool:
    """Return True if a path is a `datasets` name or a dataset folder with splits."""
    if not Path(path).is_dir():
        return not Path(path).exists() and not _is_glob(path)
    folder = dataset_folder(Path(path))
    return folder is not None and folder.kind != "saved table"


def _format(path: Path) -> str:
    kind = file_format(path)
    if kind is None:
        hint = "; convert CSV to one of them" if ".csv" in path.suffixes else ""
        raise DataError(f"{path}: cannot read this kind of file; readable are {READABLE}{hint}")
    return kind


def _folder(source: Source, report: ReadReport) -> _Expanded:
    top = Path(source.path)
    files = folder_files(top, report)
    for inner in sorted({above for file in files for above in file.relative_to(top).parents}):
        dataset = dataset_folder(top / inner)
        if dataset and dataset.kind != "saved table":
            raise DataError(
                f"{inner} inside {top} is a folder of a dataset with splits: give it as a "
                "separate source, or name the files to read, for example with a glob"
            )
    return _readable(source, files, report)


def _dataset_files(source: Source, dataset: DatasetFolder, report: ReadReport) -> _Expanded:
    files = dataset.files(source)
    if not files:
        raise DataError(f"{source.path} is a folder of a dataset without any row: remove it")
    kinds = {_format(file) for file in files}
    others = sorted({*folder_files(dataset.path, report)} - {*files})
    for other in others:
        report.leave("not in the chosen split and configuration of the dataset", other)
    plain = replace(source, name=None, split=None)
    return [replace(plain, path=str(file)) for file in files], {*kinds, dataset.kind}


def _readable(source: Source, files: list[Path], report: ReadReport) -> _Expanded:
    readable = [file for file in files if file_format(file) is not None]
    report.ignored_files += [str(file) for file in files if file_format(file) is None]
    if not readable:
        left = "".join(f"; {reason}: {len(paths)}" for reason, paths in report.left_files.items())
        raise DataError(
            f"{source.path} matches no readable file, {len(files)} others{left}; "
            f"readable are {READABLE}"
        )
    found = [replace(source, path=str(file)) for file in readable]
    return found, {_format(file) for file in readable}


def _check_dataset_name(source: Source) -> None:
    path = Path(source.path)
    if path.is_symlink():
        raise DataError(
            f"{path} is a link to {path.readlink()}, which does not exist: correct the link"
        )
    if file_format(path) is not None or not _DATASET_NAME.fullmatch(source.path):
        raise DataError(
            f"{source.path} does not exist; relative paths are resolved against the current "
            f"directory, {Path.cwd()}"
        )
