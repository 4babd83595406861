"""Atomic directory: a checkpoint is either complete, under its final name, or absent.

    checkpoints/
      step-00000100/      a checkpoint; its `manifest.json` names every file with its SHA-256
      bad-step-00000090/  a damaged checkpoint: kept for people, never read again
      .tmp-…              remains of an interrupted save or deletion, removed at the next start

Order of a commit: files, their directories, the manifest, the rename, the parent. Each is on disk
before the next begins. A directory is never written a second time, since a mix of new and old files
would look complete. The manifest detects damage, not malice: whoever can write here can write it
too.

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
# 1,000 ranks with one file each need a tenth of this; a larger file is no manifest.
_LARGEST_MANIFEST = 16 * 2**20

# Errors of a working file system for a checkpoint that has changed since it was written.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

# Relative path with "/" -> {"bytes": int, "sha256": hexadecimal str}.
Files = dict[str, dict[str, Any]]
Report = Callable[[str], None]


def folder_of(parent: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return parent / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name, also for a quarantined one."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint: its name is not step-00000100 or alike.")
    return int(match[1] or match[2])


def checkpoints_in(parent: Path, prefix: str = "step-") -> list[Path]:
    """Return the checkpoints by name, oldest first; use `verify` to check one."""
    found = [path for path in parent.glob(f"{prefix}*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def begin(parent: Path, step: int) -> Path | None:
    """Create an empty temporary folder to write a checkpoint into, for `finish`.

    Args:
        parent: Folder of all checkpoints.
        step: Number of optimizer steps done.

    Returns:
        None if a valid checkpoint of the step exists already. A damaged one is quarantined.
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
    """Flush files of `folder` to disk, and return their sizes and hashes.

    Args:
        folder: Temporary folder of a checkpoint.
        names: Paths relative to `folder`, with "/".
    """
    files: Files = {}
    for name in names:
        durable.sync(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    return files


def finish(temporary: Path, step: int, files: Files) -> Path:
    """Turn a written and synced temporary folder into the checkpoint of `step`.

    Args:
        temporary: Folder from `begin`.
        step: Number of optimizer steps done.
        files: Results of `sync_files` from all processes that wrote.

    Returns:
        Folder of the checkpoint.

    Raises:
        CheckpointError: If the folder holds other files than `files`, for example because the
            processes do not share a file system.
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
    """Write the checkpoint of one process: `write` fills the folder that it receives.

    Args:
        parent: Folder of all checkpoints.
        step: Number of optimizer steps done.
        write: Function that writes the files.

    Returns:
        Folder of the checkpoint.

    Raises:
        OSError: If a file cannot be written. Other errors of `write` are passed on too. Nothing is
            left of the new checkpoint then.
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
    """Free the space of an unfinished checkpoint, as far as possible."""
    with contextlib.suppress(OSError):
        _remove(temporary)


def file_names(folder: Path) -> list[str]:
    """Return all files below `folder`, relative, with "/", without the manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def read_manifest(folder: Path) -> Files:
    """Read the manifest of a checkpoint, without looking at the files themselves.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        CheckpointError: If the manifest is missing or damaged, belongs to another step, or names a
            file outside of the folder.
        OSError: If the system cannot read it now.
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
    """Compare every file with the manifest. Extra files are ignored, and never read.

    Args:
        folder: Folder of the checkpoint.
        share: (index, count): Read only every count-th file, starting at index, so that `count`
            processes verify all files together.

    Returns:
        Description of the damage, or None.

    Raises:
        CheckpointError: If the system cannot read files that may be intact, for example because a
            disk or a network file system does not respond.
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
                f"{folder} cannot be read now ({_say(error)}). Its files may be intact: start "
                "again, or move it away to resume from the previous checkpoint"
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
    """Return the newest valid checkpoint; quarantine damaged ones found on the way.

    Args:
        parent: Folder of all checkpoints.
        report: Receives one line for each damaged checkpoint.
        at_most: Ignore checkpoints of later steps.
        candidates: Checkpoints to consider; all in `parent` unless given.
        check: Verification; differs from `verify` if several processes verify together.
        reject: Quarantine; differs from `quarantine` likewise.

    Returns:
        None if there never was a checkpoint.

    Raises:
        CheckpointError: If there are, or were, checkpoints, and none is valid. Only a person may
            decide to start again from the beginning.
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
            "used. Put back a copy, give another output folder, or delete the run to start again."
        )
    return None


def quarantine(folder: Path, why: str) -> Path:
    """Rename a damaged checkpoint, which is never read again.

    Args:
        folder: Folder of the checkpoint.
        why: Description of the damage, written to `why.txt` in the folder.

    Returns:
        New path of the folder.
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
        parent: Folder of all checkpoints.
        last: Number of newest checkpoints to keep, at least one.
        every: Also keep steps that are a multiple of this; 0 keeps none of them.
        interval: Only steps that are a multiple of this count for `last`. Others come from signals,
            and must not displace the target of a rollback.
        held: Also keep the newest regular checkpoint up to this step, or the oldest regular one if
            all are newer.
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
    """Remove remains of interrupted saves and deletions; the caller must hold the run lock."""
    for path in parent.glob(f"{_TEMPORARY}*"):
        _remove(path)


def _delete(folder: Path) -> None:
    """Delete a folder under a temporary name; half deleted, it would look damaged otherwise."""
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
    """Refuse links: files must lie in the folder itself."""
    path = folder
    for part in ("", *PurePosixPath(name).parts):
        path = path / part
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise ValueError(f"{path} is a symbolic link; a checkpoint holds its files itself")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no file")


def _say(error: BaseException) -> str:
    """Return the message of an error, without the system's error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    return f"missing {error}" if isinstance(error, KeyError) else str(error)


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON mapping of a verified checkpoint; raise ValueError for other content."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON mapping")
    return content
