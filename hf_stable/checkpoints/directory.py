"""The atomic directory: a checkpoint is there whole, under its final name, or not at all.

    checkpoints/
      step-00000100/      a checkpoint; `manifest.json` in it names every file with its SHA-256
      bad-step-00000090/  one that was found damaged: kept for people, never read again
      .tmp-…              what an interrupted save or deletion left; removed at the next start

Order of a commit: files, their directories, the manifest, the rename, the parent; each is on the
disk before the next begins. A directory is never written a second time: what is half new and half
old would look whole. The manifest tells damage, not malice: who can write here can write it too.

Standard library only.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hf_stable import durable
from hf_stable.checksums import sha256_of
from hf_stable.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1
_TEMPORARY = ".tmp-"
_BAD = "bad-"
_NAME = re.compile(r"step-(\d{8,})|bad-step-(\d{8,})(?:-\d+)?")
# 1,000 ranks with a file each need a tenth of it; what is larger is no manifest.
_LARGEST_MANIFEST = 16 * 2**20

# What a file system that works says of a checkpoint that is not as it was written.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

# Relative path with "/" -> {"bytes": int, "sha256": hexadecimal str}.
Files = dict[str, dict[str, Any]]
Report = Callable[[str], None]


def folder_of(parent: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return parent / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name, also of a quarantined one."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint: its name is not step-00000100 or alike.")
    return int(match[1] or match[2])


def checkpoints_in(parent: Path, prefix: str = "step-") -> list[Path]:
    """Checkpoints by name, oldest first; whether they are good, `verify` tells."""
    found = [path for path in parent.glob(f"{prefix}*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def begin(parent: Path, step: int) -> Path | None:
    """An empty temporary folder to write a checkpoint into, for `finish`.

    Returns:
        None when the step is there already and good. One that is bad is quarantined.
    """
    folder = folder_of(parent, step)
    if os.path.lexists(folder):
        problem = verify(folder)
        if problem is None:
            return None
        quarantine(folder, problem)
    temporary = parent / f"{_TEMPORARY}{folder.name}"
    _remove(temporary)
    temporary.mkdir(parents=True)
    return temporary


def sync_files(folder: Path, names: Iterable[str]) -> Files:
    """Bring files of `folder` to the disk, and say what is in them.

    Args:
        names: paths relative to `folder`, with "/".
    """
    files: Files = {}
    for name in names:
        durable.sync(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    return files


def finish(temporary: Path, step: int, files: Files) -> Path:
    """Make a written and synced temporary folder the checkpoint of `step`.

    Args:
        files: what `sync_files` gave, of all who wrote.

    Raises:
        CheckpointError: when other files are there than were said to be written, as when processes
            do not see the same file system.
    """
    present = set(file_names(temporary))
    if present != files.keys():
        raise CheckpointError(
            f"{temporary} should hold {len(files)} files, but {sorted(present ^ files.keys())[:3]} "
            "differ: all processes must write to one shared file system."
        )
    for directory in [path for path in temporary.rglob("*") if path.is_dir()]:
        durable.sync(directory)
    manifest = {"format": _FORMAT, "step": step, "files": dict(sorted(files.items()))}
    content = json.dumps(manifest, indent=1)  # no newline: without its last byte it is bad
    (temporary / MANIFEST).write_text(content, encoding="utf-8")
    durable.sync(temporary / MANIFEST)
    durable.sync(temporary)
    folder = folder_of(temporary.parent, step)
    durable.rename(temporary, folder)
    return folder


def commit(parent: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint of one process: `write` fills the folder that it is given.

    Raises:
        OSError and whatever else `write` raises; nothing is left then of the new checkpoint.
    """
    temporary = begin(parent, step)
    if temporary is None:
        return folder_of(parent, step)
    try:
        write(temporary)
        return finish(temporary, step, sync_files(temporary, file_names(temporary)))
    except BaseException:
        give_up(temporary)
        raise


def give_up(temporary: Path) -> None:
    """Free the space of a checkpoint that could not be finished, as far as that works now."""
    with contextlib.suppress(OSError):
        _remove(temporary)


def file_names(folder: Path) -> list[str]:
    """All files below `folder`, relative, with "/", without the manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def read_manifest(folder: Path) -> Files:
    """What a checkpoint says is in it; the files themselves are not looked at.

    Raises:
        CheckpointError: when there is no manifest, or it is damaged, another step's, or names what
            lies outside of the folder.
        OSError: when the system cannot read it now.
    """
    place = folder / MANIFEST
    try:
        _check_plain(folder, MANIFEST)
        if place.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"it is larger than {_LARGEST_MANIFEST} bytes")
        content = json.loads(place.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["step"] != step_of(folder):
            raise ValueError(f"format {content['format']}, step {content['step']}")
        files: Files = content["files"]
        for name, about in files.items():
            _check_inside(name)
            if not isinstance(about["bytes"], int) or not isinstance(about["sha256"], str):
                raise ValueError(f"{name} has no bytes and SHA-256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno not in _DAMAGE:
            raise
        raise CheckpointError(f"{place} cannot be read: {_say(error)}") from error
    return files


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Compare every file with the manifest; extra files are not looked at, nor ever read.

    Args:
        share: (index, count): only every count-th file is read, from the index-th on, so that
            `count` processes verify all of them together.

    Returns:
        What is wrong in words, or None.

    Raises:
        CheckpointError: when the system cannot read what may well be good, as when a disk or a
            network file system does not answer.
    """
    try:
        for name, about in list(read_manifest(folder).items())[share[0] :: share[1]]:
            _check_plain(folder, name)
            size = (folder / name).stat().st_size
            if size != about["bytes"]:
                return f"{name} has {size} bytes, not {about['bytes']}"
            if sha256_of(folder / name) != about["sha256"]:
                return f"{name} does not have its SHA-256"
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise CheckpointError(
                f"{folder} cannot be read now ({_say(error)}), which says nothing about what is in "
                "it: start again, or move it away to go on from the one before"
            ) from error
        return _say(error)
    except (CheckpointError, ValueError) as error:
        return _say(error)
    return None


def newest_good(
    parent: Path,
    report: Report,
    *,
    at_most: int | None = None,
    candidates: Iterable[Path] | None = None,
    check: Callable[[Path], str | None] = verify,
    reject: Callable[[Path, str], Path] | None = None,
) -> Path | None:
    """The newest checkpoint that is as it was written; bad ones on the way are quarantined.

    Args:
        report: told one line about each bad checkpoint.
        at_most: newer steps than this are not looked at.
        candidates, check, reject: what processes that look together agree on instead of their own
            listing, `verify` and `quarantine`.

    Returns:
        None when there never was a checkpoint.

    Raises:
        CheckpointError: when there are, or were, checkpoints, and none is good: to begin anew is
            for people to decide.
    """
    if candidates is None:
        candidates = [*checkpoints_in(parent), *checkpoints_in(parent, _BAD)]
    allowed = [path for path in candidates if at_most is None or step_of(path) <= at_most]
    bad = [path for path in allowed if path.name.startswith(_BAD)]
    for folder in sorted(set(allowed) - set(bad), key=step_of, reverse=True):
        problem = check(folder)
        if problem is None:
            return folder
        bad.append((reject or quarantine)(folder, problem))
        report(f"checkpoint {folder.name} is damaged ({problem}): kept as {bad[-1].name}, not used")
    if bad:
        raise CheckpointError(
            f"{parent} holds no good checkpoint: {', '.join(path.name for path in bad)} cannot be "
            "used. Put back a copy, give another output folder, or delete the run to begin anew."
        )
    return None


def quarantine(folder: Path, why: str) -> Path:
    """Rename a bad checkpoint so that it is never read again; `why.txt` in it says what was wrong.

    Returns:
        Its new place.
    """
    target, number = folder.with_name(f"{_BAD}{folder.name}"), 2
    while os.path.lexists(target):
        target, number = folder.with_name(f"{_BAD}{folder.name}-{number}"), number + 1
    durable.rename(folder, target)
    if target.is_dir() and not target.is_symlink():
        with contextlib.suppress(OSError):
            (target / "why.txt").write_text(why + "\n", encoding="utf-8")
    return target


def prune(
    parent: Path, last: int, every: int = 0, interval: int = 1, held: int | None = None
) -> None:
    """Delete old checkpoints, but never the newest.

    Args:
        last: so many of the newest stay, at least one.
        every: steps that this number divides stay too; 0 keeps none of them.
        interval: only steps that this number divides count among `last`; others are of signals,
            which must not push out what a rollback goes back to.
        held: of these, the newest up to this step stays too, or the oldest if all are newer.
    """
    folders = checkpoints_in(parent)
    regular = [folder for folder in folders if step_of(folder) % interval == 0]
    kept = {*folders[-1:], *regular[-max(last, 1) :]}
    if held is not None:
        kept.update([folder for folder in regular if step_of(folder) <= held][-1:] or regular[:1])
    for folder in folders:
        if folder not in kept and (every == 0 or step_of(folder) % every):
            _delete(folder)


def abandon(parent: Path, after: int) -> None:
    """Delete the checkpoints of all steps after `after`, newest first, for a rollback."""
    for folder in reversed(checkpoints_in(parent)):
        if step_of(folder) > after:
            _delete(folder)


def remove_litter(parent: Path) -> None:
    """Remove what interrupted saves and deletions left; only for who holds the run's lock."""
    for path in parent.glob(f"{_TEMPORARY}*"):
        _remove(path)


def _delete(folder: Path) -> None:
    """Under its own name a half-deleted checkpoint would be taken for a damaged one."""
    doomed = folder.with_name(f"{_TEMPORARY}deleted-{folder.name}")
    _remove(doomed)
    durable.rename(folder, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_inside(name: str) -> None:
    """Refuse a relative path that could lead out of the folder, on any system."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or ".." in parts or re.search(r"[\\:\0]|^/", name):
        raise ValueError(f"{name!r} is no path inside the checkpoint")


def _check_plain(folder: Path, name: str) -> None:
    """Refuse links: what is read must lie in the folder itself."""
    path = folder
    for part in ("", *PurePosixPath(name).parts):
        path = path / part
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise ValueError(f"{path} is a symbolic link; a checkpoint holds its files itself")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no file")


def _say(error: BaseException) -> str:
    """An error in words, without the numbers of the system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    return f"missing {error}" if isinstance(error, KeyError) else str(error)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON mapping of a verified checkpoint; ValueError when it is none."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON mapping")
    return content
