"""Find the files of a folder or glob, follow links, and report everything that is left out.

Hidden files and folders are left out, as in `datasets`: names that begin with a dot, and folders
that begin with two underscores, unless the glob names them explicitly.
"""

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from hf_stable.data.report import ReadReport
from hf_stable.errors import DataError

HIDDEN = "hidden by name"
DANGLING = "links to nothing"
REPEATED = "links to a folder that is already read"
METADATA = "metadata of `datasets`, not text"
FOLDER = "folders that match a glob: give the folder itself, or end the glob with /**"
SPECIAL = "neither a file nor a folder"

_RECORDS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}


def folder_files(folder: Path, report: ReadReport) -> list[Path]:
    """Return all files in a folder and its subfolders, sorted.

    Raises:
        DataError: If a folder cannot be listed.
    """
    found = _walk(folder, report, with_hidden=False)
    shown = (path for path in found if not _leave_hidden(path, 0, folder, report))
    return _only_files((path for path in shown if not _leave_record(path, report)), report)


def glob_files(pattern: str, report: ReadReport) -> list[Path]:
    """Return the files that match a glob, sorted; `**` matches any number of folders.

    Raises:
        DataError: If the glob is invalid or a folder cannot be listed.
    """
    anchor = Path(Path(pattern).anchor)
    parts = Path(pattern).relative_to(anchor).parts
    hidden = sum(_is_hidden(parts))
    try:
        if "**" in parts:
            matches = _deep_matches(anchor, parts, report)
        else:
            matches = anchor.glob("/".join(parts))
        kept = [path for path in matches if not _leave_hidden(path, hidden, anchor, report)]
    except ValueError as error:
        raise DataError(f"{pattern} is not a valid glob: {error}") from error
    return _only_files(kept, report)


def _deep_matches(anchor: Path, parts: tuple[str, ...], report: ReadReport) -> Iterator[Path]:
    at = parts.index("**")
    with_hidden = any(_is_hidden(parts[at:]))
    tops = sorted(anchor.glob("/".join(parts[:at]))) if at else [anchor]
    for top in tops:
        if top.is_dir():
            for path in _walk(top, report, with_hidden=with_hidden):
                if _matches(path.relative_to(top).parts, parts[at:]):
                    yield path


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return True if names match the parts of a glob, like `PurePath.full_match` (Python 3.13)."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        if len(pattern) == 1:
            return True
        return _matches(names, pattern[1:]) or (bool(names) and _matches(names[1:], pattern))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _walk(top: Path, report: ReadReport, *, with_hidden: bool) -> Iterator[Path]:
    """Yield every non-folder under `top`. Each folder is entered once; links come last."""
    seen: set[str] = set()
    above: set[str] = set()
    starts = [top]
    while starts:
        start = starts.pop(0)
        place = os.path.realpath(start)
        if place in seen | above:
            report.leave(REPEATED, start)
            continue
        above.update(map(str, Path(place).parents))
        for name, folders, files in os.walk(start, onerror=_refuse):
            here = Path(name)
            if (place := os.path.realpath(here)) in seen:
                report.leave(REPEATED, here)
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(_visible(here, folders, report, with_hidden))
            starts += [here / folder for folder in folders if (here / folder).is_symlink()]
            yield from (here / file for file in sorted(files))


def _visible(here: Path, folders: list[str], report: ReadReport, with_hidden: bool) -> list[str]:
    if with_hidden:
        return folders
    hidden = [name for name in sorted(folders) if any(_is_hidden((name, "")))]
    for name in hidden:
        report.leave(HIDDEN, here / name)
    return [name for name in folders if name not in hidden]


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename} cannot be listed: {error.strerror}; make it readable, or name the files "
        "to read"
    ) from error


def _is_hidden(parts: tuple[str, ...]) -> list[bool]:
    *folders, file = parts
    hidden = [part.startswith((".", "__")) and part != ".." for part in folders]
    return [*hidden, file.startswith(".") and file != ".."]


def _leave_hidden(path: Path, asked_for: int, top: Path, report: ReadReport) -> bool:
    """Leave out a path with more hidden names below `top` than the glob names."""
    if sum(_is_hidden(path.relative_to(top).parts)) <= asked_for:
        return False
    report.leave(HIDDEN, path)
    return True


def _leave_record(path: Path, report: ReadReport) -> bool:
    """Leave out the metadata that `datasets` writes next to the text."""
    beside = path.name == "state.json" and (path.parent / "dataset_info.json").exists()
    if path.name not in _RECORDS and not beside:
        return False
    report.leave(METADATA, path)
    return True


def _only_files(paths: Iterable[Path], report: ReadReport) -> list[Path]:
    found = []
    for path in sorted(paths):
        if path.is_file():
            found.append(path)
        elif not path.exists():
            report.leave(DANGLING, path)
        else:
            report.leave(FOLDER if path.is_dir() else SPECIAL, path)
    return found
